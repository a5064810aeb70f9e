"""What ranks check of tensor parallelism and of ZeRO's names; started by `test_hybrid.py`, all in one pool."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shardpoint import Booster, Checkpointer, TrainState
from shardpoint.booster import (
    GeminiPlugin,
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    Plugin,
    TorchDDPPlugin,
    TorchFSDPPlugin,
)
from shardpoint.errors import UsageError
from tests.distributed import scaled_checks
from tests.distributed.reshard_program import Pool, attempt
from tests.distributed.scaled_checks import shared_folder
from tests.training import bits, on_disk, whole

SIZES: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 54, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 251, "head_dim": 10}  # fmt: skip


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**(SIZES | {"tie_word_embeddings": True} | changes)))
    return model


def qwen(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, 10))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, untied": lambda: llama(tie_word_embeddings=False),
    "qwen3, whose norms see heads": qwen,
}


def loss_of(model: nn.Module, part: int = 0, num_parts: int = 1) -> torch.Tensor:
    ids = torch.randint(0, 251, (4, 6), generator=torch.Generator().manual_seed(3)).chunk(num_parts)[part]
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def boosted(model: nn.Module, plugin: Plugin, lr: float = 0.1) -> tuple[Any, torch.optim.Optimizer, Booster]:
    optimizer, booster = torch.optim.SGD(model.parameters(), lr=lr), Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    return model, optimizer, booster


def part() -> tuple[int, int]:
    """Return which part of the batch this rank of a `[.., 2]` mesh trains on, and of how many."""
    return dist.get_rank() // 2, dist.get_world_size() // 2


def same_on_all(tensor: torch.Tensor) -> None:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, bits(tensor))
    assert all(one == found[0] for one in found)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def check_gradients_are_those_of_one_process() -> None:
    for make in MODELS.values():
        alone = make()
        loss_of(alone).backward()
        model, optimizer, booster = boosted(make(), HybridParallelPlugin(tp_size=2, precision="fp32"))
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, *part())
            booster.backward(loss, optimizer)
        expected = gradients(alone)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor) or name.endswith("norm.weight"):
                assert parameter.grad is not None
                same_on_all(parameter.grad)
        for norm_type in (2.0, 1.0, float("inf")):
            largest = float(torch.nn.utils.get_total_norm(list(expected.values()), norm_type)) / 3
            total = booster.clip_grad_norm_(model, largest, norm_type)
            same_on_all(total)
            wanted = torch.nn.utils.clip_grad_norm_(alone.parameters(), largest, norm_type)
            torch.testing.assert_close(total, wanted, rtol=1e-5, atol=0)
            torch.testing.assert_close(gradients(model), gradients(alone), rtol=1e-4, atol=1e-6)


def check_max_norm_clips_in_each_step() -> None:
    zero = dist.get_world_size() > 2
    plugins: list[tuple[Plugin, tuple[int, int]]] = [
        (HybridParallelPlugin(tp_size=2, precision="fp32", max_norm=0.05), part()),
        (LowLevelZeroPlugin(precision="fp32", max_norm=0.05, extra_dp_size=2 if zero else 1),
         (dist.get_rank(), dist.get_world_size())),
        (GeminiPlugin(precision="fp32", max_norm=0.05), (dist.get_rank(), dist.get_world_size())),
    ]  # fmt: skip
    alone = llama()
    stepped = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(alone).backward()
        assert torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05) > 0.5
        stepped.step()
        stepped.zero_grad()
    for plugin, place in plugins:
        model, optimizer, booster = boosted(llama(), plugin)
        booster.boost(model, optimizer)
        assert len(optimizer._optimizer_step_pre_hooks) == 1, "boosting twice must not clip twice"
        for _ in range(2):
            booster.backward(loss_of(model, *place), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        found = {name: whole(parameter) for name, parameter in model.named_parameters()}
        torch.testing.assert_close(found, dict(alone.named_parameters()), rtol=1e-5, atol=1e-6)


def check_ranks_that_start_differently_train_one_model() -> None:
    for precision in ("fp32", "bf16"):
        model, _, _ = boosted(llama(dist.get_rank()), HybridParallelPlugin(tp_size=2, precision=precision))
        expected = llama(0)
        for name, parameter in model.named_parameters():
            assert bits(whole(parameter)) == bits(expected.get_parameter(name)), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        if dist.get_world_size() == 2:
            local = model.lm_head.weight.detach().to_local()
            assert local.untyped_storage().nbytes() == local.numel() * 4, "a rank keeps only its own part"


def check_precision_says_what_it_does() -> None:
    reference = loss_of(llama()).item()
    for plugin in (HybridParallelPlugin(tp_size=2), LowLevelZeroPlugin(), GeminiPlugin()):
        model, optimizer, booster = boosted(llama(), plugin)
        seen: list[torch.dtype] = []
        projection = model.model.layers[0].mlp.down_proj
        projection.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.dtype))
        loss = loss_of(model)
        booster.backward(loss, optimizer)
        assert seen == [torch.bfloat16]
        assert abs(loss.item() - reference) < 0.02 * reference
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        optimizer.step()
    model, _, _ = boosted(llama().bfloat16(), GeminiPlugin(master_weights=False))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def check_a_model_of_lower_precision_gets_master_weights() -> None:
    # Master weights made of the rounded ones, as an optimizer of ColossalAI makes them.
    for plugin in (lambda: HybridParallelPlugin(tp_size=2), LowLevelZeroPlugin, GeminiPlugin):
        runs = [boosted(made, plugin()) for made in (llama().bfloat16(), llama().bfloat16().float())]
        for model, optimizer, booster in runs:
            for _ in range(2):
                booster.backward(loss_of(model), optimizer)
                optimizer.step()
                optimizer.zero_grad()
            assert {p.dtype for p in model.parameters()} == {torch.float32}
        low, whole_one = (dict(model.named_parameters()) for model, _, _ in runs)
        assert all(bits(whole(low[name])) == bits(whole(whole_one[name])) for name in whole_one)
        assert any(not torch.equal(whole(one), whole(one).bfloat16().float()) for one in low.values())


def check_zero_keeps_what_gemini_frees() -> None:
    kept = {}
    for plugin in (LowLevelZeroPlugin(stage=2, precision="fp32"), GeminiPlugin(precision="fp32"),
                   GeminiPlugin(precision="fp32", shard_param_frac=0.0)):  # fmt: skip
        model, optimizer, booster = boosted(llama(), plugin)
        loss = loss_of(model)
        kept[plugin] = not isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
        booster.backward(loss, optimizer)
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    assert list(kept.values()) == [True, False, True]


def check_what_cannot_be_cut_is_left_alone() -> None:
    refused = {
        "num_attention_heads=9": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
        "num_key_value_heads=1": {"num_key_value_heads": 1},
        "gate_proj.weight": {"intermediate_size": 55},
    }
    for named, changes in refused.items():
        model = llama(**changes)
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        with pytest.raises(UsageError, match=named):
            boosted(model, HybridParallelPlugin(tp_size=2))
        assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(UsageError, match="does not divide the"):
        boosted(llama(), HybridParallelPlugin(tp_size=3))
    stepped = llama()
    optimizer = torch.optim.AdamW(stepped.parameters())
    loss_of(stepped).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UsageError, match="boost before the first step"):
        Booster(plugin=HybridParallelPlugin(tp_size=2)).boost(stepped, optimizer)
    boosted(llama(hidden_size=36, num_attention_heads=9, num_key_value_heads=3), HybridParallelPlugin(tp_size=1))


def check_steps_are_done_one_by_one_where_they_must() -> None:
    alone = dist.get_world_size() == 2
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    Booster(plugin=HybridParallelPlugin(tp_size=2)).boost(model, optimizer)
    assert optimizer.param_groups[0]["foreach"] is (False if alone else None)
    for choice in ("foreach", "fused"):
        model = llama()
        options: dict[str, Any] = {choice: True}
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        booster = Booster(plugin=HybridParallelPlugin(tp_size=2, precision="fp32"))
        if alone:
            with pytest.raises(UsageError, match=f"{choice}=True"):
                booster.boost(model, optimizer)
            continue
        booster.boost(model, optimizer)
        booster.backward(loss_of(model), optimizer)
        optimizer.step()


def check_no_sync_accumulates() -> None:
    model, optimizer, booster = boosted(llama(), HybridParallelPlugin(tp_size=2, precision="fp32"))
    once, once_optimizer, _ = boosted(llama(), HybridParallelPlugin(tp_size=2, precision="fp32"))
    with booster.no_sync(model, optimizer):
        booster.backward(loss_of(model, *part()), optimizer)
    booster.backward(loss_of(model, *part()), optimizer)
    (2 * loss_of(once, *part())).backward()
    assert once_optimizer is not optimizer
    torch.testing.assert_close(gradients(model), gradients(once), rtol=1e-5, atol=1e-6)


def check_a_save_behind_the_training_beside_clipping() -> None:
    root = shared_folder("async")
    model, optimizer, booster = boosted(llama(), HybridParallelPlugin(tp_size=2, precision="fp32", max_norm=0.05))
    with Checkpointer(root, async_save=True) as checkpointer:
        expected = {name: whole(parameter) for name, parameter in model.named_parameters()}
        pending = checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=1, batch_size=4)
        assert pending is not None
        booster.backward(loss_of(model, *part()), optimizer)
        optimizer.step()
        pending.result()
    found = on_disk(Path(root) / "epoch-0_step-1" / "modeling")
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in expected.items()}
    assert any(bits(whole(p)) != bits(expected[n]) for n, p in model.named_parameters())


def check_groups_say_who_trains_on_what() -> None:
    plugin = HybridParallelPlugin(tp_size=2, precision="fp32")
    with pytest.raises(UsageError, match="boost one before"):
        _ = plugin.dp_group
    boosted(llama(), plugin)
    assert plugin.dp_size == dist.get_world_size() // 2
    assert dist.get_rank(plugin.dp_group) == dist.get_rank() // 2
    assert dist.get_rank(plugin.tp_group) == dist.get_rank() % 2
    with pytest.raises(UsageError, match="bare model"):
        boosted(boosted(llama(), TorchFSDPPlugin())[0], HybridParallelPlugin(tp_size=2))


def seen_by_all(loader: Any, num_batches: int | None = None) -> list[list[list[int]]]:
    """Return the batches that each rank gets, by rank."""
    batches = [batch.tolist() for batch, _ in zip(loader, range(num_batches or 1000), strict=False)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, batches)
    return found


def check_loaders_share_data_out_by_the_layout() -> None:
    size = dist.get_world_size()
    data = torch.arange(24)
    dp = [list(range(share * 3, 24, 3 * (size // 2))) for share in range(size // 2)]
    expected = [[list(range(first, first + 3)) for first in dp[other // 2]] for other in range(size)]
    hybrid = HybridParallelPlugin(tp_size=2)
    assert seen_by_all(hybrid.prepare_dataloader(data, 3)) == expected
    boosted(llama(), hybrid)
    assert seen_by_all(hybrid.prepare_dataloader(data, 3, seed=3)) == expected
    with pytest.raises(UsageError, match="tp_size=3 does not divide"):
        HybridParallelPlugin(tp_size=3).prepare_dataloader(data, 3)
    every = [
        [[4 * step * size + 4 * other + i for i in range(4)] for step in range(24 // (4 * size))]
        for other in range(size)
    ]
    names = ("replicate", "shard")
    meshes = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=names)
    plugins: list[Plugin] = [TorchDDPPlugin(), TorchFSDPPlugin(), LowLevelZeroPlugin(), GeminiPlugin(),
                             TorchFSDPPlugin(mesh=meshes), TorchFSDPPlugin(hsdp_shape=(2, size // 2))]  # fmt: skip
    for plugin in plugins:
        assert seen_by_all(plugin.prepare_dataloader(data, 4, drop_last=True)) == every, plugin
    over_shards = seen_by_all(TorchFSDPPlugin(mesh=meshes["shard"]).prepare_dataloader(data, 6))
    assert over_shards == [
        [[12 * step + 6 * (other % 2) + i for i in range(6)] for step in range(2)] for other in range(size)
    ]


def check_a_loader_goes_on_to_the_sample_under_another_plugin() -> None:
    root, size, data = shared_folder("loader"), dist.get_world_size(), torch.arange(50)
    state = TrainState(model=nn.Linear(1, 1))

    def steps_of(loader: Any) -> list[set[int]]:
        """Return which samples the job sees in each step of the rest of an epoch."""
        by_rank = seen_by_all(loader)
        return [set().union(*(batches[step] for batches in by_rank)) for step in range(len(by_rank[0]))]

    whole_job: dict[str, Any] = {"shuffle": True, "seed": 5, "drop_last": True}
    first: Any = LowLevelZeroPlugin().prepare_dataloader(data, 8 // size, **whole_job)
    first.sampler.set_epoch(1)
    expected = steps_of(first)
    assert len(expected) == 6
    assert sum(map(len, expected)) == 48
    first.sampler.set_start_index(2 * 8)
    state.sampler = first.sampler
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=1, step=2, batch_size=8)
        second = HybridParallelPlugin(tp_size=2).prepare_dataloader(data, 16 // size, **whole_job)
        state.sampler = second.sampler
        assert checkpointer.resume(state) is not None
    assert steps_of(second) == expected[2:]


def checks() -> dict[str, Callable[[], None]]:
    """Return the checks by name."""
    found = globals() | vars(scaled_checks)
    return {name.removeprefix("check_"): value for name, value in found.items() if name.startswith("check_")}


def main() -> None:
    """Run every check on two ranks, where tensor parallelism is alone, and on four, where FSDP2 is over it."""
    scaled_checks.OUT = Path(sys.argv[1])
    torch.set_num_threads(1)
    pool, report = Pool(), dict[str, str]()
    for size in (2, 4):
        if pool.enter(size):
            for name, check in checks().items():
                attempt(report, f"{name} {size}", check)
        pool.leave()
    print(json.dumps(report), flush=True)  # noqa: T201 - the test reads it
    pool.meet("the end")


if __name__ == "__main__":
    main()
