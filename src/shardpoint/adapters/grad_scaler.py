"""How a grad scaler's state becomes a document, and whether a live scaler can take a stored one over, and has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shardpoint.adapters.tensors import live_values, plain_values
from shardpoint.errors import ManifestError, UsageError
from shardpoint.manifest import decode_document, encode_document

GRAD_SCALER_NAME = "grad_scaler.json"


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
