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
from shardpoint.errors import MismatchError, UsageError
from tests.distributed import awkward_parameters
from tests.distributed.reporting import run_and_report
from tests.optimizers import Masters, Nested
from tests.training import bits, net, on_disk, optimizer_state, same_bits, train, weights


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
