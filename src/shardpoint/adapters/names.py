"""What the tensors of a live module are called, whatever wraps it.

Wrappers are removed by walking modules and testing wrapper classes, never as text: a user's own submodule may be called
`module`. The names are those that the unwrapped model has in memory, which for transformers are the Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from shardpoint.errors import UsageError
from shardpoint.layout import Mesh


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One parameter or persistent buffer.

    Attributes:
        fqn: its name in the unwrapped model.
        tensor: the live tensor.
        is_parameter: False for a buffer.
        mesh: for a parameter under DDP the ranks that hold it alike; None otherwise.
    """

    fqn: str
    tensor: torch.Tensor
    is_parameter: bool
    mesh: Mesh | None


@dataclass(slots=True)
class NamedModule:
    """A module's tensors and the names by which other objects refer to them.

    Attributes:
        root: the module without its wrappers.
        tensors: each once, in the model's order; a tied tensor has the name that comes first.
        names: id of a parameter or buffer -> its name.
        extra_states: module name -> module, for modules with a `get_extra_state` of their own.
        aliases: further name of a tied tensor -> the name that comes first.
    """

    root: nn.Module
    tensors: list[NamedTensor] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    extra_states: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def by_name(self) -> dict[str, NamedTensor]:
        """Return the tensors by their names."""
        return {named.fqn: named for named in self.tensors}


def _compiled_original(module: nn.Module) -> nn.Module | None:
    kind = type(module)
    if kind.__module__.startswith("torch._dynamo") and kind.__name__ == "OptimizedModule":
        original = module._orig_mod  # noqa: SLF001 - the documented way to the module that torch.compile wrapped
        assert isinstance(original, nn.Module)  # noqa: S101 - for the type checker
        return original
    return None


@lru_cache(maxsize=64)
def _flat_mesh(ranks: tuple[int, ...]) -> Mesh:
    """Return the mesh of a group; one object for each group, so that meshes need not be compared rank by rank."""
    return Mesh((len(ranks),), ranks)


def unwrapped(module: nn.Module) -> tuple[nn.Module, Mesh | None]:
    """Return a module without the wrappers at its top, and the ranks that a DDP among them keeps alike.

    Raises:
        UsageError: the module is wrapped by FSDP1.
    """
    mesh: Mesh | None = None
    while True:
        if isinstance(module, FullyShardedDataParallel):
            text = "FullyShardedDataParallel (FSDP1) hides its parameters' names and layout: use fully_shard (FSDP2)"
            raise UsageError(text)
        if isinstance(module, DistributedDataParallel):
            mesh = _flat_mesh(tuple(dist.get_process_group_ranks(module.process_group)))
            module = module.module
        elif (original := _compiled_original(module)) is not None:
            module = original
        elif isinstance(module, ActivationWrapper):
            module = module._checkpoint_wrapped_module  # noqa: SLF001 - torch gives no other way
        else:
            return module, mesh


def reshard(module: nn.Module) -> None:
    """Bring every FSDP2 module back to its sharded parameters.

    After a forward without a backward the root is unsharded: its parameters are other objects, and bytes loaded into
    the shards would be ignored by the next forward.
    """
    _reshard(module.modules())


def _reshard(modules: Iterable[nn.Module]) -> None:
    for child in modules:
        if isinstance(child, FSDPModule):
            child.reshard()


def name_tensors(module: nn.Module) -> NamedModule:
    """Name every parameter and every persistent buffer of a module.

    Args:
        module: as the trainer has it, wrapped or not. FSDP2 modules in it are resharded first.
    """
    modules = list(module.modules())
    _reshard(modules)
    root, _ = unwrapped(module)
    named = NamedModule(root)
    _walk(module, "", None, named, set())
    apart = _unsynchronised(modules)
    if apart:
        named.tensors = [replace(one, mesh=None) if id(one.tensor) in apart else one for one in named.tensors]
    return named


def _unsynchronised(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the parameters that a DDP was told to ignore: nothing keeps those alike."""
    found: set[int] = set()
    for child in modules:
        if isinstance(child, DistributedDataParallel) and child.parameters_to_ignore:
            named = child.module.named_parameters(remove_duplicate=False)
            found |= {id(parameter) for name, parameter in named if name in child.parameters_to_ignore}
    return found


def _walk(module: nn.Module, prefix: str, mesh: Mesh | None, named: NamedModule, visited: set[int]) -> None:
    module, found = unwrapped(module)
    mesh = found or mesh
    if id(module) in visited:
        return
    visited.add(id(module))
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        named.extra_states[prefix.removesuffix(".")] = module
    for name, parameter in module._parameters.items():  # noqa: SLF001 - named_parameters would repeat the wrappers' names
        if parameter is not None:
            _add(named, NamedTensor(prefix + name, parameter, is_parameter=True, mesh=mesh))
    for name, buffer in module._buffers.items():  # noqa: SLF001 - as above
        if buffer is not None and name not in module._non_persistent_buffers_set:  # noqa: SLF001 - no public spelling
            _add(named, NamedTensor(prefix + name, buffer, is_parameter=False, mesh=None))
    for name, child in module._modules.items():  # noqa: SLF001 - named_children would drop a child that occurs twice
        if child is not None:
            _walk(child, f"{prefix}{name}.", mesh, named, visited)


def _add(named: NamedModule, tensor: NamedTensor) -> None:
    if id(tensor.tensor) not in named.names:
        named.names[id(tensor.tensor)] = tensor.fqn
        named.tensors.append(tensor)
    else:
        named.aliases[tensor.fqn] = named.names[id(tensor.tensor)]


def class_name(module: nn.Module) -> str:
    """Return a module's class name without the prefix that `fully_shard` gives it.

    Only the class that `fully_shard` made (the one that adds `FSDPModule` to another class) is renamed back.
    """
    kind: type[Any] = type(module)
    if isinstance(module, FSDPModule) and kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2:  # noqa: PLR2004 - see below
        return kind.__mro__[2].__name__  # FSDPX, FSDPModule, X
    return kind.__name__
