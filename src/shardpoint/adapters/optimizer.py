"""How an optimizer's state is read and put back, by parameter name, without stepping it and without casting it.

State is read from `optimizer.state` by parameter identity. It is put back by assignment, since `load_state_dict` casts
every tensor to the parameter's dtype (fp32 masters to bf16). Tensors of one and more dims are stored as tensors, those
inside of dicts and lists too; numbers and 0-dim tensors (`step`) go into `param_groups.json`, exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardpoint.adapters.names import NamedModule
from shardpoint.adapters.nesting import SCALARS, is_nested, is_stored_apart, leaves, paths, put_together, take_apart
from shardpoint.adapters.tensors import (
    dtype_name,
    from_raw,
    live_values,
    local_tensor,
    mesh_of,
    plain_values,
    raw_tensor,
    torch_dtype,
)
from shardpoint.errors import UsageError
from shardpoint.layout import Mesh
from shardpoint.manifest import RawTensor, TensorEntry

_NOT_OPTIONS = frozenset({"params", "param_names"})
# How torch carries a step out, not what it computes: that belongs to the layout and device at hand, not to the run.
HOW_TO_STEP = frozenset({"foreach", "fused"})

# Optimizers whose state is not there: True while it is still coming in, False once that has failed.
_incomplete: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One state tensor of one parameter.

    Attributes:
        fqn: the parameter's name.
        state: the state's name; of a tensor in a nest of dicts and lists, its path.
        tensor: the live tensor; a DTensor where the parameter is one.
        mesh: for a plain tensor, the ranks that hold it alike (DDP), or None.
    """

    fqn: str
    state: str
    tensor: torch.Tensor
    mesh: Mesh | None


def check_supported(optimizer: Optimizer) -> None:
    """Refuse an optimizer that hides its state from `optimizer.state`.

    Raises:
        UsageError: Accelerate's wrapper, or `ZeroRedundancyOptimizer`.
    """
    name = type(optimizer).__name__
    if name == "ZeroRedundancyOptimizer":
        text = "ZeroRedundancyOptimizer keeps its state in another optimizer on other ranks: use FSDP2 to shard it"
        raise UsageError(text)
    if name == "AcceleratedOptimizer":
        text = "AcceleratedOptimizer wraps the optimizer that holds the state: give `optimizer.optimizer`"
        raise UsageError(text)
    if not isinstance(optimizer, Optimizer):
        text = f"{type(optimizer).__name__} is not a torch.optim.Optimizer: give the optimizer that it wraps"
        raise UsageError(text)


def mark_incomplete(optimizer: Optimizer, *, coming: bool) -> None:
    """Say that an optimizer's state is not there, so that nobody saves or steps it as it is; `install_states` ends it.

    Args:
        optimizer: whose.
        coming: whether it is still coming in: then nobody may load into it either.
    """
    _incomplete[optimizer] = coming


def is_incomplete(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's state is still coming in, or failed to."""
    return optimizer in _incomplete


def named_groups(optimizer: Optimizer, named: NamedModule, part: str) -> list[list[tuple[str, torch.Tensor]]]:
    """Return each param group's parameters with their names.

    Raises:
        UsageError: a parameter that the model does not have.
    """
    check_supported(optimizer)
    groups: list[list[tuple[str, torch.Tensor]]] = []
    for number, group in enumerate(optimizer.param_groups):
        members: list[tuple[str, torch.Tensor]] = []
        for index, parameter in enumerate(group["params"]):
            name = named.names.get(id(parameter))
            if name is None:
                text = (
                    f"{part}: parameter {index} of group {number} (shape {list(parameter.shape)}) is not in the model: "
                    "give the model that this optimizer steps, with the parameters that it has now"
                )
                raise UsageError(text)
            members.append((name, parameter))
        groups.append(members)
    return groups


def read_optimizer(optimizer: Optimizer, named: NamedModule, part: str) -> tuple[dict[str, Any], list[StateTensor]]:
    """Read an optimizer.

    Args:
        optimizer: not stepped, not changed.
        named: the model that it steps.
        part: for messages.

    Returns:
        The document (class, groups with names and options, scalar states) and the state tensors.

    Raises:
        UsageError: a parameter is not in the model, or a state cannot be stored.
    """
    groups = named_groups(optimizer, named, part)
    if is_incomplete(optimizer):
        text = (
            f"{part}: the optimizer's state is not restored yet, or its restoring failed: call "
            "`Checkpointer.optimizer_ready()` first, or resume again"
        )
        raise UsageError(text)
    known = {id(parameter) for members in groups for _, parameter in members}
    strangers = [key for key in optimizer.state if id(key) not in known]
    if strangers:
        text = f"{part}: the optimizer has state under {len(strangers)} keys that are no parameters of its groups"
        raise UsageError(text)
    meshes = {named_tensor.fqn: named_tensor.mesh for named_tensor in named.tensors}
    tensors: list[StateTensor] = []
    scalars: dict[str, dict[str, Any]] = {}
    nested: dict[str, dict[Any, list[Any]]] = {}
    described: list[dict[str, Any]] = []
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        place = f"{part}: param group {len(described)}"
        options = {key: plain_values(value, place) for key, value in group.items() if key not in _NOT_OPTIONS}
        described.append({"params": [name for name, _ in members], "options": options})
        for name, parameter in members:
            for state, value in optimizer.state.get(parameter, {}).items():
                label = f"{part}: state {state!r} of {name}"
                apart: dict[str, torch.Tensor] = {}
                if is_nested(state, value):
                    nested.setdefault(name, {})[state] = take_apart(state, value, label, _scalar, apart)
                elif is_stored_apart(value):
                    apart[state] = value
                else:
                    scalars.setdefault(name, {})[state] = _scalar(value, label)
                for path, tensor in apart.items():
                    place = label if path == state else f"{label} at {path}"
                    tensors.append(StateTensor(name, path, _spread_like(tensor, parameter, place), meshes[name]))
    document = {"class": type(optimizer).__qualname__, "groups": described, "states": scalars}
    if nested:
        document["nested"] = nested
    return document, tensors


def _scalar(value: Any, label: str) -> Any:
    if isinstance(value, torch.Tensor):
        return raw_tensor(value, label)
    if type(value) in (list, tuple) and all(type(item) in SCALARS for item in value):
        return value
    if type(value) in SCALARS:
        return value
    text = (
        f"{label} is a {type(value).__name__}: only tensors, numbers and strings can be stored, and dicts, lists and "
        "tuples of those"
    )
    raise UsageError(text)


def _spread_like(value: torch.Tensor, parameter: torch.Tensor, label: str) -> torch.Tensor:
    """Return a parameter's state as a DTensor where the parameter is one.

    An optimizer of the user's own may keep plain tensors of the *local* shape; stored as they are, all ranks but one
    would be lost.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    local_shape = tuple(local_tensor(parameter).shape)
    if tuple(value.shape) != local_shape:
        text = (
            f"{label} is a plain tensor of shape {list(value.shape)} beside a parameter of shape "
            f"{list(parameter.shape)}, of which this rank holds {list(local_shape)}: make the state a DTensor with the "
            "parameter's placements"
        )
        raise UsageError(text)
    return DTensor.from_local(
        value.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@dataclass
class OptimizerTarget:
    """An optimizer that is about to be filled: where each stored tensor goes, and what does not fit.

    Attributes:
        optimizer: changed by `install` only, but for state tensors of the stored shape and dtype that it already has:
            those are filled in place.
        tensors: one for each stored tensor of a parameter that this rank has.
        problems: what does not fit, one line each.
        group_of: for each live group, the stored one that its parameters are in; None keeps its options.
        exempt: names that may have no place, or another one, in the checkpoint's groups.
        missing: (FQN, line) of those that have, and of others that have none: whoever matches refuses those.
    """

    optimizer: Optimizer
    part: str
    document: Mapping[str, Any]
    groups: list[list[tuple[str, torch.Tensor]]]
    tensors: list[StateTensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    group_of: list[int | None] = field(default_factory=list)
    exempt: frozenset[str] = frozenset()
    missing: list[tuple[str, str]] = field(default_factory=list)

    @property
    def unstored(self) -> frozenset[str]:
        """The parameters that the checkpoint has no place for, and need not have."""
        return self.exempt.difference(*(group["params"] for group in self.document["groups"]))

    def install(self) -> None:
        """Assign the options and the filled states; states that were not stored are removed."""
        self.install_options()
        self.install_states()

    def install_options(self) -> None:
        """Assign the options of the param groups, but for `foreach` and `fused` where the live group has its own."""
        for number, group in enumerate(self.optimizer.param_groups):
            stored = self.group_of[number]
            if stored is None:
                continue
            for key, value in self.document["groups"][stored]["options"].items():
                if key not in HOW_TO_STEP or key not in group:
                    group[key] = _like(group.get(key), value)

    def install_states(self) -> None:
        """Assign the filled states, once the options are; states that were not stored are removed."""
        scalars: Mapping[str, Mapping[str, Any]] = self.document["states"]
        nested: Mapping[str, Mapping[Any, list[Any]]] = self.document.get("nested", {})
        unstored = self.unstored
        filled: dict[str, dict[str, Any]] = {}
        parameters = {name: parameter for members in self.groups for name, parameter in members}
        for tensor in self.tensors:
            parameter = parameters[tensor.fqn]
            live = _live_states(self.optimizer, parameter).get(tensor.state)
            value = tensor.tensor
            # An optimizer that keeps plain tensors beside sharded parameters goes on with plain ones.
            if isinstance(live, torch.Tensor) and same_memory(live, value):
                value = live
            elif _is_plain_shard(live, parameter) and live.dtype == value.dtype:
                value = local_tensor(value)
            filled.setdefault(tensor.fqn, {})[tensor.state] = value
        for number, members in enumerate(self.groups):
            group = self.optimizer.param_groups[number]
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, parameter in members:

                def placed(value: Any, key: object, parameter: torch.Tensor = parameter) -> Any:
                    return _scalar_state(value, parameter, on_device=on_device or key != "step")  # noqa: B023

                skeletons, tensors = nested.get(name, {}), filled.get(name, {})
                within = {path for skeleton in skeletons.values() for path in paths(skeleton)}
                state = {key: placed(value, key) for key, value in scalars.get(name, {}).items()}
                state |= {path: tensor for path, tensor in tensors.items() if path not in within}
                state |= {key: put_together(node, tensors, placed, key) for key, node in skeletons.items()}
                if name in unstored:
                    continue  # allowed to be missing: its state stays as it is
                if state:
                    self.optimizer.state[parameter] = state
                else:
                    self.optimizer.state.pop(parameter, None)
        _incomplete.pop(self.optimizer, None)


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors' local parts are the same memory in the same shape and dtype."""
    one, other = local_tensor(first), local_tensor(second)
    return (one.data_ptr(), one.shape, one.dtype) == (other.data_ptr(), other.shape, other.dtype)


def _scalar_state(value: Any, parameter: torch.Tensor, *, on_device: bool) -> Any:
    """Return a stored scalar state where torch's own `load_state_dict` would put it.

    `step` stays on the host unless the optimizer is fused or capturable; what else is 0-dim is beside the parameter.
    """
    if isinstance(value, RawTensor):
        tensor = from_raw(value)
        return tensor.to(parameter.device) if on_device else tensor
    return value


def _like(live: Any, stored: Any) -> Any:
    """Return a stored option in the type that the live group has it in."""
    if isinstance(live, torch.Tensor):
        value = from_raw(stored) if isinstance(stored, RawTensor) else torch.tensor(stored)
        live.detach().copy_(value.to(live.dtype))
        return live
    if isinstance(stored, RawTensor) and isinstance(live, (int, float)):
        return from_raw(stored).item()
    if type(live) in (list, tuple) and type(stored) in (list, tuple):
        return type(live)(live_values(stored))
    return live_values(stored)


def target_optimizer(
    optimizer: Optimizer,
    named: NamedModule,
    part: str,
    document: Mapping[str, Any],
    stored: Iterable[TensorEntry],
    *,
    fresh: bool = False,
    may_miss: Callable[[str], bool] = lambda _: False,
) -> OptimizerTarget:
    """Prepare an optimizer to be filled, without changing it.

    Args:
        optimizer: fresh or used.
        named: the model that it steps.
        part: the part of the checkpoint.
        document: its `param_groups.json`.
        stored: the part's tensors.
        may_miss: tells whether a parameter of a name may have no place in the checkpoint's groups, or another one.
        fresh: fill new tensors even where the optimizer has fitting ones, so that it stays as it is until `install`.

    Raises:
        UsageError: a parameter is not in the model, or the state is still coming in from an earlier load.
    """
    if _incomplete.get(optimizer, False):
        text = f"{part}: the optimizer's state is still being restored: call `Checkpointer.optimizer_ready()` first"
        raise UsageError(text)
    target = OptimizerTarget(optimizer, part, document, named_groups(optimizer, named, part))
    target.exempt = frozenset(name for members in target.groups for name, _ in members if may_miss(name))
    stored_class = str(document.get("class", "")).rpartition(".")[2]
    if stored_class != type(optimizer).__name__:
        text = (
            f"{part}: the state of {stored_class or 'an unnamed optimizer'}, the target is {type(optimizer).__name__}"
        )
        target.problems.append(text)
    _match_groups(target)
    meshes = {named_tensor.fqn: named_tensor.mesh for named_tensor in named.tensors}
    parameters = {name: parameter for members in target.groups for name, parameter in members}
    stored = list(stored)
    target.problems += _lacking_tensors(document, part, {(entry.fqn, entry.state) for entry in stored})
    for entry in stored:
        parameter = parameters.get(entry.fqn)
        if parameter is None or entry.state is None:
            continue
        tensor = _destination(optimizer, parameter, entry, fresh=fresh)
        if tensor is None:
            target.problems.append(
                f"{part}: {entry.fqn} [{entry.state}]: stored {list(entry.shape)} beside a parameter of "
                f"{list(parameter.shape)} that is spread over {mesh_of(parameter)}: it cannot be spread likewise"
            )
        else:
            target.tensors.append(StateTensor(entry.fqn, entry.state, tensor, meshes[entry.fqn]))
    return target


def _lacking_tensors(
    document: Mapping[str, Any], part: str, known: Collection[tuple[str, str | None]]
) -> Iterator[str]:
    """Yield which tensors the skeletons of nested states name and the checkpoint does not have."""
    for name, skeletons in document.get("nested", {}).items():
        for path in (path for skeleton in skeletons.values() for path in paths(skeleton)):
            if (name, path) not in known:
                yield f"{part}: {name} [{path}]: named by the param groups, and no tensor of the checkpoint"


def _live_states(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str | None, Any]:
    """Return a parameter's states as they are now, nested ones by their paths."""
    return dict(leaves(optimizer.state.get(parameter, {})))


def _destination(
    optimizer: Optimizer, parameter: torch.Tensor, entry: TensorEntry, *, fresh: bool
) -> torch.Tensor | None:
    live = _live_states(optimizer, parameter).get(entry.state)
    fits = (
        isinstance(live, torch.Tensor)
        and tuple(live.shape) == entry.shape
        and dtype_name(live.dtype, entry.fqn) == entry.dtype
        and isinstance(live, DTensor) == isinstance(parameter, DTensor)
    )
    if fits and not fresh:
        assert isinstance(live, torch.Tensor)  # noqa: S101 - for the type checker
        return live
    if _is_plain_shard(live, parameter) and dtype_name(live.dtype, entry.fqn) == entry.dtype:
        own = torch.empty_like(live) if fresh else live
        return _spread_like(own, parameter, entry.fqn) if tuple(parameter.shape) == entry.shape else None
    if tuple(parameter.shape) == entry.shape:
        return torch.empty_like(parameter, dtype=torch_dtype(entry.dtype), requires_grad=False)
    if isinstance(parameter, DTensor):
        return None
    return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=parameter.device)


def _is_plain_shard(live: Any, parameter: torch.Tensor) -> TypeGuard[torch.Tensor]:
    return (
        isinstance(parameter, DTensor)
        and isinstance(live, torch.Tensor)
        and not isinstance(live, DTensor)
        and live.shape == local_tensor(parameter).shape
        and live.is_contiguous()
    )


def _match_groups(target: OptimizerTarget) -> None:
    """Find for each live group the stored one that its parameters are in."""
    stored = [set(group["params"]) for group in target.document["groups"]]
    place = {name: number for number, names in enumerate(stored) for name in names}
    for number, members in enumerate(target.groups):
        names = [name for name, _ in members]
        found = {place[name] for name in names if name in place and name not in target.exempt}
        if names and not found and target.exempt.issuperset(names):
            # A group of nothing but exempt ones is the stored one if they were one; else its options stay.
            found = {place[name] for name in names if name in place}
            found = found if len(found) == 1 and not found & set(target.group_of) else set()
            target.group_of.append(min(found, default=None))
            target.missing += _elsewhere(target, number, names, place)
            continue
        target.missing += _elsewhere(target, number, names, place, min(found, default=None))
        if len(found) > 1:
            target.problems.append(
                f"{target.part}: param group {number} joins parameters of the stored groups {sorted(found)}: build the "
                "groups as they were"
            )
        if not found and not names and number < len(stored):
            found = {number}  # a pipeline rank without parameters in this group
        if not found and not names:
            target.problems.append(f"{target.part}: param group {number} is empty and was not stored")
        target.group_of.append(min(found, default=0))
    split = [
        number for number in sorted({n for n in target.group_of if n is not None}) if target.group_of.count(number) > 1
    ]
    target.problems += [
        f"{target.part}: the parameters of stored group {number} are in several groups now" for number in split
    ]


def _elsewhere(
    target: OptimizerTarget, number: int, names: Iterable[str], place: Mapping[str, int], of_group: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the parameters of a group that the checkpoint has in none, and the exempt ones that it has in another."""
    if of_group is None:
        of_group = target.group_of[number] if number < len(target.group_of) else None
    for name in names:
        if name not in place:
            yield name, f"{target.part}: {name} is in the optimizer, but in no group of the checkpoint"
        elif name in target.exempt and place[name] != of_group:
            yield name, f"{target.part}: {name} is in param group {number}, and was in the stored group {place[name]}"


def unplaced_members(
    document: Mapping[str, Any], part: str, members: frozenset[tuple[str, str]]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return what is wrong with the checkpoint's groups, and (FQN, line) of what no rank's optimizer has of them."""
    names = [name for group in document["groups"] for name in group["params"]]
    never = f"{part}: the optimizer was saved without a parameter in any group: it never trained anything"
    line = "is in a param group of the checkpoint, but in no rank's optimizer"
    unplaced = [(name, f"{part}: {name} {line}") for name in names if (part, name) not in members]
    return ([] if names else [never]), unplaced
