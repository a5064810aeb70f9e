"""What of a training state is a document: samplers, schedulers, and what modules keep outside their tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shardpoint.adapters.names import NamedModule
from shardpoint.adapters.tensors import live_values, plain_values
from shardpoint.errors import ManifestError, UsageError
from shardpoint.manifest import decode_document, encode_document

EXTRA_STATE_NAME = "extra_state.json"


def rank_document(directory: str, rank: int) -> str:
    """Return the path of one rank's document."""
    return f"{directory}/rank-{rank:05d}.json"


def join(*parts: str) -> str:
    """Join the components of a path, leaving out the empty ones."""
    return "/".join(part for part in parts if part)


def sampler_document(sampler: Any, path: str) -> bytes:
    """Return a sampler's or loader's state as a document.

    Raises:
        UsageError: it has no `state_dict`, or its state cannot come back exactly; the value's place is named.
    """
    kind = type(sampler).__name__
    if not callable(getattr(sampler, "state_dict", None)):
        text = f"{path}: a {kind} has no state_dict: give the sampler that it reads from, or a StatefulDataLoader"
        raise UsageError(text)
    try:
        return encode_document(plain_values(sampler.state_dict(), path))
    except UsageError as error:
        text = f"{path}: the state of the {kind} cannot be saved: {error}"
        raise UsageError(text) from error


def scheduler_document(lr_scheduler: Any, path: str) -> bytes:
    """Return a scheduler's class and state as a document.

    Raises:
        UsageError: it has no `state_dict`, or its state cannot come back exactly.
    """
    if not hasattr(lr_scheduler, "state_dict"):
        text = f"{path}: {type(lr_scheduler).__name__} has no state_dict"
        raise UsageError(text)
    values = plain_values(lr_scheduler.state_dict(), path)
    return encode_document({"class": scheduler_class(lr_scheduler), "state": values})


def scheduler_class(lr_scheduler: Any) -> str:
    """Return a scheduler's class, with those of the schedulers that it is made of: `SequentialLR(LinearLR, StepLR)`."""
    children = getattr(lr_scheduler, "_schedulers", None)
    name = type(lr_scheduler).__name__
    if not isinstance(children, list | tuple):
        return name
    return f"{name}({', '.join(scheduler_class(child) for child in children)})"


def scheduler_state(lr_scheduler: Any, data: bytes, path: str) -> tuple[Any, str | None]:
    """Return the state in a scheduler's document, and what is wrong with it for this scheduler, if anything.

    A scheduler takes over whatever its `load_state_dict` is given, so another class's state would be half used in
    silence.

    Raises:
        ManifestError: the document is not a scheduler's.
    """
    document = decode_document(data, path)
    if not isinstance(document, dict) or set(document) != {"class", "state"}:
        raise ManifestError(f"{path} is not the document of a scheduler", key=path)
    stored, live = document["class"], scheduler_class(lr_scheduler)
    problem = f"{path}: the state of {stored}, the target is {live}" if stored != live else None
    return live_values(document["state"]), problem


@dataclass(frozen=True, slots=True)
class ExtraStates:
    """What modules keep outside their tensors, as a checkpoint has it.

    Attributes:
        missing: (name, line) of modules of the target that the checkpoint has none for; the name as torch's state dict
            has it, `<module>._extra_state`.
        unexpected: the same of modules that the checkpoint has some for and that are not in the target.
    """

    missing: list[tuple[str, str]]
    unexpected: list[tuple[str, str]]
    _named: NamedModule
    _values: dict[str, Any]

    def install(self) -> None:
        """Put it back, where both have it."""
        for name, module in self._named.extra_states.items():
            if name in self._values:
                module.set_extra_state(self._values[name])


def match_extra_states(named: NamedModule, data: bytes | None, part: str) -> ExtraStates:
    """Compare a model's `get_extra_state` modules with a checkpoint's.

    Args:
        named: the model; not changed.
        data: the part's document, or None where it has none.
        part: the part of the checkpoint.

    Raises:
        ManifestError: the document is not one.
    """
    values = live_values(decode_document(data, join(part, EXTRA_STATE_NAME))) if data is not None else {}
    if not isinstance(values, dict):
        raise ManifestError(
            f"{join(part, EXTRA_STATE_NAME)} is not a table of modules", key=join(part, EXTRA_STATE_NAME)
        )

    def told(names: Iterable[str]) -> list[tuple[str, str]]:
        return [(f"{name}._extra_state", f"{part}: extra state of {name}") for name in names]

    missing = told(name for name in named.extra_states if name not in values)
    unexpected = told(name for name in values if name not in named.extra_states)
    return ExtraStates(missing, unexpected, named, values)
