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
        sampler: `shardpoint.data.StatefulDistributedSampler`, torchdata's `StatefulDataLoader`, or anything with
            `state_dict` and `load_state_dict`; saved per rank. What it returns holds plain Python values, tensors and
            numpy arrays.
        tokenizer: anything with `save_pretrained`; its files go beside the weights. Without it, the tokenizer files of
            the directory that the model was loaded from are copied, if there are any.
        frozen: the model never changes (a reference or reward model). A save takes its checksums, and where they are
            those of the checkpoint before, links that one's files instead of writing them again. One that did change is
            written, and the listener is told.
        grad_scaler: a `torch.amp.GradScaler`; its scale and its counter are saved and restored, and it is an error
            where only the state or only the checkpoint has one. Leave it out where the Booster scales the loss (fp16):
            its own is saved and restored with the optimizer.
        extras: name -> anything else of this role with `state_dict` and `load_state_dict`, or a plain dict, that a
            resume must bring back (an experience buffer, a KL coefficient); saved per rank, as a sampler is.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    lr_scheduler: Any = None
    sampler: Any = None
    tokenizer: Any = None
    frozen: bool = False
    grad_scaler: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)


Roles = Mapping[str, TrainState]


def as_roles(state: TrainState | Roles) -> dict[str, TrainState]:
    """Return a state as roles: a single one is the role `""`.

    Raises:
        UsageError: no role; a role's name, or that of an extra, that is not a plain directory name; or a frozen role
            with something that changes.
    """
    if isinstance(state, TrainState):
        _check_role("", state)
        return {"": state}
    if not state:
        text = "the state has no role: give a TrainState, or a dict of them by role"
        raise UsageError(text)
    reserved = {"modeling", "optimizer", "adapter", "rng", "data", "extras"}
    for name, value in state.items():
        if not isinstance(value, TrainState):
            text = f"role {name!r} is a {type(value).__name__}, not a TrainState"
            raise UsageError(text)
        if not _is_plain(name) or name in reserved:
            text = f"{name!r} cannot be a role: use letters, digits, - and _, and none of {sorted(reserved)}"
            raise UsageError(text)
        _check_role(name, value)
    return dict(state)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.replace("-", "").replace("_", "").isalnum()


def _check_role(name: str, state: TrainState) -> None:
    what = f"role {name!r}" if name else "the state"
    moving = [part for part in ("optimizer", "lr_scheduler", "grad_scaler") if getattr(state, part) is not None]
    if state.frozen and moving:
        text = f"{what} is frozen and has {' and '.join(moving)}: leave them out, or do not call it frozen"
        raise UsageError(text)
    for extra, value in state.extras.items():
        if not _is_plain(extra):
            text = f"{what} has an extra called {extra!r}: use letters, digits, - and _"
            raise UsageError(text)
        if not isinstance(value, dict) and not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            text = (
                f"{what}: the extra {extra!r} is a {type(value).__name__}: give a dict, or an object with state_dict "
                "and load_state_dict"
            )
            raise UsageError(text)


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run was when it was saved.

    Attributes:
        epoch: the epoch that it was in.
        step: steps done.
        sample_start_index: `step * batch_size`, the samples already consumed.
        missing: what the checkpoint lacked and `allow_missing` allowed: left as it was, one line each.
        unexpected: what it had and `allow_unexpected` allowed to leave.
        cast: weights that `allow_cast` converted, each with the stored dtype and its own.
    """

    epoch: int
    step: int
    sample_start_index: int
    missing: tuple[str, ...] = field(default=(), repr=False)
    unexpected: tuple[str, ...] = field(default=(), repr=False)
    cast: tuple[str, ...] = field(default=(), repr=False)
