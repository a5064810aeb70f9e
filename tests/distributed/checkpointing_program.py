"""What two ranks check of saving and resuming; started by `test_checkpointing.py`, several checks to a launch."""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardpoint import (
    Booster,
    Checkpointer,
    DistCoordinator,
    Latest,
    RunState,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from shardpoint.adapters.c10d import C10dComm
from shardpoint.booster import TorchDDPPlugin, TorchFSDPPlugin
from shardpoint.data import StatefulDistributedSampler
from shardpoint.errors import (
    ChecksumError,
    CollectiveTimeout,
    MismatchError,
    NotFoundError,
    PeerError,
    ResumeMismatchError,
    StorageError,
    TornCheckpointError,
    UsageError,
)
from shardpoint.events import Event
from shardpoint.planning import small
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.compat import colossal_layout
from tests.distributed.reporting import run_and_report
from tests.language import TEXTS, same_tokenizer, tied_llama, tokenizer
from tests.training import (
    OPTIMIZERS,
    bits,
    flip,
    net,
    on_disk,
    optimizer_state,
    same_bits,
    train,
    weights,
)

E = TypeVar("E", bound=BaseException)
RANK = 0
PLUGINS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: TorchDDPPlugin(find_unused_parameters=True),
    "fsdp": TorchFSDPPlugin,
}


def made(plugin: str, seed: int, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> TrainState:
    model: nn.Module = net(seed, dtype)
    stepped = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(stepped, [2, 2, 5])
    model, *_ = Booster(plugin=PLUGINS[plugin]()).boost(model, stepped, None, None, scheduler)
    return TrainState(model=model, optimizer=stepped, lr_scheduler=scheduler)


def step(state: TrainState, steps: range, dtype: torch.dtype = torch.float32) -> list[float]:
    assert state.optimizer is not None
    return train(state.model, state.optimizer, steps, dtype)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    return weights(state.model) | {f"opt.{k}": v for k, v in optimizer_state(state.model, state.optimizer).items()}


def local_bytes(state: TrainState) -> dict[str, Any]:
    found = {}
    for name, tensor in state.model.state_dict().items():
        found[name] = bits(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    return found


def raises(kind: type[E], work: Callable[[], Any]) -> E:
    with pytest.raises(kind) as caught:
        work()
    assert type(caught.value) is kind, repr(caught.value)
    return caught.value


def same_everywhere(value: object) -> None:
    """Check that all ranks have an equal value."""
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(value))
    assert len(set(texts)) == 1, texts


def names(root: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in root.iterdir() if path.name != ".shardpoint")


# ---- what comes back


def _round_trip(root: Path, plugin: str, optimizer: str, dtype: torch.dtype = torch.float32) -> None:
    state = made(plugin, 0, optimizer, dtype)
    step(state, range(3), dtype)
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=1, step=3, batch_size=4)
    saved = everything(state)
    directory = root / "epoch-1_step-3"
    assert same_bits(on_disk(directory / "modeling"), weights(state.model))
    stored = {f"opt.{name}": tensor for name, tensor in on_disk(directory / "optimizer").items()}
    assert same_bits(stored, {k: v for k, v in saved.items() if k.startswith("opt.") and v.dim()})
    expected = step(state, range(3, 6), dtype)
    other = made(plugin, 9, optimizer, dtype)
    step(other, range(20, 21), dtype)
    with Checkpointer(root) as checkpointer:
        assert checkpointer.resume(other) == RunState(1, 3, 12)
    assert same_bits(everything(other), saved)
    assert step(other, range(3, 6), dtype) == expected
    assert same_bits(everything(other), everything(state))


def check_ddp_round_trip(out: Path) -> None:
    _round_trip(out / "ddp", "ddp", "adamw")


def check_fsdp_round_trips(out: Path) -> None:
    for optimizer in OPTIMIZERS:
        _round_trip(out / f"fsdp-{optimizer}", "fsdp", optimizer)
    _round_trip(out / "fsdp-bf16", "fsdp", "adamw", torch.bfloat16)


def check_fsdp_round_trips_with_small_tensors_written_by_all(out: Path) -> None:
    with patch.object(small, "MAX_TENSOR_BYTES", 0):
        check_fsdp_round_trips(out)


def check_the_usage_example(out: Path) -> None:
    coordinator = DistCoordinator()
    for plugin in PLUGINS:
        state = made(plugin, 0)
        model, optimizer, lr_scheduler, booster = state.model, state.optimizer, state.lr_scheduler, Booster()
        step(state, range(2))
        saved = everything(state)
        assert optimizer is not None
        save_checkpoint(save_dir=out / plugin, booster=booster, model=model, optimizer=optimizer,
            lr_scheduler=lr_scheduler, epoch=1, step=500, batch_size=32, coordinator=coordinator)  # fmt: skip
        other = made(plugin, 4)
        assert other.optimizer is not None
        found = load_checkpoint(load_dir=out / plugin / "epoch-1_step-500", booster=booster, model=other.model,
                                optimizer=other.optimizer, lr_scheduler=other.lr_scheduler)  # fmt: skip
        assert found == (1, 500, 16000)
        assert load_checkpoint(out / plugin / "epoch-1_step-500", None, None, None, None) == found
        assert same_bits(everything(other), saved)


def check_reshaped(out: Path) -> None:
    """Load what one process saved, and what the other plugin saved."""
    for source, plugin in (("one", "ddp"), ("one", "fsdp")):
        state = made(plugin, 5)
        checkpointer = Checkpointer(out / source)
        assert checkpointer.resume(state) == RunState(0, 3, 12)
        assert same_bits(weights(state.model), on_disk(out / source / "epoch-0_step-3" / "modeling"))
        stored = on_disk(out / source / "epoch-0_step-3" / "optimizer")
        assert same_bits({k: v for k, v in everything(state).items() if k.startswith("opt.") and v.dim()},
                         {f"opt.{k}": v for k, v in stored.items()})  # fmt: skip
        checkpointer.close()
    for source, plugin in (("fsdp", "ddp"), ("ddp", "fsdp")):
        root = out / f"from-{source}"
        state, other = made(source, 1), made(plugin, 2)
        step(state, range(2))
        with Checkpointer(root) as checkpointer:
            checkpointer.save(state, epoch=0, step=2, batch_size=4)
            checkpointer.resume(other)
        assert same_bits(everything(other), everything(state))


def check_an_unsharded_root(out: Path) -> None:
    batch = torch.ones(2, 3)
    state, other = made("fsdp", 1), made("fsdp", 2)
    step(state, range(1))
    expected_weights = weights(state.model)
    with torch.no_grad():
        expected = state.model(batch)
        other.model(batch)
    assert not all(isinstance(p, DTensor) for p in other.model.parameters()), "the root is expected to be unsharded"
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert same_bits(on_disk(out / "epoch-0_step-1" / "modeling"), expected_weights)
        with torch.no_grad():
            other.model(batch)
        checkpointer.resume(other)
    with torch.no_grad():
        assert bits(other.model(batch)) == bits(expected)
    assert step(other, range(1, 3)) == step(state, range(1, 3))


def check_buffers_that_differ(out: Path) -> None:
    def normed() -> nn.Module:
        model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model, *_ = Booster(plugin=TorchDDPPlugin(broadcast_buffers=False)).boost(model)
        return model

    model = normed()
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(RANK)) + RANK).sum().backward()
    means: list[Any] = [None, None]
    dist.all_gather_object(means, weights(model)["1.running_mean"])
    assert not torch.equal(*means)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=0, batch_size=1)
        other = normed()
        checkpointer.resume(TrainState(model=other))
    assert torch.equal(on_disk(out / "epoch-0_step-0" / "modeling")["1.running_mean"], means[0])
    assert torch.equal(weights(other)["1.running_mean"], means[0])


def check_parameters_that_ddp_ignores(out: Path) -> None:
    model = nn.Linear(300, 300)
    kind: Any = nn.parallel.DistributedDataParallel
    kind._set_params_and_buffers_to_ignore_for_model(model, ["weight"])
    with torch.no_grad():
        model.weight.fill_(RANK + 1)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=kind(model)), epoch=0, step=0, batch_size=1)
    assert torch.equal(on_disk(out / "epoch-0_step-0" / "modeling")["weight"], torch.ones(300, 300))


def check_random_state_and_samplers_by_rank(out: Path) -> None:
    class Own:
        value = -1

        def state_dict(self) -> dict[str, int]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.value = state["value"]

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]  # noqa: NPY002

    def reseed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)

    def sampler() -> StatefulDistributedSampler:
        return StatefulDistributedSampler(range(24), num_replicas=2, rank=RANK, seed=1)

    reseed(100 + RANK)
    model, own, shared = nn.Linear(1, 1), Own(), sampler()
    own.value = 7 + RANK
    shared.set_start_index(4)
    rest = list(shared)
    with Checkpointer(out / "own") as first, Checkpointer(out / "shared") as second:
        first.save(TrainState(model=model, sampler=own), epoch=0, step=1, batch_size=1)
        expected = draw()
        second.save(TrainState(model=model, sampler=shared), epoch=0, step=1, batch_size=1)
        reseed(0)
        fresh = Own()
        first.resume(TrainState(model=model, sampler=fresh))
        assert fresh.value == 7 + RANK
        assert draw() == expected
        again = sampler()
        second.resume(TrainState(model=model, sampler=again))
        assert list(again) == rest
    both: list[Any] = [None, None]
    dist.all_gather_object(both, expected)
    assert both[0] != both[1]


def check_a_resume_that_is_not_true_on_one_rank(out: Path) -> None:
    def sampler() -> StatefulDistributedSampler:
        return StatefulDistributedSampler(range(24), num_replicas=2, rank=RANK, seed=1)

    state = made("fsdp", 0)
    state.sampler = sampler()
    step(state, range(2))
    state.sampler.set_start_index(8)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
        state.sampler = sampler()
        with patch.object(StatefulDistributedSampler, "load_state_dict" if RANK == 1 else "__doc__", lambda *_: None):
            error = raises(ResumeMismatchError, lambda: checkpointer.resume(state))
        same_everywhere(error.differences)
        assert error.differences[0] == "data/rank-00001.json: start_index was 8 and is 0"
        assert checkpointer.resume(state) == RunState(0, 2, 8)
        checkpointer.journal.record(epoch=0, step=3, loss=0.5, samples=[1])
        raises(UsageError, lambda: checkpointer.journal.record(epoch=0, step=3, loss=0.5))
        header, line = map(json.loads, (out / "journal.jsonl").read_text().splitlines()) if RANK == 0 else ({}, {})
        assert RANK or (header["world_size"], header["layout"], header["num_samples"]) == (2, "S(0) over 2 cpu", 24)
        assert RANK or line["optimizers"][""]["steps"] == 2


def check_roles(out: Path) -> None:
    roles = {"actor": made("fsdp", 0), "critic": made("ddp", 1, "sgd_momentum")}
    for state in roles.values():
        step(state, range(2))
    with Checkpointer(out, keep=[Latest(1)]) as checkpointer:
        for number in (1, 2):
            checkpointer.save(roles, epoch=0, step=number, batch_size=4)
        assert names(out) == ["epoch-0_step-2"]
        others = {"actor": made("ddp", 5), "critic": made("fsdp", 6, "sgd_momentum")}
        assert checkpointer.resume(others) == RunState(0, 2, 8)
    for name, state in roles.items():
        assert same_bits(everything(state), everything(others[name]))


def check_adapters_under_fsdp(out: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def adapted(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False)  # fmt: skip
        booster = Booster(plugin=TorchFSDPPlugin())
        model = booster.enable_lora(LlamaForCausalLM(config), lora_config=LoraConfig(r=2, target_modules=["q_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer, *_ = booster.boost(model, optimizer)
        return model, optimizer

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for number in steps:
            ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = adapted(0)
    run(model, optimizer, range(2))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=2, batch_size=1)
        other, other_optimizer = adapted(3)
        checkpointer.resume(TrainState(model=other, optimizer=other_optimizer))
    assert same_bits(weights(other), weights(model))
    assert run(other, other_optimizer, range(2, 4)) == run(model, optimizer, range(2, 4))
    plain, info = AutoModelForCausalLM.from_pretrained(out / "epoch-0_step-2" / "modeling", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain) is LlamaForCausalLM
    prefix = "base_model.model."
    base = {k.replace(".base_layer", "").removeprefix(prefix): v for k, v in weights(model).items() if "lora_" not in k}
    assert same_bits(weights(plain), base)
    with Checkpointer(out) as checkpointer:
        pending = checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=4, batch_size=1)
    assert pending is not None
    assert (
        pending.result().linked_bytes
        == (out / "epoch-0_step-4/modeling/model-00001-of-00001.safetensors").stat().st_size
    )
    assert same_bits(on_disk(out / "epoch-0_step-4" / "modeling"), base)


def check_tied_adapters_and_a_tokenizer_under_fsdp(out: Path) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    words = tokenizer()
    ids = words(TEXTS[:1], return_tensors="pt")["input_ids"]

    def adapted(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        booster = Booster(plugin=TorchFSDPPlugin())
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
        model = booster.enable_lora(tied_llama(len(words), seed), lora_config=config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer, *_ = booster.boost(model, optimizer)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    model, optimizer = adapted(0)
    step(model, optimizer)
    with Checkpointer(out) as checkpointer:
        state = TrainState(model=model, optimizer=optimizer, tokenizer=words)
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        other, other_optimizer = adapted(3)
        checkpointer.resume(TrainState(model=other, optimizer=other_optimizer))
    assert same_bits(weights(other), weights(model))
    directory = out / "epoch-0_step-1"
    plain = AutoModelForCausalLM.from_pretrained(directory / "modeling")
    opened = PeftModel.from_pretrained(plain, str(directory / "adapter" / "default")).eval()
    with torch.no_grad():
        assert bits(opened(input_ids=ids).logits) == bits(model.eval()(input_ids=ids).logits)
    assert step(other, other_optimizer) == step(model.train(), optimizer)
    found = AutoTokenizer.from_pretrained(directory / "modeling")
    assert same_tokenizer(found, words)
    assert GenerationConfig.from_pretrained(directory / "modeling").repetition_penalty == 1.3
    continued = [opened.generate(**each(TEXTS[0], return_tensors="pt")).tolist() for each in (found, words)]
    assert continued[0] == continued[1]


def check_plain_state_beside_sharded_parameters(out: Path) -> None:
    def own(seed: int) -> TrainState:
        state = made("fsdp", seed, "sgd_plain")
        assert state.optimizer is not None
        for parameter in state.model.parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            state.optimizer.state[parameter] = {"mine": torch.full(local.shape, float(10 * seed + RANK))}
        return state

    one, two = own(1), own(2)
    assert two.optimizer is not None
    live = {parameter: two.optimizer.state[parameter]["mine"] for parameter in two.model.parameters()}
    with Checkpointer(out) as checkpointer:
        checkpointer.save(one, epoch=0, step=0, batch_size=1)
        checkpointer.resume(two)
    stored = on_disk(out / "epoch-0_step-0" / "optimizer")["head.weight.mine"]
    assert stored.shape == (1, 5)
    assert stored.unique().tolist() == [10.0]
    assert on_disk(out / "epoch-0_step-0" / "optimizer")["embed.weight.mine"].unique().tolist() == [10.0, 11.0]
    for parameter, tensor in live.items():
        assert two.optimizer.state[parameter]["mine"] is tensor
        assert tensor.numel() == 0 or tensor.unique().tolist() == [10.0 + RANK]


def check_zero_dim_parameters_on_a_mesh(out: Path) -> None:
    def scaled() -> TrainState:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        model = nn.Module()
        model.scale = nn.Parameter(distribute_tensor(torch.tensor(0.5), mesh, [Replicate()]))
        model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))

    def once(state: TrainState) -> list[float]:
        assert state.optimizer is not None
        model: Any = state.model
        (model.scale * model.weight.sum()).full_tensor().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        return [model.scale.full_tensor().item(), model.weight.full_tensor().sum().item()]

    state, other = scaled(), scaled()
    with Checkpointer(out / "scale") as checkpointer:
        once(state)
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        expected = [once(state) for _ in range(3)]
        checkpointer.resume(other)
    assert other.optimizer is not None
    assert isinstance(other.optimizer.state[other.model.get_parameter("scale")]["exp_avg"], DTensor)
    assert [once(other) for _ in range(3)] == expected


def check_a_tensor_on_some_of_the_ranks(out: Path) -> None:
    alone = DeviceMesh("cpu", [1])

    def model(value: float) -> nn.Module:
        module = nn.Module()
        module.alone = nn.Parameter(distribute_tensor(torch.full((4, 2), value), alone, [Shard(0)]))
        module.scalar = nn.Parameter(distribute_tensor(torch.tensor(value), alone, [Replicate()]))
        return module

    one, two = model(3.0), model(4.0)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=one), epoch=0, step=0, batch_size=1)
        checkpointer.resume(TrainState(model=two))
    stored = on_disk(out / "epoch-0_step-0" / "modeling")
    assert torch.equal(stored["alone"], torch.full((4, 2), 3.0))
    assert stored["scalar"].item() == 3.0
    if RANK == 1:
        assert torch.equal(two.get_parameter("alone").to_local(), stored["alone"])  # type: ignore[attr-defined]
        assert two.get_parameter("scalar").to_local().item() == 3.0  # type: ignore[attr-defined]


def check_replicas_share_the_writing(out: Path) -> None:
    model, *_ = Booster(plugin=TorchDDPPlugin()).boost(nn.Linear(512, 512))
    store = FaultyStore(LocalStore(out))
    with Checkpointer(out, store=store) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=0, batch_size=1)
    assert same_bits(on_disk(out / "epoch-0_step-0" / "modeling"), weights(model))
    assert [key for op, key in store.log if op == "write" and "modeling" in key], "this rank wrote nothing"


# ---- what goes wrong


def check_an_error_of_one_rank_is_everyones(out: Path) -> None:
    class Broken:
        def state_dict(self) -> dict[str, int]:
            if RANK == 1:
                raise RuntimeError("no state today")
            return {}

    state = made("fsdp", 0)
    fault = Fault("write", "*/attempt-epoch-0_step-2*/optimizer/*")
    rename = Fault("rename", "*/attempt-epoch-0_step-3*")
    store = FaultyStore(LocalStore(out), [fault] if RANK == 1 else [rename])
    with Checkpointer(out, store=store) as checkpointer, patch.object(small, "MAX_TENSOR_BYTES", 0):
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        before = everything(state)

        def save(number: int, **changes: Any) -> Any:
            arguments: dict[str, Any] = {"epoch": 0, "step": number, "batch_size": 4} | changes
            return checkpointer.save(arguments.pop("state", state), **arguments)

        step(state, range(2))
        bad = TrainState(model=state.model, optimizer=state.optimizer, lr_scheduler=Broken())
        collected = raises(PeerError, lambda: save(2, state=bad))
        assert list(collected.failures) == [1]
        assert collected.failures[1].type == "RuntimeError"
        assert "no state today" in str(collected)
        assert isinstance(collected.__cause__, RuntimeError) == (RANK == 1)
        written = raises(PeerError, lambda: save(2))
        assert list(written.failures) == [1]
        assert written.failures[1].type == "StorageError"
        assert isinstance(written.__cause__, StorageError) == (RANK == 1)
        published = raises(StorageError, lambda: save(3))
        assert published.op == "rename"
        differ = raises(UsageError, lambda: save(4 + RANK))
        assert "rank 0: epoch-0_step-4" in str(differ)
        assert "rank 1: epoch-0_step-5" in str(differ)
        refused = raises(PeerError, lambda: save(-1 if RANK == 1 else 5))
        assert refused.failures[1].type == "UsageError"
        unknown = raises(UsageError, lambda: save(-1))
        assert "at least 0" in str(unknown)
        resumed = raises(PeerError, lambda: checkpointer.resume({} if RANK == 1 else state))
        assert list(resumed.failures) == [1]
        for error in (collected, written, published, differ, refused, unknown, resumed):
            same_everywhere(error)
        assert names(out) == ["epoch-0_step-1"]
        assert not list((out / ".shardpoint").rglob("attempt-*"))
        other = made("fsdp", 3)
        assert checkpointer.resume(other) == RunState(0, 1, 4)
        assert same_bits(everything(other), before)
        save(2)
        assert checkpointer.resume(other) == RunState(0, 2, 8)
        assert same_bits(everything(other), everything(state))


def check_a_mismatch_is_everyones(out: Path) -> None:
    state = made("fsdp", 0)
    step(state, range(1))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        other = made("fsdp", 2)
        if RANK == 1:  # this rank alone is different
            other.model.register_buffer("only_here", torch.ones(2))
            other.model.seen = other.model.seen.to(torch.int32)
        before, rng = local_bytes(other), torch.get_rng_state().tolist()
        apart = raises(UsageError, lambda: checkpointer.resume(other))
        same_everywhere(apart)
        assert "modeling/seen: rank 0 has I64 [] of seen, rank 1 has I32 [] of seen" in str(apart)
        if RANK == 1:
            other.model.seen = other.model.seen.to(torch.int64)
        lacking = raises(MismatchError, lambda: checkpointer.resume(other))
        same_everywhere(lacking)
        assert lacking.missing == ["modeling: only_here"]
        stripped = TrainState(model=other.model, optimizer=None, lr_scheduler=None)
        all_of_it = raises(MismatchError, lambda: checkpointer.resume(stripped))
        same_everywhere(all_of_it)
        assert {"optimizer", "lr_scheduler.json"} <= set(all_of_it.unexpected)
        after = local_bytes(other)
        before["seen"] = after["seen"]  # the test itself changed it
        assert (after, torch.get_rng_state().tolist()) == (before, rng)


def check_damage_is_everyones(out: Path) -> None:
    told: list[Event] = []
    state, other = made("fsdp", 0), made("fsdp", 4)
    with Checkpointer(out, listener=told.append) as checkpointer:
        for number in (1, 2):
            step(state, range(number, number + 1))
            checkpointer.save(state, epoch=0, step=number, batch_size=4)
            if number == 1:
                first = everything(state)
        path = out / "epoch-0_step-2" / "modeling" / "model-00001-of-00001.safetensors"
        dist.barrier()
        if RANK == 0:
            flip(path)
        dist.barrier()
        assert checkpointer.resume(other) == RunState(0, 1, 4)
        assert same_bits(everything(other), first)
        assert [event.key for event in told if event.kind == "fell_back"] == ([] if RANK else ["epoch-0_step-2"])
        booster = Booster()
        error = raises(ChecksumError, lambda: load_checkpoint(path.parents[1], booster, other.model, None, None))
        same_everywhere((error, error.details()))
        assert error.target_modified
        assert error.key.startswith("modeling/model-00001-of-00001.safetensors#")
        torn = out / "epoch-0_step-7"
        dist.barrier()
        torn.mkdir(exist_ok=True)
        same_everywhere(raises(TornCheckpointError, lambda: load_checkpoint(torn, booster, other.model, None, None)))
        nothing = out / "nothing"
        same_everywhere(raises(NotFoundError, lambda: load_checkpoint(nothing, booster, other.model, None, None)))
        mixed = raises(PeerError, lambda: load_checkpoint(torn, None if RANK else booster, other.model, None, None))
        assert list(mixed.failures) == [1]


def check_a_foreign_booster(out: Path) -> None:
    class Foreign:
        fails = False

        def save_model(self, model: nn.Module, checkpoint: str, **_: Any) -> None:
            if RANK == 0:
                torch.save(model.state_dict(), Path(checkpoint) / "pytorch_model.bin")
            elif self.fails:
                raise OSError(28, "No space left on device")

        def load_model(self, model: nn.Module, checkpoint: str) -> None:
            model.load_state_dict(torch.load(Path(checkpoint) / "pytorch_model.bin"))

        def save_optimizer(self, *_: Any) -> None: ...
        def load_optimizer(self, *_: Any) -> None: ...
        def save_lr_scheduler(self, *_: Any) -> None: ...
        def load_lr_scheduler(self, *_: Any) -> None: ...

    booster: Any = Foreign()
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    nothing: Any = None
    coordinator = DistCoordinator()
    save_checkpoint(out, booster, one, nothing, nothing, 0, 1, 1, coordinator)
    booster.fails = True
    error = raises(PeerError, lambda: save_checkpoint(out, booster, one, nothing, nothing, 0, 2, 1, coordinator))
    assert list(error.failures) == [1]
    assert names(out) == ["epoch-0_step-1"]
    assert load_checkpoint(out / "epoch-0_step-1", booster, two, None, None) == (0, 1, 1)
    stored = torch.load(out / "epoch-0_step-1" / "modeling" / "pytorch_model.bin")
    assert same_bits(weights(two), stored)


class Colossal:
    """Writes what ColossalAI's Booster writes for a model that every rank has whole."""

    def save_model(self, model: nn.Module, checkpoint: str, **_: Any) -> None:
        if RANK == 0:
            colossal_layout.write_weights(Path(checkpoint), model.state_dict())

    def save_optimizer(self, optimizer: torch.optim.Optimizer, checkpoint: str, **_: Any) -> None:
        if RANK == 0:
            colossal_layout.write_optimizer(Path(checkpoint), optimizer.state_dict())

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
        if RANK == 0:
            torch.save(lr_scheduler.state_dict(), checkpoint)

    def load_model(self, *_: Any) -> None: ...
    def load_optimizer(self, *_: Any) -> None: ...
    def load_lr_scheduler(self, *_: Any) -> None: ...


def check_a_foreign_checkpoint_goes_on_natively(out: Path) -> None:
    model: nn.Module = net(0)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    saved = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    step(saved, range(3))
    booster: Any = Colossal()
    save_checkpoint(out, booster, model, optimizer, scheduler, 0, 3, 4, DistCoordinator())
    if RANK == 0:
        colossal_layout.write_checkpoint(out / "own" / "epoch-0_step-3", model, optimizer, scheduler, 0, 3)
    dist.barrier()
    for path, start in ((out / "epoch-0_step-3", 12), (out / "own" / "epoch-0_step-3", 96)):
        for plugin in PLUGINS.values():
            native = Booster(plugin=plugin())
            bare: nn.Module = net(5)
            stepped = OPTIMIZERS["adamw"](bare.parameters())
            other, stepped, *_ = native.boost(bare, stepped)
            follows = torch.optim.lr_scheduler.MultiStepLR(stepped, [2, 2, 5])
            assert load_checkpoint(path, native, other, stepped, follows) == (0, 3, start)
            assert same_bits(everything(TrainState(model=other, optimizer=stepped)), everything(saved))
            assert follows.state_dict() == scheduler.state_dict()
    dist.barrier()
    if RANK == 0:
        flip(out / "epoch-0_step-3" / "modeling" / "pytorch_model-00002.bin", 700)
    dist.barrier()
    before = everything(TrainState(model=other, optimizer=stepped))
    with pytest.raises((ChecksumError, PeerError), match=r"pytorch_model-00002\.bin"):
        load_checkpoint(out / "epoch-0_step-3", native, other, stepped, None)
    assert same_bits(everything(TrainState(model=other, optimizer=stepped)), before)


# ---- what comes in behind, and who reads what


def check_an_optimizer_behind_goes_on_bit_identically(out: Path) -> None:
    for plugin in PLUGINS:
        root = out / plugin
        state = made(plugin, 0)
        step(state, range(3))
        with Checkpointer(root) as checkpointer:
            checkpointer.save(state, epoch=1, step=3, batch_size=4)
        saved = everything(state)
        eager, lazy = made(plugin, 5), made(plugin, 6)
        with Checkpointer(root) as checkpointer:
            assert checkpointer.resume(eager) == RunState(1, 3, 12)
            assert checkpointer.resume(lazy, lazy_optimizer=True) == RunState(1, 3, 12)
            expected = step(eager, range(3, 6))
            assert step(lazy, range(3, 6)) == expected
            assert same_bits(everything(lazy), everything(eager))
            assert checkpointer.optimizer_ready()
            checkpointer.resume(lazy, lazy_optimizer=True)
            assert checkpointer.optimizer_ready()
            assert same_bits(everything(lazy), saved)


def check_an_optimizer_behind_that_is_damaged(out: Path) -> None:
    state, other = made("fsdp", 0), made("fsdp", 1)
    step(state, range(1))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        first = everything(state)
        step(state, range(1, 2))
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
        if RANK == 0:
            flip(out / "epoch-0_step-2" / "optimizer" / "optimizer-00001-of-00001.safetensors")
        dist.barrier()
        assert checkpointer.resume(other, lazy_optimizer=True) == RunState(0, 2, 8)
        error = raises(ChecksumError, lambda: step(other, range(2, 3)))
        same_everywhere((error, error.details()))
        assert error.target_modified
        error = raises(ChecksumError, lambda: checkpointer.save(other, epoch=0, step=3, batch_size=4))
        assert names(out) == ["epoch-0_step-1", "epoch-0_step-2"]
        assert checkpointer.resume(other) == RunState(0, 1, 4)
        assert same_bits(everything(other), first)
        step(other, range(1, 2))


def check_a_read_that_fails_behind(out: Path) -> None:
    state, other = made("fsdp", 0), made("fsdp", 1)
    step(state, range(1))
    store = FaultyStore(LocalStore(out), [Fault("read", "*/optimizer/*.safetensors")] if RANK else [])
    with Checkpointer(out, store=store) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        checkpointer.resume(other, lazy_optimizer=True)
        error = raises(PeerError, checkpointer.optimizer_ready)
        same_everywhere((error, error.details()))
        assert list(error.failures) == [1]
        assert error.failures[1].type == "StorageError"
        raises(PeerError, lambda: step(other, range(1, 2)))
        checkpointer.resume(other)
        assert same_bits(everything(other), everything(state))


def check_ranks_that_ask_for_different_resumes(out: Path) -> None:
    state = made("ddp", 0)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=0, batch_size=4)
        error = raises(UsageError, lambda: checkpointer.resume(state, lazy_optimizer=RANK == 1))
        same_everywhere(error)


def check_a_read_that_fails_in_a_thread(out: Path) -> None:
    model = nn.Linear(2048, 4096, bias=False)  # 32 MiB: several reads, several threads
    state = TrainState(model=nn.parallel.DistributedDataParallel(model))
    store = FaultyStore(LocalStore(out), [Fault("read", "*.safetensors", nth=3)] if RANK else [])
    with Checkpointer(out, store=store) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        error = raises(PeerError, lambda: checkpointer.resume(state))
        same_everywhere((error, error.details()))
        assert [failure.type for failure in error.failures.values()] == ["StorageError"]
        assert checkpointer.resume(state) == RunState(0, 1, 4)


def check_replicas_ask_the_device_for_each_byte_once(out: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 2048, bias=False) for _ in range(8)])  # 64 MiB
    state = TrainState(model=nn.parallel.DistributedDataParallel(model))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        expected = weights(state.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        files = sorted((out / "epoch-0_step-1" / "modeling").glob("*.safetensors"))
        num_bytes = sum(path.stat().st_size for path in files)
        dist.barrier()
        if RANK == 0:
            for path in files:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()
        before = device_bytes()
        checkpointer.resume(state)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, device_bytes() - before)
    assert same_bits(weights(state.model), expected)
    if RANK == 0:
        (out / "device_bytes.json").write_text(json.dumps({"read": sum(found), "stored": num_bytes}))


def check_what_one_rank_holds_is_read_past_the_page_cache(out: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 2048, bias=False) for _ in range(8)])  # 64 MiB
    model, *_ = Booster(plugin=TorchFSDPPlugin()).boost(model)
    state = TrainState(model=model)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        expected = weights(state.model)
        files = sorted((out / "epoch-0_step-1" / "modeling").glob("*.safetensors"))
        num_pages = []
        for cold in (True, False):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            dist.barrier()
            for path in files if RANK == 0 else []:
                with path.open("rb") as file:
                    file.read()
                    if cold:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            dist.barrier()
            before = device_bytes()
            checkpointer.resume(state)
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, device_bytes() - before)
            num_pages.append([sum(found), sum(cached_pages(path) for path in files)])
            assert same_bits(weights(state.model), expected)
    if RANK == 0:
        stored = sum(path.stat().st_size for path in files)
        (out / "pages.json").write_text(json.dumps({"cold": num_pages[0], "warm": num_pages[1], "stored": stored}))


def cached_pages(path: Path) -> int:
    """Return how many of a file's pages are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        vector = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), vector) == 0
        del view
        return sum(page & 1 for page in vector)


def check_frozen_roles_are_linked_on_all_ranks(out: Path) -> None:
    for plugin in (TorchFSDPPlugin(), TorchDDPPlugin()):
        actor, reference = net(1), net(2)
        # DDP refuses a module without gradients, so a frozen one stays plain there.
        boosted, *_ = Booster(plugin=plugin).boost(actor)
        if isinstance(plugin, TorchFSDPPlugin):
            reference, *_ = Booster(plugin=plugin).boost(reference)
        rewards = {"rewards": torch.full((3,), float(RANK))}
        roles = {
            "actor": TrainState(model=boosted, extras={"buffer": rewards}),
            "reference": TrainState(model=reference, frozen=True),
        }
        root = out / type(plugin).__name__
        path = "reference/modeling/model-00001-of-00001.safetensors"
        inodes = []
        with Checkpointer(root, async_save=isinstance(plugin, TorchDDPPlugin)) as checkpointer:
            for number in range(1, 4):
                pending = checkpointer.save(roles, epoch=0, step=number, batch_size=4)
                assert pending is not None
                assert bool(pending.result().linked_bytes) == (number > 1)
                inodes.append((root / f"epoch-0_step-{number}" / path).stat().st_ino)
                assert same_bits(weights(reference), on_disk(root / f"epoch-0_step-{number}/reference/modeling"))
            assert len(set(inodes)) == 1
            rewards["rewards"].zero_()
            checkpointer.resume(roles)
            assert rewards["rewards"].tolist() == [float(RANK)] * 3
            dist.barrier()
        # One rank calls it frozen, the other does not: nobody waits for anybody.
        roles["reference"].frozen = RANK == 0
        with Checkpointer(root) as checkpointer:
            save = functools.partial(checkpointer.save, roles, epoch=0, step=9, batch_size=4)
            assert "frozen" in str(raises(UsageError, save))


def check_ranks_that_hold_frozen_bytes_of_their_own_are_told(out: Path) -> None:
    reference = net(2)
    boosted, *_ = Booster(plugin=TorchFSDPPlugin()).boost(reference)
    told: list[Event] = []
    with Checkpointer(out, listener=told.append) as checkpointer:
        state = {"reference": TrainState(model=boosted, frozen=True)}
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
        if RANK == 1:
            with torch.no_grad():
                local = boosted.head.weight.to_local() if boosted.head.weight.to_local().numel() else None
                (local if local is not None else boosted.embed.weight.to_local()).add_(1.0)
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
    if RANK == 0:
        assert [event.kind for event in told if event.kind == "frozen_changed"] == ["frozen_changed"]
    assert same_bits(weights(boosted), on_disk(out / "epoch-0_step-2/reference/modeling"))


def device_bytes() -> int:
    """Return the bytes that the kernel fetched from a device for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["read_bytes"])


# ---- a killed rank


def kill_in_a_write(out: Path) -> None:
    """Rank 1 dies in its second save's first write; rank 0 tells how long it waited, and what it then knows."""
    comm = C10dComm(silence_s=2.0, heartbeat_s=0.5, stall_s=30.0)
    fault = Fault("write", "*/attempt-epoch-0_step-2*/modeling/*", action="kill")
    state = made("fsdp", 0)
    store = FaultyStore(LocalStore(out), [fault] if RANK == 1 else [])
    with patch("shardpoint.checkpointer.open_comm", lambda: comm):
        checkpointer = Checkpointer(out, store=store)
    checkpointer.save(state, epoch=0, step=1, batch_size=4)
    step(state, range(1))
    began = time.monotonic()
    error = raises(CollectiveTimeout, lambda: checkpointer.save(state, epoch=0, step=2, batch_size=4))
    report = {"waiting_for": error.waiting_for, "waited_s": time.monotonic() - began}
    report["visible"] = sorted(path.name for path in out.iterdir() if path.name != ".shardpoint")
    print(json.dumps(report), flush=True)  # noqa: T201 - the test reads it
    os._exit(0)  # without the process group's goodbye, which would wait for the dead rank


def resume_after_the_kill(out: Path) -> None:
    state = made("fsdp", 6)
    with Checkpointer(out) as checkpointer:
        assert checkpointer.resume(state) == RunState(0, 1, 4)
        assert same_bits(weights(state.model), on_disk(out / "epoch-0_step-1" / "modeling"))
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
    assert not list((out / ".shardpoint").rglob("attempt-*"))


def checks() -> dict[str, Callable[[Path], None]]:
    """Return the checks by name."""
    return {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}


def main() -> None:
    global RANK  # noqa: PLW0603 - the checks are functions of the rank that runs them
    out, wanted = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    if wanted in (["kill"], ["resume"]):
        with patch.object(small, "MAX_TENSOR_BYTES", 0):
            (kill_in_a_write if wanted == ["kill"] else resume_after_the_kill)(out)
        print("{}")  # noqa: T201 - the test reads it
        dist.destroy_process_group()
        return
    run_and_report({name: checks()[name] for name in wanted}, lambda name: out if name == "reshaped" else out / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
