"""How gradients are clipped by their norm, whatever their parameters are spread over.

torch's `clip_grad_norm_` raises where plain and sharded gradients, or gradients on two meshes, come together (tensor
parallelism). Here each rank adds up what it holds; sums of sharded gradients are reduced over the axes that cut them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from shardpoint.errors import UsageError

_Cut = tuple[DeviceMesh, tuple[int, ...]]  # a mesh, and those of its axes that cut a gradient

_clipped: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale gradients in place so that their common norm is at most `max_norm`.

    Args:
        parameters: plain or DTensors, on any meshes; those without a gradient are left out.
        max_norm: the greatest norm.
        norm_type: p of the p-norm, `inf` for the greatest absolute value.

    Returns:
        The norm before clipping, a plain 0-dim tensor, equal on all ranks that hold the same plain gradients.

    Raises:
        UsageError: `max_norm` or `norm_type` is not positive.

    Collective:
        Every rank of the gradients' meshes: one reduction for each axis of each way in which gradients are cut.
    """
    check_norm(max_norm, norm_type)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    sums: dict[_Cut | None, list[torch.Tensor]] = {}
    locals_: list[torch.Tensor] = []
    for gradient in gradients:
        local, cut = reduced(gradient)
        locals_.append(local)
        sums.setdefault(cut, []).append(_norm(local, norm_type))
    device = locals_[0].device
    parts = [_joint_norm(cut, torch.stack([n.to(device) for n in norms]), norm_type) for cut, norms in sums.items()]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts), norm_type)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for local in locals_:
        local.mul_(scale.to(local.device, local.dtype))
    return total


def check_norm(max_norm: float, norm_type: float) -> None:
    """Check what to clip to.

    Raises:
        UsageError: one of the two is not positive.
    """
    if not max_norm > 0 or not norm_type > 0:
        raise UsageError(f"max_norm={max_norm} and norm_type={norm_type} must both be positive")


def clip_before_steps(optimizer: Optimizer, max_norm: float, norm_type: float) -> None:
    """Clip the optimizer's gradients before each of its steps, from now on; a second call changes nothing."""
    if optimizer in _clipped:
        return
    _clipped.add(optimizer)

    def clip(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in [*args[1:], kwargs.get("closure")]):
            raise UsageError(
                "max_norm clips before a step, and a closure computes its gradients in the step: step without one, or "
                "leave max_norm out and clip in the closure (booster.clip_grad_norm_)"
            )
        clip_grad_norm_([p for group in stepped.param_groups for p in group["params"]], max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


def reduced(gradient: torch.Tensor) -> tuple[torch.Tensor, _Cut | None]:
    """Return what this rank holds of a gradient, sharing its memory, and what cuts it."""
    if not isinstance(gradient, DTensor):
        return gradient, None
    cut = tuple(axis for axis, placement in enumerate(gradient.placements) if not isinstance(placement, Replicate))
    if any(placement.is_partial() for placement in gradient.placements):
        raise UsageError("a gradient is not reduced yet (it is Partial): clip after the backward that synchronises it")
    return gradient.to_local(), (gradient.device_mesh, cut)


def _norm(local: torch.Tensor, norm_type: float) -> torch.Tensor:
    dtype = torch.float64 if local.dtype == torch.float64 else torch.float32
    if not local.numel():
        return torch.zeros((), dtype=dtype, device=local.device)
    norm: torch.Tensor = torch.linalg.vector_norm(local, norm_type, dtype=dtype)
    return norm


def _joint_norm(cut: _Cut | None, norms: torch.Tensor, norm_type: float) -> torch.Tensor:
    """Return the norm of all gradients that are cut alike, from this rank's norms of its parts of them."""
    if cut is None or not cut[1]:
        whole: torch.Tensor = torch.linalg.vector_norm(norms, norm_type)
        return whole
    mesh, axes = cut
    largest = math.isinf(norm_type)
    joint = norms.max() if largest else norms.pow(norm_type).sum()
    for axis in axes:
        dist.all_reduce(joint, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(axis))
    return joint if largest else joint.pow(1.0 / norm_type)
