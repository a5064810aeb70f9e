"""How a parameter's state that is a nest of dicts, lists and tuples is taken apart for storage, and put together again.

Each tensor of one and more dims becomes a state of its own, named by its path: `"shampoo/factors/0"`. Components are
escaped, so that no two leaves of a parameter, flat or nested, have one name. What remains, the *skeleton*, says at each
place what stands there, and goes into `param_groups.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardpoint.errors import UsageError

SCALARS = (bool, int, float, str, type(None))
MAX_DEPTH = 32
_CONTAINERS = {"list": list, "tuple": tuple}


def is_stored_apart(value: object) -> bool:
    """Tell whether a state is a tensor in a file: of one and more dims, or spread over a mesh."""
    # Only a tensor in a file gets its mesh back, so a 0-dim DTensor (of a 0-dim parameter) goes there too.
    return isinstance(value, DTensor) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def is_nested(key: object, value: object) -> bool:
    """Tell whether a state needs a skeleton: it is a nest, or its own name would be escaped."""
    if type(key) is not str or _component(key) != key:
        return True
    return type(value) is dict or (
        type(value) in (list, tuple) and not all(type(item) in SCALARS for item in _items(value))
    )


def _items(value: Any) -> list[Any]:
    return list(value)


def _component(key: object) -> str:
    """Return a key as a component of a path; different keys of one dict give different ones.

    Raises:
        UsageError: neither text nor an integer.
    """
    if type(key) is str:
        return key.replace("~", "~0").replace("/", "~1").replace("#", "~2")
    if type(key) is int:
        return f"#{key}"
    raise UsageError(f"has the key {key!r}: only strings and integers can be the keys of a state that is stored")


def leaves(states: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a parameter's states, nested ones by their paths; keys and depths that cannot be stored are left out."""
    for key, value in states.items():
        if type(key) in (str, int):
            yield from _leaves(value, _component(key), 0)


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) in (str, int):
                yield from _leaves(item, f"{path}/{_component(key)}", depth + 1)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}", depth + 1)
    else:
        yield path, value


def take_apart(
    key: object, value: object, label: str, scalar: Callable[[Any, str], Any], found: dict[str, torch.Tensor]
) -> list[Any]:
    """Return a state's skeleton.

    Args:
        key: the state's name.
        value: the state.
        label: its place, for messages.
        scalar: turns what is not stored apart into a document's value, or refuses it.
        found: gets path -> tensor of those that are stored apart.

    Raises:
        UsageError: something in it cannot be stored.
    """
    try:
        return _skeleton(value, _component(key), 0, scalar, label, found)
    except UsageError as error:
        raise UsageError(f"{label} {error}") from error


def _skeleton(
    value: Any, path: str, depth: int, scalar: Callable[[Any, str], Any], label: str, found: dict[str, torch.Tensor]
) -> list[Any]:
    if depth > MAX_DEPTH:
        raise UsageError(f"is nested deeper than {MAX_DEPTH} levels: such a state cannot be stored")
    if type(value) is dict:
        inner = {
            key: _skeleton(item, f"{path}/{_component(key)}", depth + 1, scalar, label, found)
            for key, item in value.items()
        }
        return ["dict", inner]
    if type(value) in (list, tuple):
        items = [
            _skeleton(item, f"{path}/{index}", depth + 1, scalar, label, found) for index, item in enumerate(value)
        ]
        return [type(value).__name__, items]
    if is_stored_apart(value):
        found[path] = value
        return ["tensor", path]
    return ["value", scalar(value, f"at {path}")]


def is_skeleton(node: object, depth: int = 0) -> bool:
    """Tell whether a document's value has the form of a skeleton."""
    if depth > MAX_DEPTH or type(node) is not list or len(node) != 2:  # noqa: PLR2004 - a kind, and what it holds
        return False
    kind, inner = node
    if kind == "dict":
        return type(inner) is dict and all(
            type(key) in (str, int) and is_skeleton(item, depth + 1) for key, item in inner.items()
        )
    if kind in ("list", "tuple"):
        return type(inner) is list and all(is_skeleton(item, depth + 1) for item in inner)
    return kind == "value" or (kind == "tensor" and type(inner) is str)


def paths(node: list[Any]) -> Iterator[str]:
    """Yield the paths of the tensors in a skeleton."""
    kind, inner = node
    if kind == "tensor":
        yield inner
    elif kind == "dict":
        for item in inner.values():
            yield from paths(item)
    elif kind in _CONTAINERS:
        for item in inner:
            yield from paths(item)


def put_together(node: list[Any], tensors: Mapping[str, Any], value: Callable[[Any, object], Any], key: object) -> Any:
    """Return the state that a skeleton describes.

    Args:
        node: the skeleton.
        tensors: path -> tensor.
        value: turns a document's value, and the key that it stands under, into a live one.
        key: what this node stands under.
    """
    kind, inner = node
    if kind == "dict":
        return {name: put_together(item, tensors, value, name) for name, item in inner.items()}
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](put_together(item, tensors, value, key) for item in inner)
    return tensors[inner] if kind == "tensor" else value(inner, key)
