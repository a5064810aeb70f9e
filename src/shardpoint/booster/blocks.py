"""Which modules FSDP2 shards as one group each: the transformer blocks, found or given, checked before sharding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardpoint.errors import UsageError

BlockClasses = Sequence[str | type[nn.Module]]


def find_blocks(model: nn.Module, classes: BlockClasses | None = None) -> list[tuple[str, nn.Module]]:
    """Return the modules to shard as a group each, children before parents; the root is not among them.

    Args:
        model: not sharded yet.
        classes: the blocks' classes or class names. None finds them: the classes that a transformers model names in
            `_no_split_modules`; else every repeated class (two or more) among the members of an outermost `ModuleList`.
            Found blocks that share a parameter with a module outside them are left to the group around them, so that
            tied weights stay tied. An empty sequence shards the root alone.

    Raises:
        UsageError: a given class matches no module, or a given block shares a parameter with a module outside it.
    """
    if classes is not None:
        blocks = _given(model, classes)
        torn = _torn_apart(model, blocks)
        if torn is not None:
            raise UsageError(
                f"{torn[0]} is tied to a parameter of another block, and FSDP2 cannot keep a parameter of two groups "
                "tied; leave the class of one of the two out of `blocks`"
            )
        return blocks
    blocks = _named_by_transformers(model) or _repeated_in_lists(model)
    while (torn := _torn_apart(model, blocks)) is not None:
        blocks = [(name, block) for name, block in blocks if id(block) not in torn[1]]
    return blocks


def check_groups(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Check what `fully_shard` would refuse, some of it only in the first forward.

    Raises:
        UsageError: a parameter is 0-dim or not contiguous, or one group's trainable parameters differ in dtype.
    """
    group_names = {id(block): name for name, block in blocks} | {id(model): "the root"}
    dtypes: dict[int, dict[torch.dtype, str]] = {}
    for name, parameter, group in _parameters_by_group(model, {id(block) for _, block in blocks}):
        if parameter.ndim == 0:
            raise UsageError(f"{name} is a 0-dim parameter, which FSDP2 cannot shard: make it one of shape [1]")
        if not parameter.is_contiguous() and not isinstance(parameter, DTensor):
            raise UsageError(f"{name} is not contiguous, which FSDP2 cannot shard: make it contiguous before boost()")
        if parameter.requires_grad:
            seen = dtypes.setdefault(group, {})
            seen.setdefault(parameter.dtype, name)
            if len(seen) > 1:
                examples = ", ".join(f"{example} is {dtype}" for dtype, example in seen.items())
                raise UsageError(
                    f"trainable parameters that FSDP2 would shard as one group ({group_names.get(group, name)}) differ "
                    f"in dtype: {examples}; convert the model to one dtype and use mixed_precision for the computation"
                )


def _given(model: nn.Module, classes: BlockClasses) -> list[tuple[str, nn.Module]]:
    if isinstance(classes, str):
        raise UsageError(f"blocks={classes!r}: give a sequence of classes or class names, [{classes!r}]")
    blocks: list[tuple[str, nn.Module]] = []
    matched: set[int] = set()
    for name, module in _bottom_up(model):
        hits = [i for i, wanted in enumerate(classes) if wanted in (type(module), type(module).__name__)]
        matched.update(hits)
        if hits:
            blocks.append((name, module))
    unmatched = [c if isinstance(c, str) else c.__name__ for i, c in enumerate(classes) if i not in matched]
    if unmatched:
        raise UsageError(f"blocks names {', '.join(unmatched)}, but {type(model).__name__} has no such module")
    return blocks


def _named_by_transformers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # Every module that carries the attribute is asked: the model may sit inside a peft or another wrapper.
    class_names: set[str] = set()
    for module in model.modules():
        class_names.update(getattr(module, "_no_split_modules", None) or ())
    return [(name, module) for name, module in _bottom_up(model) if type(module).__name__ in class_names]


def _repeated_in_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # Outermost lists only. Lists inside a block (experts) must not become groups: a rank whose tokens reach no expert
    # would not join that group's all-gather, and the others would wait for it.
    chosen: set[int] = set()

    def search(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(child, nn.ModuleList):
                search(child)
                continue
            for member in child:
                repeated = sum(type(other) is type(member) for other in child) > 1
                if repeated and any(True for _ in member.parameters()) and _has_forward(member):
                    chosen.add(id(member))
                else:
                    search(member)

    search(model)
    return [(name, module) for name, module in _bottom_up(model) if id(module) in chosen]


def _has_forward(module: nn.Module) -> bool:
    return not (isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward)


def _bottom_up(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = [(n, m) for n, m in model.named_modules() if m is not model and not isinstance(m, FSDPModule)]
    return iter(named[::-1])


def _torn_apart(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> tuple[str, set[int]] | None:
    """Return the name of a parameter that two groups hold, and the ids of the groups; None if there is none."""
    groups: dict[int, set[int]] = {}
    for name, parameter, group in _parameters_by_group(model, {id(block) for _, block in blocks}):
        holders = groups.setdefault(id(parameter), set())
        holders.add(group)
        if len(holders) > 1:
            return name, holders
    return None


def _parameters_by_group(model: nn.Module, block_ids: set[int]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield every name of every parameter, the parameter, and the id of the group that it is sharded in."""
    group_by_prefix = {"": id(model)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if prefix:
            is_group = id(module) in block_ids or isinstance(module, FSDPModule)
            group_by_prefix[prefix] = id(module) if is_group else group_by_prefix[prefix.rpartition(".")[0]]
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, parameter, group_by_prefix[prefix]
