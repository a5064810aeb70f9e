"""Which parameter each numbered optimizer state of ColossalAI's files belongs to.

The files have numbers, counted through the param groups in their order; names come from the optimizer that is filled.
A number says nothing of the parameter that it meant, so every count and every shape is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from shardpoint.adapters.colossal import Whole
from shardpoint.adapters.documents import scheduler_class
from shardpoint.adapters.names import NamedModule
from shardpoint.adapters.optimizer import named_groups
from shardpoint.adapters.tensors import dtype_name, plain_values
from shardpoint.adapters.torch_files import Located
from shardpoint.errors import ManifestError
from shardpoint.manifest import encode_document

_Member = TypeVar("_Member")
# States that have their parameter's shape. Others do not: Adafactor's rows and columns, 8-bit states' scales.
_LIKE_THE_PARAMETER = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg", "grad_avg", "sum")
)
_TORCHS_SWITCHES = frozenset(("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"))


@dataclass(frozen=True, slots=True)
class OptimizerFiles:
    """What an optimizer's files hold.

    Attributes:
        groups: the param groups, with numbers in place of parameters.
        states: number -> state -> (path, where) for a tensor of one and more dims, else the value.
        place: for messages.
        copies: (number, path, path of another copy), for a tied parameter of which two pipeline stages stored states.
    """

    groups: Any
    states: Mapping[int, Mapping[str, Any]]
    place: str
    copies: Sequence[tuple[int, str, str]] = ()


@dataclass
class NamedStates:
    """The same by name.

    Attributes:
        document: as `param_groups.json` has it.
        tensors: (parameter, state, path, where).
        problems: what does not fit, one line each.
    """

    document: dict[str, Any]
    tensors: list[tuple[str, str, str, Located]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def name_states(files: OptimizerFiles, optimizer: Optimizer, named: NamedModule) -> NamedStates:
    """Match numbers with the parameters of an optimizer that was built like the one that was saved.

    Args:
        files: what was stored.
        optimizer: not changed.
        named: the model that it steps.

    Raises:
        ManifestError: the groups do not have the form of param groups.
        UsageError: a parameter is not in the model.
    """
    members = named_groups(optimizer, named, "optimizer")
    stored = _checked_groups(files)
    # The files do not tell the class; what it keeps in its groups does, as far as that goes.
    found = NamedStates({"class": type(optimizer).__name__, "groups": [], "states": {}})
    trained = [[member for member in group if member[1].requires_grad] for group in members]
    numbered = _of_same_sizes(stored, (members, trained), found.problems)
    if numbered is None:
        return found
    fqns = {
        number: member
        for group, names in zip(stored, numbered, strict=True)
        for number, member in zip(group["params"], names, strict=True)
    }
    for index, (group, live, names) in enumerate(zip(stored, optimizer.param_groups, members, strict=True)):
        options = _options(group, live, f"optimizer: param group {index}", found.problems)
        found.document["groups"].append({"params": [name for name, _ in names], "options": options})
    is_torchs = type(optimizer).__module__.startswith("torch.optim")
    for number, states in files.states.items():
        if number not in fqns:
            found.problems.append(f"optimizer: a state of parameter {number}, which is in no group")
            continue
        fqn, parameter = fqns[number]
        for state, value in states.items():
            label = f"optimizer: {fqn} [{state}]"
            if isinstance(value, tuple) and isinstance(value[1], Located):
                _add_tensor(found, fqn, state, value, parameter, is_torchs=is_torchs)
            else:
                kept = _as_counted(value, optimizer) if state == "step" else value
                found.document["states"].setdefault(fqn, {})[state] = plain_values(kept, label)
    return found


def _as_counted(step: Any, optimizer: Optimizer) -> Any:
    """Return a number of steps as the optimizer counts: torch's in tensors, ColossalAI's HybridAdam in integers.

    Which of the two is stored depends on the plugin: Gemini stores tensors for HybridAdam, too.
    """
    library = type(optimizer).__module__.partition(".")[0]
    if library == "torch" and isinstance(step, int | float):
        return torch.tensor(float(step), dtype=torch.float32)
    if library == "colossalai" and isinstance(step, torch.Tensor):
        return int(step.item())
    return step


def _checked_groups(files: OptimizerFiles) -> list[dict[str, Any]]:
    groups = files.groups
    well_formed = isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(number, int) for number in group["params"])
        for group in groups
    )
    if not well_formed:
        raise ManifestError(f"{files.place}: its param groups do not have the form of param groups", key="optimizer")
    return list(groups)


def check_states(files: OptimizerFiles, members: Sequence[Sequence[Whole]]) -> list[str]:
    """Return what does not fit an optimizer that ColossalAI loads itself: it compares no shapes, and counts not always.

    Args:
        files: what was stored.
        members: each group's parameters, in the order in which ColossalAI numbers them.

    Raises:
        ManifestError: the groups do not have the form of param groups.
    """
    problems: list[str] = []
    stored = _checked_groups(files)
    numbered = _of_same_sizes(stored, (members,), problems)
    if numbered is None:
        return problems
    for group, wholes in zip(stored, numbered, strict=True):
        if "rank" in group:
            continue  # GaLore's states are projections
        for number, whole in zip(group["params"], wholes, strict=True):
            for state, value in files.states.get(number, {}).items():
                if state in _LIKE_THE_PARAMETER and isinstance(value, tuple) and isinstance(value[1], Located):
                    problems += _other_shape(f"{whole.name} [{state}]", value[1].shape, whole.shape)
    return problems


def _of_same_sizes(
    stored: Sequence[Mapping[str, Any]],
    candidates: Sequence[Sequence[Sequence[_Member]]],
    problems: list[str],
) -> Sequence[Sequence[_Member]] | None:
    """Return the candidate whose groups are as large as those stored."""
    sizes = [len(group["params"]) for group in stored]
    live = [[len(group) for group in candidate] for candidate in candidates]
    if sizes in live:
        return candidates[live.index(sizes)]
    trained = "".join(f" (trained: {counts})" for counts in live[1:])
    problems.append(
        f"optimizer: stored are {len(sizes)} param groups of {sizes} parameters, the target has {len(live[0])} of "
        f"{live[0]}{trained}: build the groups as they were"
    )
    return None


def _other_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> list[str]:
    if stored == wanted:
        return []
    text = f"optimizer: {name}: stored {list(stored)}, the parameter at this place is {list(wanted)}: "
    return [text + "the parameters are in another order, or the model is another"]


def _options(stored: Mapping[str, Any], live: Mapping[str, Any], place: str, problems: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in stored.items():
        if key in ("params", "param_names"):
            continue
        if key == "bias_correction" and key not in live and value is True:
            continue  # HybridAdam's, and what torch's Adam always does
        if key in _TORCHS_SWITCHES and key not in live and not value:
            continue  # Gemini stores them for HybridAdam, which does not have them
        if key not in live and key != "initial_lr":
            problems.append(f"{place}: stored with {key}={value!r}, which the target does not know: another optimizer")
            continue
        if key == "decoupled_weight_decay" and live[key] != value:
            problems.append(f"{place}: stored with {key}={value}, the target has {live[key]} (Adam is not AdamW)")
        options[key] = plain_values(value, f"{place}: {key}")
    return options


def _add_tensor(
    found: NamedStates,
    fqn: str,
    state: str,
    value: tuple[str, Located],
    parameter: torch.Tensor,
    *,
    is_torchs: bool,
) -> None:
    path, where = value
    dtype = dtype_name(parameter.dtype, fqn)
    shapes = _other_shape(f"{fqn} [{state}]", where.shape, tuple(parameter.shape))
    found.problems += shapes
    if not shapes and is_torchs and where.dtype != dtype:
        found.problems.append(
            f"optimizer: {fqn} [{state}]: stored {where.dtype}, the parameter is {dtype}, and torch's optimizers keep "
            "both alike: build the model in that dtype, or load with optimizer=None and start the optimizer afresh"
        )
    found.tensors.append((fqn, state, path, where))


def scheduler_file_document(values: Any, lr_scheduler: Any, place: str) -> tuple[bytes, list[str]]:
    """Return a scheduler's file as our document, and what does not fit.

    Args:
        values: what the file holds.
        lr_scheduler: the scheduler that is to be filled; its class is not in the file, so its keys are compared.
        place: for messages.

    Raises:
        ManifestError: the file does not hold a scheduler's state.
    """
    if not isinstance(values, dict):
        raise ManifestError(f"{place} does not hold a scheduler's state", key="lr_scheduler")
    problems: list[str] = []
    if hasattr(lr_scheduler, "state_dict"):
        state = lr_scheduler.state_dict()
        live = set(state)
        stages = [kept.get("after_scheduler_type") for kept in (values, state)]
        if None not in stages and stages[0] != stages[1]:
            problems.append(f"lr_scheduler: stored with {stages[0]} after a first stage, the target has {stages[1]}")
        if live != set(values):
            only_stored, only_live = sorted(set(values) - live), sorted(live - set(values))
            problems.append(
                f"lr_scheduler: stored is the state of another scheduler than {type(lr_scheduler).__name__}"
                f"{_staged(values)}: only stored {only_stored}, only in the target {only_live}"
            )
    document = {"class": scheduler_class(lr_scheduler), "state": plain_values(values, place)}
    return encode_document(document), problems


def _staged(values: Mapping[str, Any]) -> str:
    after = values.get("after_scheduler_type")
    if after is None:
        return ""
    return (
        f" (it is one of ColossalAI's, with {after} after a first stage: give an object of that class, or load with "
        "lr_scheduler=None: the optimizer's groups have the learning rate)"
    )
