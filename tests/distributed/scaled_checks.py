"""What ranks check of training in fp16 and of grad scalers; run by `hybrid_program.py`, in its pool.

The oracle of a step is torch's own: FSDP2 with `torch.amp.GradScaler`; that of a resume is the run that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from shardpoint import Booster, Checkpointer, DistCoordinator, TrainState, load_checkpoint, save_checkpoint
from shardpoint.booster import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from shardpoint.errors import MismatchError, UsageError
from tests.training import bits, whole

SCALING: dict[str, Any] = {"precision": "fp16", "initial_scale": 2.0**12, "growth_interval": 3}
MADE: dict[str, Callable[[], Booster]] = {
    "zero": lambda: Booster(plugin=LowLevelZeroPlugin(stage=2, **SCALING)),
    "gemini": lambda: Booster(plugin=GeminiPlugin(max_norm=0.1, **SCALING)),
    "hybrid": lambda: Booster(plugin=HybridParallelPlugin(tp_size=2, max_norm=0.1, **SCALING)),
    "ddp": lambda: Booster(plugin=TorchDDPPlugin(), mixed_precision="fp16"),
}
# log2 of the scale after each step; the checkpoint is saved after the third
SCALES = {
    "zero": [12, 12, 12, 12, 11, 11, 11, 12, 12],
    "gemini": [12, 12, 12, 12, 13, 13, 13, 14, 14],  # the fifth step is taken: the growth that began goes on
    "hybrid": [12, 12, 12, 12, 11, 11, 11, 12, 12],
    "ddp": [16, 15, 15, 15, 14, 14, 14, 14, 14],  # as torch's GradScaler: no hysteresis
}


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=40, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=251, head_dim=10, tie_word_embeddings=True)  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def loss_of(model: nn.Module, step: int, part: int) -> torch.Tensor:
    ids = torch.randint(0, 251, (2, 6), generator=torch.Generator().manual_seed(100 * step + part))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def overflow_on_the_last_rank(model: nn.Module) -> None:
    """Make one gradient infinite on one rank only, in what that rank alone holds where the model is sharded."""
    if dist.get_rank() == dist.get_world_size() - 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                if local.numel():
                    local.view(-1)[0] = math.inf
                    return


def by_rank(value: object) -> list[Any]:
    """Return every rank's value: an assertion over them fails on all ranks, so that none waits for another."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = {name: bits(whole(parameter)) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = bits(whole(value))
    return found


def check_fp16_steps_as_torchs_grad_scaler() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    model = llama(0)
    for module in [*model.model.layers, model]:  # type: ignore[union-attr, misc]
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    booster, own = Booster(plugin=LowLevelZeroPlugin(hysteresis=1, **SCALING)), llama(0)
    own_optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)
    booster.boost(own, own_optimizer)
    scales = []
    for step in range(9):
        loss, own_loss = loss_of(model, step, dist.get_rank()), loss_of(own, step, dist.get_rank())
        assert own_loss.item() == loss.item()
        scaler.scale(loss).backward()
        booster.backward(own_loss, own_optimizer)
        if step in {1, 2}:
            overflow_on_the_last_rank(model)
            overflow_on_the_last_rank(own)
        scaler.step(optimizer)
        scaler.update()
        own_optimizer.step()
        optimizer.zero_grad()
        own_optimizer.zero_grad()
        scales.append(booster.loss_scale(own_optimizer))
        assert by_rank(scales[-1]) == [scaler.get_scale()] * dist.get_world_size()
    assert everything(own, own_optimizer) == everything(model, optimizer)
    assert scales == [2.0**power for power in (12, 11, 10, 10, 10, 11, 11, 11, 12)]


def check_fp16_resumes_as_if_it_had_never_stopped() -> None:
    for name, make in MADE.items():
        if name != "hybrid" and dist.get_world_size() > 2:
            continue  # only there is FSDP2 over the tensor parallelism; all are tried on two
        part = dist.get_rank() // 2 if name == "hybrid" else dist.get_rank()
        root = shared_folder(f"fp16-{name}")

        def life(seed: int, make: Callable[[], Booster] = make) -> Any:
            model, booster = llama(seed), make()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            model, *_ = booster.boost(model, optimizer, lr_scheduler=scheduler)
            return booster, model, optimizer, scheduler

        def go_on(lived: Any, steps: range, part: int = part, name: str = name) -> list[float]:
            booster, model, optimizer, scheduler = lived
            scales = []
            for step in steps:
                booster.backward(loss_of(model, step, part), optimizer)
                left_out = step == 1 or (step == 4 and name != "gemini")
                before = everything(model, optimizer) if step in {1, 4} else None
                if left_out:
                    overflow_on_the_last_rank(model)
                optimizer.step()
                assert before is None or (everything(model, optimizer) == before) == left_out
                scheduler.step()
                optimizer.zero_grad()
                scales.append(booster.loss_scale(optimizer))
            return scales

        whole_life, resumed = life(0), life(1 + dist.get_rank())
        assert next(iter(whole_life[1].parameters())).dtype == torch.float32
        first = go_on(whole_life, range(3))
        booster, model, optimizer, scheduler = whole_life
        if name in {"zero", "ddp"}:
            save_checkpoint(root, booster, model, optimizer, scheduler, 0, 3, 4, DistCoordinator())
            load_checkpoint(Path(root) / "epoch-0_step-3", resumed[0], *resumed[1:])
        else:
            state = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler)
            with Checkpointer(root) as checkpointer:
                checkpointer.save(state, epoch=0, step=3, batch_size=4)
                checkpointer.resume(TrainState(model=resumed[1], optimizer=resumed[2], lr_scheduler=resumed[3]))
        then = go_on(whole_life, range(3, 9))
        assert go_on(resumed, range(3, 9)) == then
        assert everything(*resumed[1:3]) == everything(model, optimizer), name
        assert [math.log2(scale) for scale in first + then] == SCALES[name], name


def check_a_plain_grad_scaler_beside_ddp() -> None:
    root = shared_folder("plain-scaler")

    def made(scale: float) -> TrainState:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TrainState(
            model=model,
            optimizer=optimizer,
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3),
        )

    def go_on(state: TrainState, steps: range) -> None:
        assert state.optimizer is not None
        for step in steps:
            data = torch.full((1, 3), math.inf if step == 2 and dist.get_rank() == 1 else float(step + dist.get_rank()))
            state.grad_scaler.scale(state.model(data).sum()).backward()
            state.grad_scaler.step(state.optimizer)
            state.grad_scaler.update()
            state.optimizer.zero_grad()

    state, other = made(2.0**10), made(2.0 ** (3 + dist.get_rank()))
    go_on(state, range(4))
    assert state.grad_scaler.get_scale() == 2.0**9
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=4, batch_size=2)
        checkpointer.resume(other)
        assert other.grad_scaler.state_dict() == state.grad_scaler.state_dict()
        go_on(state, range(4, 7))
        go_on(other, range(4, 7))
        found = by_rank(other.grad_scaler.state_dict())
        assert found == [state.grad_scaler.state_dict()] * dist.get_world_size()
        assert found[0]["scale"] == 2.0**10
        assert bits(other.model.module.weight) == bits(state.model.module.weight)  # type: ignore[arg-type, union-attr]
        if dist.get_rank() == 1:
            other.grad_scaler.update(2.0)
        with pytest.raises(UsageError, match=r"grad_scaler\.json"):
            checkpointer.save(other, epoch=0, step=7, batch_size=2)
        with pytest.raises(MismatchError, match=r"grad_scaler\.json"):
            checkpointer.resume(TrainState(model=other.model, optimizer=other.optimizer))


OUT = Path()


def shared_folder(name: str) -> str:
    """Return a directory of rank 0's for the ranks that are there."""
    place = [str(OUT / f"{name}{dist.get_world_size()}") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place)
    return place[0]
