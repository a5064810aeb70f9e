"""Parameters of every dtype, shape and name that torch takes; under one process, DDP and FSDP2, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardpoint import Checkpointer, TrainState
from tests.training import on_disk, optimizer_state, same_bits, weights

NUM_STEPS = 3

# By group, since FSDP2 wants one dtype among the trainable parameters that it shards together.
TRAINED: dict[str, dict[str, torch.Tensor]] = {
    "singles": {
        "1st": torch.linspace(1, 2, 15).reshape(5, 3),
        "a/b": torch.linspace(-2, -1, 3),
        "with space": torch.ones(1, 2),
        "naïve-名": torch.ones(3, 1) * 3,
        "'q\"u\\o": torch.ones(2),
        "tab\tand\nline": torch.ones(3) * 2,
        "~0#1": torch.ones(1),
        "😀": torch.ones(2, 2),
        "caf\u00e9": torch.ones(2) * 5,
        "cafe\u0301": torch.ones(2) * 6,  # looks the same and is another name
        "nul\0": torch.ones(3),
        " ": torch.ones(1) * 7,
    },
    "f16": {"weight": torch.linspace(1, 2, 6).half().reshape(3, 2)},
    "f64": {"weight": torch.linspace(1, 2, 5, dtype=torch.float64)},
    "c64": {"weight": torch.complex(torch.linspace(1, 2, 6), torch.linspace(-2, 3, 6)).reshape(3, 2)},
    "c128": {"weight": torch.complex(*torch.linspace(1, 2, 12, dtype=torch.float64).reshape(2, 3, 2))},
}
FIXED: dict[str, torch.Tensor] = {
    "int8": torch.arange(-3, 4, dtype=torch.int8),
    "int64": torch.tensor([[2**62 + 1], [-(2**63)], [-1]]),
    "flag": torch.tensor([True, False, True]),
    "uint8": torch.arange(250, 256, dtype=torch.uint8).reshape(3, 2),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "c64": torch.tensor([1 + 2j, -3j, 7.5]),
    "c128": torch.tensor([[1 + 2j, 1e-300j], [-3j, 4]], dtype=torch.complex128),
    "none": torch.empty(0, 2, dtype=torch.int8),
    "no_columns": torch.empty(4, 0),
} | {
    name: torch.tensor([0.5, 1.0, 2.0, 0.25, 4.0]).to(dtype)
    for name, dtype in {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e4m3fnuz": torch.float8_e4m3fnuz,
        "e8m0": torch.float8_e8m0fnu,
    }.items()
}
NO_GLOO = ("uint16", "e4m3", "e5m2", "e4m3fnuz", "e8m0")  # DDP cannot send these
# What FSDP2 refuses: 0-dim ones, those with strides, and to train what has no elements. They stay plain.
REFUSED: dict[str, torch.Tensor] = {
    "none": torch.empty(0, 3),
    "no_columns": torch.empty(4, 0),
    "scalar": torch.tensor(1.5),
    "c64_scalar": torch.tensor(1.5 - 2j),
    "turned": torch.linspace(1, 2, 12).reshape(3, 4).t(),
    "c128_turned": torch.complex(*torch.linspace(1, 2, 12, dtype=torch.float64).reshape(2, 2, 3)).t(),
    "sparse_columns": torch.linspace(1, 2, 12).reshape(3, 4)[:, ::2],
}
REFUSED_FIXED = {"flag_scalar": torch.tensor(True), "e4m3_turned": torch.ones(2, 3).to(torch.float8_e4m3fn).t()}


class Group(nn.Module):
    """Parameters, with strides as the given tensors have them; with `blank`, all zeros."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, trained: bool, blank: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            value = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
            self.register_parameter(name, nn.Parameter(value.zero_() if blank else value, requires_grad=trained))

    def forward(self, scale: float) -> torch.Tensor:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.stack([((one * scale).abs() + 0.5).square().sum().double() for one in trained]).sum()


class Awkward(nn.Module):
    def __init__(self, *, blank: bool) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({name: Group(TRAINED[name], trained=True, blank=blank) for name in TRAINED})
        self.refused = Group(REFUSED, trained=True, blank=blank)
        self.fixed = Group(FIXED, trained=False, blank=blank)
        self.refused_fixed = Group(REFUSED_FIXED, trained=False, blank=blank)

    def forward(self, scale: float) -> torch.Tensor:
        return torch.stack([group(scale) for group in (*self.trained.values(), self.refused)]).sum()


def made(how: str, *, blank: bool = False) -> TrainState:
    """Return the model, wrapped, and its optimizer."""
    model: nn.Module = Awkward(blank=blank)
    if how == "ddp":
        kind: Any = nn.parallel.DistributedDataParallel
        ignored = [f"fixed.{name}" for name in NO_GLOO] + ["refused_fixed.e4m3_turned"]
        kind._set_params_and_buffers_to_ignore_for_model(model, ignored)
        model = kind(model)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for group in (*model.get_submodule("trained").children(), model.get_submodule("fixed")):
            fully_shard(group, mesh=mesh)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True))


def trained(state: TrainState, steps: range) -> list[float]:
    assert state.optimizer is not None
    losses = []
    for number in steps:
        loss = state.model(1 + number / 8)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    states = optimizer_state(state.model, state.optimizer)
    return weights(state.model) | {f"optimizer/{name}": value for name, value in states.items()}


def stored_form(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what of it lies in tensor files, as it lies there: without 0-dim states, wide complex ones as pairs."""
    found = {name: value for name, value in values.items() if value.dim() or not name.startswith("optimizer/")}
    return {
        name: torch.view_as_real(value) if value.dtype is torch.complex128 else value for name, value in found.items()
    }


def on_disk_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    states = on_disk(checkpoint / "optimizer")
    return on_disk(checkpoint / "modeling") | {f"optimizer/{name}": value for name, value in states.items()}


def save_first(out: Path) -> None:
    """Save as one process, after three steps, to `plain-3`."""
    state = made("plain")
    trained(state, range(NUM_STEPS))
    with Checkpointer(out / f"plain-{NUM_STEPS}") as checkpointer:
        checkpointer.save(state, epoch=0, step=NUM_STEPS, batch_size=1)
    assert same_bits(
        on_disk_in(out / f"plain-{NUM_STEPS}" / f"epoch-0_step-{NUM_STEPS}"), stored_form(everything(state))
    )


def go_on(out: Path, how: str, source: str) -> None:
    """Resume `<how>-<steps>`, compare with a run that never stopped, train three more steps, and save likewise."""
    start = int(source.rpartition("-")[2])
    reference, state = made("plain"), made(how, blank=True)
    trained(reference, range(start))
    with Checkpointer(out / source) as checkpointer:
        assert checkpointer.resume(state) is not None
    assert same_bits(everything(state), everything(reference))
    stop = start + NUM_STEPS
    assert trained(state, range(start, stop)) == trained(reference, range(start, stop))
    assert same_bits(everything(state), everything(reference))
    with Checkpointer(out / f"{how}-{stop}") as checkpointer:
        checkpointer.save(state, epoch=0, step=stop, batch_size=1)
    assert same_bits(on_disk_in(out / f"{how}-{stop}" / f"epoch-0_step-{stop}"), stored_form(everything(reference)))
