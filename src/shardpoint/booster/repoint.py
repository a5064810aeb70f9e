"""How an optimizer follows its parameters when the model's are replaced: by name, in place.

`fully_shard` puts new DTensor parameters where the plain ones were, and an optimizer made before would go on stepping
the old ones, silently. What is checked is checked before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from shardpoint.adapters.nesting import MAX_DEPTH, SCALARS
from shardpoint.errors import UsageError

GroupNames = list[list[str]]
_SEQUENCES = (list, tuple)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back into every FSDP2 module (a forward alone leaves the root unsharded)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimized_names(model: nn.Module, optimizer: Optimizer) -> GroupNames:
    """Return, group by group, the model's name of each parameter that the optimizer steps.

    Raises:
        UsageError: the optimizer holds a parameter that is not the model's, or keeps its true state in an optimizer
            inside itself.
    """
    for attribute, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and value.param_groups is not optimizer.param_groups:
            raise UsageError(
                f"{type(optimizer).__name__} keeps another optimizer ({type(value).__name__}) in its attribute "
                f"{attribute!r}, and its parameters and state with it; boost that one, or use a plain torch optimizer"
            )
    reshard(model)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names: GroupNames = []
    for group_index, group in enumerate(optimizer.param_groups):
        names.append([])
        for index, parameter in enumerate(group["params"]):
            name = name_of.get(id(parameter))
            if name is None:
                raise UsageError(
                    f"parameter {index} of the optimizer's group {group_index} (shape {list(parameter.shape)}) is not "
                    f"a parameter of the model ({type(model).__name__}); make the optimizer from the parameters of the "
                    "very model that is boosted, after everything that replaces them (LoRA, resized embeddings)"
                )
            names[-1].append(name)
    return names


def check_can_shard(optimizer: Optimizer, names: GroupNames) -> None:
    """Check that everything the optimizer and its parameters carry can go along when they are sharded.

    Raises:
        UsageError: it holds state of another shape than its parameter's, state of an already sharded parameter, or
            state in which tensors cannot be looked for.
    """
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], group_names, strict=True):
            for path, value in _leaves(optimizer, parameter):
                place = f"the optimizer's state {path} of {name}"
                if type(value) in SCALARS or (isinstance(value, torch.Tensor) and value.ndim == 0):
                    continue
                if not isinstance(value, torch.Tensor):
                    raise UsageError(
                        f"{place} is a {type(value).__name__}, which cannot be sharded along: only tensors, numbers "
                        "and strings can, and dicts, lists and tuples of those; boost before the first step"
                    )
                if value.shape != parameter.shape:
                    raise UsageError(
                        f"{place} has shape {list(value.shape)}, the parameter {list(parameter.shape)}: it cannot be "
                        "sharded along; boost before the first step, or use an optimizer whose state has its "
                        "parameters' shapes"
                    )
                if isinstance(value, DTensor):
                    raise UsageError(
                        f"{place} is distributed already (tensor parallel): it cannot be sharded further; boost before "
                        "the first step"
                    )


def has_state(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Tell whether an optimizer has more of a parameter than numbers and strings, in whatever nest."""
    return any(
        value.ndim > 0 if isinstance(value, torch.Tensor) else type(value) not in SCALARS
        for _, value in _leaves(optimizer, parameter)
    )


def _leaves(optimizer: Optimizer, parameter: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Yield a parameter's states with where they stand; those in dicts, lists and tuples one by one.

    Raises:
        UsageError: a nest is too deep, or holds itself.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        yield from _nested(value, repr(key), 0)


def _nested(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        first = path.partition("[")[0]
        raise UsageError(f"the optimizer's state {first} is nested deeper than {MAX_DEPTH} levels")
    if type(value) is dict:
        for key, item in value.items():
            yield from _nested(item, f"{path}[{key!r}]", depth + 1)
    elif type(value) in _SEQUENCES:
        for index, item in enumerate(value):
            yield from _nested(item, f"{path}[{index}]", depth + 1)
    else:
        yield path, value


def check_unused(model: nn.Module) -> None:
    """Check that no parameter carries what lives on the Parameter object, which `fully_shard` replaces.

    Raises:
        UsageError: a parameter has a gradient, or hooks.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            raise UsageError(f"{name} has a gradient, which sharding would drop: zero_grad() before boost()")
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UsageError(f"{name} has hooks, which sharding would drop: register them after boost()")


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, by parameter name, what stands on the Parameter objects themselves."""
    return {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}


def keep_attributes(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Set on the model's present parameters what stood on those that they replace."""
    for name, parameter in model.named_parameters():
        for key, value in before[name].items():
            if not hasattr(parameter, key):
                setattr(parameter, key, value)


def repoint(model: nn.Module, optimizer: Optimizer, names: GroupNames) -> None:
    """Give the optimizer the model's present parameters under the same names, and take its state along.

    The optimizer, its group dicts and their lists stay the objects they were: a scheduler bound to them still works.
    State of a parameter's shape gets its placements and device, in dicts, lists and tuples too; scalars stay as they
    are.
    """
    present = dict(model.named_parameters())
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        parameters: list[nn.Parameter] = group["params"]
        for index, name in enumerate(group_names):
            old, new = parameters[index], present[name]
            state = optimizer.state.pop(old, None)
            parameters[index] = new
            if state is not None:
                optimizer.state[new] = {key: _placed_like(value, new) for key, value in state.items()}


def _placed_like(value: Any, parameter: nn.Parameter) -> Any:
    if type(value) is dict:
        return {key: _placed_like(item, parameter) for key, item in value.items()}
    if type(value) in _SEQUENCES:
        return type(value)(_placed_like(item, parameter) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
        # No communication (src_data_rank=None): every rank cuts its own shard from what it holds.
        on_device = value.to(parameter.to_local().device)
        return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)
