"""The float32 parameters that an optimizer steps while the model computes in lower precision: its master weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from shardpoint.booster import launch
from shardpoint.booster.repoint import GroupNames
from shardpoint.errors import UsageError
from shardpoint.events import Event, log_event

LOW = frozenset((torch.bfloat16, torch.float16))


def check_low(plugin: object, model: nn.Module, instead: str) -> None:
    """Refuse trainable parameters of lower precision, where the plugin may not convert them.

    Raises:
        UsageError: there is one; `instead` is what to do.
    """
    for name, parameter in _low(model):
        raise UsageError(f"{type(plugin).__name__}: {name} is {parameter.dtype}, and needs master weights: {instead}")


def check_unstepped(plugin: object, model: nn.Module, optimizer: Optimizer | None, names: GroupNames | None) -> None:
    """Check that what is converted has no optimizer state yet, which would stay in lower precision.

    Raises:
        UsageError: it has.
    """
    if optimizer is None or names is None:
        return
    low = {id(parameter) for _, parameter in _low(model)}
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], group_names, strict=True):
            if id(parameter) in low and optimizer.state.get(parameter):
                raise UsageError(
                    f"{type(plugin).__name__}: {name} is {parameter.dtype} and has optimizer state: boost before the "
                    "first step, so that the state is that of float32 master weights, or load the model in float32"
                )


def hold(model: nn.Module) -> None:
    """Convert trainable parameters of lower precision to float32, in place: they stay the objects that they are.

    ColossalAI makes such copies for its optimizers, and stores the rounded ones; here they are the parameters, and
    checkpoints hold them, so that a resume is exact. A log line tells of it, on rank 0.
    """
    low = list(_low(model))
    with torch.no_grad():
        for _, parameter in low:
            parameter.data = parameter.data.float()
    if low and launch.rank_and_world()[0] == 0:
        text = (
            f"{len(low)} trainable parameters (first {low[0][0]}) are held in float32 from now on, as master weights; "
            "the model computes in lower precision, and checkpoints hold the float32 values"
        )
        log_event(Event("master_weights", text))


def _low(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad and one.dtype in LOW)
