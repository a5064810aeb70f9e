"""What do tests that save and resume train, and how do they look at the result without the code under test?"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95)),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adamw_foreach_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width + 3)
        self.outer = nn.Linear(width + 3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.outer(torch.tanh(self.inner(x)))
        return x + inner


class Net(nn.Module):
    """Sizes that two ranks cannot halve, a frozen parameter, one that is never used, and buffers of both kinds."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.module = nn.ModuleList([Block(width), Block(width)])  # a user's own submodule of that name
        self.head = nn.Linear(width, 1)
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.module:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Train on data that depends on the step alone; return the losses."""
    losses = []
    for step in steps:
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# What gloo cannot send, and what of the same size it can.
_SENT_AS = {
    torch.uint16: torch.float16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor by torch itself."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor) and tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)  # torch fails to gather one that has rows
    if isinstance(tensor, DTensor) and tensor.dtype in _SENT_AS:
        kind = _SENT_AS[tensor.dtype]
        shape: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride()}
        sent = DTensor.from_local(tensor.to_local().view(kind), tensor.device_mesh, tensor.placements, **shape)
        return sent.full_tensor().view(tensor.dtype)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict, whole, with its own names (a DDP's `module.` removed)."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {name: whole(tensor) for name, tensor in inner.state_dict().items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state, whole: `<parameter>.<state>` -> tensor; `step` included."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found: dict[str, torch.Tensor] = {}
    for name, parameter in inner.named_parameters():
        for state, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{state}"] = whole(value)
    return found


def on_disk(directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read every safetensors file of a directory by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                assert name not in found, f"{name} is in two files"
                found[name] = file.get_tensor(name)
    return found


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Compare names, dtypes, shapes and bytes (NaN equals NaN)."""
    if first.keys() != second.keys():
        raise AssertionError(f"different names: {sorted(first.keys() ^ second.keys())}")
    return all(first[name].dtype == second[name].dtype and bits(first[name]) == bits(second[name]) for name in first)


def bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    """Return a tensor's shape and bytes."""
    tensor = whole(tensor).resolve_conj().contiguous()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def flip(path: Path, position: int | None = None) -> None:
    """Flip one bit of a file, by default in its last byte."""
    data = bytearray(path.read_bytes())
    data[len(data) - 1 if position is None else position] ^= 0x10
    path.write_bytes(bytes(data))
