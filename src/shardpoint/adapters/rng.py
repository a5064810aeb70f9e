"""How the random state of a rank is read and put back: python, numpy, torch, and the current CUDA device.

It is restored last, so that nothing that a resume does draws from it. Only the current CUDA device's state is kept:
asking for all of them would make a context on each.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from shardpoint.adapters.tensors import from_raw, raw_tensor
from shardpoint.checksum import crc64, to_hex
from shardpoint.errors import ManifestError
from shardpoint.manifest import encode_document


def read_rng() -> dict[str, Any]:
    """Return this process's random state as a document's value."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global generator is what is to be restored
        "torch": raw_tensor(torch.get_rng_state(), "torch's random state"),
        "cuda": None,
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = raw_tensor(torch.cuda.get_rng_state(), "CUDA's random state")
    return state


def write_rng(state: dict[str, Any], key: str) -> None:
    """Put a random state back.

    Args:
        state: what `read_rng` returned.
        key: the document, for an error.

    Raises:
        ManifestError: the document is not a random state.
    """
    try:
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
        torch.set_rng_state(from_raw(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(from_raw(state["cuda"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        text = f"{key} is not a random state: {error!r}"
        raise ManifestError(text, key=key) from error


def rng_digest() -> str:
    """Return the CRC-64/NVME of this process's random state, as 16 hex digits; it draws nothing."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
    crc = crc64(np.array(words, dtype=np.uint32).tobytes())
    crc = crc64(np.ascontiguousarray(legacy["state"]["key"]).tobytes(), crc)
    rest = (gauss, legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"])
    crc = crc64(repr(rest).encode(), crc)
    crc = crc64(torch.get_rng_state().numpy().tobytes(), crc)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        crc = crc64(torch.cuda.get_rng_state().numpy().tobytes(), crc)
    return to_hex(crc)


def rng_differences(stored: dict[str, Any], key: str) -> list[str]:
    """Return in what this process's random state differs from a stored one, one line for each generator.

    Args:
        stored: what `read_rng` returned.
        key: the document, for the lines.
    """
    live = read_rng()
    names = [
        name for name in ("python", "numpy", "torch", "cuda") if live[name] is not None and stored[name] is not None
    ]
    return [
        f"{key}: the random state of {name} is not the one that was saved"
        for name in names
        if encode_document(live[name]) != encode_document(stored[name])
    ]


def derive_rng(document: bytes, rank: int) -> None:
    """Seed this process for a rank that was not there when the checkpoint was written.

    The seed is a function of rank 0's stored state and of the rank: the same on every resume, different on every rank.

    Args:
        document: rank 0's stored state.
        rank: this rank.
    """
    digest = hashlib.sha256(document + rank.to_bytes(8, "little")).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))  # noqa: NPY002 - as above
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
