"""What a training run hands over to be saved, and what it gets back about where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardpoint.errors import UsageError


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The live objects of one model's training; saved and restored in place.

    Attributes:
        model: plain, or wrapped by DDP, FSDP2, `torch.compile`, activation checkpointing or `peft`.
        optimizer: any `torch.optim.Optimizer` over parameters of `model`.
        lr_scheduler: anything with `state_dict` and `load_state_dict`.
        sampler: anything with `state_dict` and `load_state_dict`; saved per rank.
        tokenizer: anything with `save_pretrained`; its files go beside the weights. Without it, the tokenizer files of
            the directory that the model was loaded from are copied, if there are any.
        frozen: the model never changes.
        extras: name -> anything with `state_dict` and `load_state_dict`; saved per rank.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    lr_scheduler: Any = None
    sampler: Any = None
    tokenizer: Any = None
    frozen: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)


Roles = Mapping[str, TrainState]


def as_roles(state: TrainState | Roles) -> dict[str, TrainState]:
    """Return a state as roles: a single one is the role `""`.

    Raises:
        UsageError: no role, or a role's name that is not a plain directory name.
    """
    if isinstance(state, TrainState):
        return {"": state}
    if not state:
        text = "the state has no role: give a TrainState, or a dict of them by role"
        raise UsageError(text)
    reserved = {"modeling", "optimizer", "adapter", "rng", "data", "extras"}
    for name, value in state.items():
        if not isinstance(value, TrainState):
            text = f"role {name!r} is a {type(value).__name__}, not a TrainState"
            raise UsageError(text)
        if not name.replace("-", "").replace("_", "").isalnum() or name in reserved:
            text = f"{name!r} cannot be a role: use letters, digits, - and _, and none of {sorted(reserved)}"
            raise UsageError(text)
    return dict(state)


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run was when it was saved.

    Attributes:
        epoch: the epoch that it was in.
        step: steps done.
        sample_start_index: `step * batch_size`, the samples already consumed.
    """

    epoch: int
    step: int
    sample_start_index: int
