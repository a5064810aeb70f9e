"""Where a model is, and how it comes to be the same on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardpoint.booster import repoint
from shardpoint.errors import UsageError

_BROADCAST_BYTES = 256 * 1024 * 1024


def move(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> None:
    """Move a model, and an optimizer's state with it.

    Raises:
        UsageError: the optimizer is not the model's.
    """
    names = None if optimizer is None else repoint.optimized_names(model, optimizer)
    if all(tensor.device == device for tensor in [*model.parameters(), *model.buffers()]):
        return
    model.to(device)
    if optimizer is not None and names is not None:
        repoint.repoint(model, optimizer, names)


def where_it_is(model: nn.Module, requested: str | torch.device | None) -> torch.device | None:
    """Return the accelerator that the user has already put the model on, if nothing else was asked for."""
    if requested is not None:
        return None
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return device if device.type not in {"cpu", "meta"} else None


@torch.no_grad()
def broadcast_states(model: nn.Module, groups: list[dist.ProcessGroup | None]) -> None:
    """Give every rank the parameters and buffers of the first, one axis of the mesh after the other."""
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if not groups or id(tensor) in seen or tensor.is_meta or isinstance(tensor, DTensor) or not tensor.numel():
            continue
        seen.add(id(tensor))
        whole = tensor.detach().contiguous()
        # As bytes: gloo refuses fp8, int16 and uint16.
        for part in whole.view(-1).view(torch.uint8).split(_BROADCAST_BYTES):
            for group in groups:
                _broadcast(part, group)
        if whole.data_ptr() != tensor.data_ptr() and not torch.equal(whole, tensor):
            tensor.copy_(whole)


def _broadcast(part: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    backends = dist.get_backend_config(group)
    if f"{part.device.type}:" in backends:
        dist.broadcast(part, group=group, group_src=0)
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise UsageError(
            f"the process group ({backends}) cannot move tensors of {part.device}: use gloo, or move the model"
        )
    there = part.to(accelerator)
    dist.broadcast(there, group=group, group_src=0)
    part.copy_(there)
