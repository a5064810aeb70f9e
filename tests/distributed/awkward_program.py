"""What two ranks check of awkward tensors and optimizers; started by `test_awkward.py`, all checks in one launch."""

from __future__ import annotations

import sys
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

from shardpoint import Checkpointer, TrainState
from shardpoint.booster import Booster, TorchFSDPPlugin
from shardpoint.errors import MismatchError, UsageError
from tests.distributed import awkward_parameters
from tests.distributed.reporting import run_and_report
from tests.optimizers import Masters, Nested
from tests.training import bits, net, on_disk, optimizer_state, same_bits, train, weights, whole


def buffers() -> dict[str, torch.Tensor]:
    """Return one buffer of each kind."""
    return {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "turned": torch.arange(12.0).reshape(3, 4).t(),
        "int8": torch.arange(5, dtype=torch.int8),
        "int64": torch.tensor([2**62 + 1, -1]),
        "flag": torch.tensor([True, False, True]),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "f16": torch.arange(3).half(),
        "c64": torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)),
        "c128": torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(2)),
        "c32": torch.arange(3).to(torch.complex32),
    } | {
        name: torch.tensor([0.5, 1.0, 2.0]).to(dtype)
        for name, dtype in {
            "e4m3": torch.float8_e4m3fn,
            "e5m2": torch.float8_e5m2,
            "e4m3fnuz": torch.float8_e4m3fnuz,
            "e5m2fnuz": torch.float8_e5m2fnuz,
            "e8m0": torch.float8_e8m0fnu,
        }.items()
    }


ODD_NAMES = ["a/b", "naïve-名", "q\"uo'te", "x" * 150, "with space", "#~0", "weight_orig"]


class Awkward(nn.Module):
    """251 rows, tied; rows that only rank 0 gets; odd names; frozen parameters; buffers of every kind."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(251, 7, dtype=dtype)
        self.one_row = nn.Linear(7, 1, dtype=dtype)
        self.no_rows = nn.Linear(7, 0, dtype=dtype)
        for number, name in enumerate(ODD_NAMES):
            self.register_parameter(name, nn.Parameter(torch.randn(2 * number + 1, 3, dtype=dtype)))
        self.frozen = nn.Parameter(torch.randn(5, 2, dtype=dtype), requires_grad=False)
        self.head = nn.Linear(7, 251, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        for name, tensor in buffers().items():
            self.register_buffer(name, tensor.clone() if seed == 0 else torch.zeros_like(tensor))
        self.register_buffer("scratch", torch.full((3,), float(seed)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        odd = sum(self.get_parameter(name).square().sum() for name in ODD_NAMES)
        out: torch.Tensor = self.head(hidden).square().mean() + self.one_row(hidden).mean() + odd
        return out


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for number in steps:
        loss = model(torch.arange(number, number + 9))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def wrapped(how: str, model: nn.Module, **how_sharded: Any) -> nn.Module:
    if how == "fsdp":
        # buffers stay plain: FSDP2 shards parameters only.
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **how_sharded)
        return model
    if how == "ddp":
        kind: Any = nn.parallel.DistributedDataParallel
        kind._set_params_and_buffers_to_ignore_for_model(model, list(buffers()))  # gloo refuses fp8 and uint16
        ddp: nn.Module = kind(model, find_unused_parameters=True)
        return ddp
    return model


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what torch gathers, as the format stores it: tied weights once, complex128 and complex32 as pairs."""
    found = {name: tensor for name, tensor in weights(model).items() if name != "head.weight"}
    pairs = (torch.complex128, torch.complex32)
    return {name: torch.view_as_real(t) if t.dtype in pairs else t for name, t in found.items()}


def _awkward(out: Path, how: str) -> None:
    one, two = wrapped(how, Awkward(0)), wrapped(how, Awkward(5))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in (one, two)]
    stepped(one, optimizers[0], range(2))
    if how == "fsdp":
        shards = [p.to_local().numel() for p in one.parameters() if isinstance(p, DTensor)]
        assert dist.get_rank() == 0 or 0 in shards, "a rank is expected to hold nothing of a tensor"
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=one, optimizer=optimizers[0]), epoch=0, step=2, batch_size=4)
        assert same_bits(on_disk(out / "epoch-0_step-2" / "modeling"), gathered(one))
        stored = {k: v for k, v in optimizer_state(one, optimizers[0]).items() if v.dim()}
        assert same_bits(on_disk(out / "epoch-0_step-2" / "optimizer"), stored)
        checkpointer.resume(TrainState(model=two, optimizer=optimizers[1]))
    assert same_bits(gathered(two), gathered(one))
    inner: Any = two.module if how == "ddp" else two
    assert inner.head.weight is inner.embed.weight
    assert inner.scratch.tolist() == [5.0] * 3, "a buffer that is not persistent is left alone"
    assert stepped(one, optimizers[0], range(2, 5)) == stepped(two, optimizers[1], range(2, 5))
    assert same_bits(gathered(two), gathered(one))


def check_awkward_tensors_under_fsdp(out: Path) -> None:
    _awkward(out, "fsdp")


def check_awkward_tensors_under_ddp(out: Path) -> None:
    _awkward(out, "ddp")


def check_awkward_tensors_without_a_wrapper(out: Path) -> None:
    _awkward(out, "plain")


def check_conversion_of_shards(out: Path) -> None:
    one, two = wrapped("fsdp", Awkward(0)), wrapped("fsdp", Awkward(5, torch.bfloat16))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=one), epoch=0, step=1, batch_size=4)
        with pytest.raises(MismatchError):
            checkpointer.resume(TrainState(model=two))
        with pytest.raises(UsageError, match="differ between the ranks"):
            checkpointer.resume(TrainState(model=two), allow_cast=dist.get_rank() == 0)
        run = checkpointer.resume(TrainState(model=two), allow_cast=True)
    assert run is not None
    assert "modeling: embed.weight: F32 to BF16" in run.cast
    floats = {name for name, parameter in one.named_parameters() if parameter.dtype is torch.float32}
    assert len(run.cast) == len(floats)
    found, expected = gathered(two), gathered(one)
    assert same_bits(found, {k: v.bfloat16() if k in floats else v for k, v in expected.items()})


def _next_steps(out: Path, how: str, make: Any, dtype: torch.dtype = torch.float32, **how_sharded: Any) -> None:
    one, two = (wrapped(how, net(seed, dtype), **how_sharded) for seed in (0, 5))
    first, second = make(one.parameters()), make(two.parameters())
    train(one, first, range(3), dtype)
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=one, optimizer=first), epoch=0, step=3, batch_size=4)
        checkpointer.resume(TrainState(model=two, optimizer=second))
    assert train(one, first, range(3, 6), dtype) == train(two, second, range(3, 6), dtype)
    assert same_bits(weights(one), weights(two))
    if make is Nested:
        parameter = one.get_parameter("module.head.weight" if how == "ddp" else "head.weight")
        stored = on_disk(out / "epoch-0_step-3" / "optimizer")
        assert stored["head.weight.momenta/fast"].shape == parameter.shape


def check_nested_states(out: Path) -> None:
    for how in ("fsdp", "ddp"):
        _next_steps(out / how, how, Nested)


def check_nested_shards_are_stored_whole(out: Path) -> None:
    model = wrapped("fsdp", net(0))
    optimizer = Nested(model.parameters())
    train(model, optimizer, range(3))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=3, batch_size=4)
    stored = on_disk(out / "epoch-0_step-3" / "optimizer")
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            assert bits(stored[f"{name}.momenta/fast"]) == bits(state["momenta"]["fast"])
            assert bits(stored[f"{name}.history/1"]) == bits(state["history"][1])


def check_nested_states_behind_the_training(out: Path) -> None:
    for how in ("fsdp", "ddp"):
        one, two = (wrapped(how, wide(seed)) for seed in (0, 5))
        first, second = Nested(one.parameters()), Nested(two.parameters())
        expected = {}
        with Checkpointer(out / how, async_save=True) as checkpointer:
            for step in range(1, 4):
                train(one, first, range(step - 1, step))
                expected[step] = nested_state(one, first)
                checkpointer.save(TrainState(model=one, optimizer=first), epoch=0, step=step, batch_size=4)
        for step, values in expected.items():
            assert same_bits(on_disk(out / how / f"epoch-0_step-{step}" / "optimizer"), values)
        with Checkpointer(out / how) as checkpointer:
            checkpointer.resume(TrainState(model=two, optimizer=second))
        assert train(one, first, range(3, 6)) == train(two, second, range(3, 6))


def wide(seed: int) -> nn.Module:
    """Return a model with tensors that a save behind the training does not copy at once."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 301), nn.Linear(301, 301), nn.Linear(301, 1))


def nested_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return what `Nested` keeps, whole, as it is called on disk."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found: dict[str, torch.Tensor] = {}
    for name, parameter in inner.named_parameters():
        state = optimizer.state[parameter]
        momenta = state["momenta"]
        found |= {f"{name}.history/{number}": whole(one) for number, one in enumerate(state["history"])}
        found |= {
            f"{name}.momenta/fast": whole(momenta["fast"]),
            f"{name}.momenta/slow~1~0~2": whole(momenta["slow/~#"]),
        }
        found |= {f"{name}.momenta/#3/deep": whole(momenta[3]["deep"]), f"{name}.a~1b": whole(state["a/b"])}
    return found


def check_a_nested_optimizer_that_has_stepped_is_sharded_along(out: Path) -> None:
    model, oracle = net(0), net(0)
    optimizer, oracle_optimizer = Nested(model.parameters()), Nested(oracle.parameters())
    for each in ((model, optimizer), (oracle, oracle_optimizer)):
        train(*each, range(3))
    Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert isinstance(optimizer.state[model.head.weight]["history"][1], DTensor)
    assert train(model, optimizer, range(3, 6)) == train(oracle, oracle_optimizer, range(3, 6))
    assert same_bits(weights(model), weights(oracle))
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=6, batch_size=4)
    stored = on_disk(out / "epoch-0_step-6" / "optimizer")
    momentum = oracle_optimizer.state[oracle.head.weight]["momenta"]["slow/~#"]
    assert bits(stored["head.weight.momenta/slow~1~0~2"]) == bits(momentum)


def check_groups_of_shards_reordered_and_added(out: Path) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = {name: one for name, one in model.named_parameters() if not name.startswith("new")}
        flat = [one for one in named.values() if one.dim() == 1]
        rest = [one for one in named.values() if one.dim() > 1]
        return [{"params": rest, "weight_decay": 0.1, "lr": 0.02}, {"params": flat, "betas": (0.5, 0.75)}]

    one, two = net(0), net(5)
    two.new_rows = nn.Parameter(torch.ones(3, 2))
    two.new_alone = nn.Parameter(torch.ones(5))
    for model in (one, two):
        wrapped("fsdp", model)
    first = torch.optim.AdamW(groups(one), lr=0.05)
    train(one, first, range(3))
    turned = [group | {"params": group["params"][::-1], "lr": 7.0, "weight_decay": 7.0} for group in groups(two)[::-1]]
    turned[0]["params"].insert(1, two.new_alone)
    second = torch.optim.AdamW([*turned, {"params": [two.new_rows], "lr": 0.3}])
    with Checkpointer(out) as checkpointer:
        checkpointer.save(TrainState(model=one, optimizer=first), epoch=0, step=3, batch_size=4)
        with pytest.raises(MismatchError, match="new_alone"):
            checkpointer.resume(TrainState(model=two, optimizer=second))
        run = checkpointer.resume(TrainState(model=two, optimizer=second), allow_missing=["new*"])
    assert run is not None
    assert {line.split(": ")[1].split()[0] for line in run.missing} == {"new_rows", "new_alone"}
    assert [(group["lr"], group["weight_decay"]) for group in second.param_groups] == [
        (0.05, 0.01),
        (0.02, 0.1),
        (0.3, 0.01),
    ]
    assert second.param_groups[0]["betas"] == (0.5, 0.75)
    assert same_bits(optimizer_state(two, second), optimizer_state(one, first))
    assert train(one, first, range(3, 6)) == train(two, second, range(3, 6))
    found = weights(two)
    assert torch.equal(found.pop("new_rows"), torch.ones(3, 2))
    assert torch.equal(found.pop("new_alone"), torch.ones(5))
    assert same_bits(found, weights(one))


def check_fused_and_foreach_into_one_another(out: Path) -> None:
    for how in ("fsdp", "ddp"):
        for saved, live in (("fused", "foreach"), ("foreach", "fused")):
            place = out / f"{how}-{saved}"
            one, two = wrapped(how, net(0)), wrapped(how, net(5))
            first = torch.optim.AdamW(one.parameters(), lr=0.05, **{saved: True})  # type: ignore[arg-type]
            second = torch.optim.AdamW(two.parameters(), lr=0.05, **{live: True})  # type: ignore[arg-type]
            train(one, first, range(3))
            with Checkpointer(place) as checkpointer:
                checkpointer.save(TrainState(model=one, optimizer=first), epoch=0, step=3, batch_size=4)
                checkpointer.resume(TrainState(model=two, optimizer=second))
            assert same_bits(optimizer_state(two, second), optimizer_state(one, first))
            assert (second.param_groups[0][live], second.param_groups[0][saved]) == (True, None)
            # The oracle carries the saved optimizer's very states out the other way; the two ways may round otherwise.
            oracle = torch.optim.AdamW(one.parameters(), lr=0.05, **{live: True})  # type: ignore[arg-type]
            for parameter, state in first.state.items():
                oracle.state[parameter] = state
            assert train(one, oracle, range(3, 6)) == train(two, second, range(3, 6))
            assert same_bits(weights(two), weights(one))


def check_masters(out: Path) -> None:
    for how in ("fsdp", "ddp"):
        _next_steps(out / how, how, Masters, torch.bfloat16)


def check_mixed_precision(out: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _next_steps(out, "fsdp", lambda p: torch.optim.AdamW(p, lr=0.05), mp_policy=policy)


def check_adafactor_under_ddp(out: Path) -> None:
    _next_steps(out, "ddp", lambda p: torch.optim.Adafactor(p, lr=0.05))


def check_parameters_of_one_process_under_ddp(out: Path) -> None:
    awkward_parameters.go_on(out.parent / "parameters", "ddp", "plain-3")


def check_parameters_of_ddp_under_fsdp(out: Path) -> None:
    awkward_parameters.go_on(out.parent / "parameters", "fsdp", "ddp-6")


def check_parameters_of_fsdp_under_ddp(out: Path) -> None:
    awkward_parameters.go_on(out.parent / "parameters", "ddp", "fsdp-9")


def checks() -> dict[str, Callable[[Path], None]]:
    """Return the checks by name."""
    return {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run_and_report(checks(), lambda name: Path(sys.argv[1]) / name)
    dist.destroy_process_group()
