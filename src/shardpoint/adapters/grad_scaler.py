"""How a grad scaler's state becomes a document, and whether a live scaler can take a stored one over, and has."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from shardpoint.adapters.state import TrainState
from shardpoint.adapters.tensors import live_values, plain_values
from shardpoint.errors import ManifestError, UsageError
from shardpoint.manifest import decode_document, encode_document

GRAD_SCALER_NAME = "grad_scaler.json"

_attached: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()


def attach_scaler(optimizer: Optimizer, grad_scaler: Any) -> None:
    """Make an optimizer's scaler part of every state that has the optimizer, as long as the optimizer lives."""
    _attached[optimizer] = grad_scaler


def scaler_of(state: TrainState) -> Any:
    """Return the scaler that belongs to a state: its own, or the one attached to its optimizer; None without one.

    Raises:
        UsageError: it has both, and they are not the same.
    """
    attached = None if state.optimizer is None else _attached.get(state.optimizer)
    if attached is None:
        return state.grad_scaler
    if state.grad_scaler is not None and state.grad_scaler is not attached:
        raise UsageError(
            "the state has a grad_scaler, and its optimizer is scaled by the Booster already (fp16): leave grad_scaler "
            "out, the Booster's own is saved and restored with the optimizer"
        )
    return attached


def scaler_document(grad_scaler: Any, path: str) -> bytes:
    """Return a grad scaler's state as a document.

    Raises:
        UsageError: it has no `state_dict`, or its state cannot come back exactly.
    """
    if not callable(getattr(grad_scaler, "state_dict", None)):
        raise UsageError(f"{path}: a {type(grad_scaler).__name__} has no state_dict: give a torch.amp.GradScaler")
    return encode_document({"state": plain_values(grad_scaler.state_dict(), path)})


def scaler_state(data: bytes, path: str) -> dict[str, Any]:
    """Return the state in a document.

    Raises:
        ManifestError: it is not that of a grad scaler.
    """
    document = decode_document(data, path)
    if not isinstance(document, dict) or not isinstance(document.get("state"), dict):
        raise ManifestError(f"{path} is not the document of a grad scaler", key=path)
    values: dict[str, Any] = live_values(document["state"])
    return values


def scaler_problem(grad_scaler: Any, stored: dict[str, Any]) -> str | None:
    """Return why a scaler cannot take a state over, if it cannot.

    A disabled scaler has an empty state and ignores any that it is given, in silence.
    """
    live = grad_scaler.state_dict()
    if live.keys() == stored.keys():
        return None
    told = [f"has the state {sorted(keys)}" if keys else "is disabled" for keys in (stored, live)]
    return f"the stored grad scaler {told[0]}, the target's {told[1]}: make it as it was (enabled=...)"


def scaler_differences(grad_scaler: Any, stored: dict[str, Any], path: str) -> Iterator[str]:
    """Yield in what a scaler differs from the state that it was given."""
    live = grad_scaler.state_dict()
    for key, value in stored.items():
        if key not in live or encode_document(plain_values(live[key], path)) != encode_document(
            plain_values(value, path)
        ):
            yield f"{path}: {key} was {value} and is {live.get(key, 'not there')}"
