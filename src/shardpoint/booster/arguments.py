"""What the Booster's persistence methods can honour of ColossalAI's arguments, and which path they mean."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shardpoint.errors import UsageError

_MIB = 1024 * 1024
_EXECUTABLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def refuse(*, gather_dtensor: bool, use_async: bool) -> None:
    """Refuse what would not store whole tensors, or would return before they are durable.

    Raises:
        UsageError: one of the two is asked for.
    """
    if not gather_dtensor:
        raise UsageError(
            "gather_dtensor=False: Shardpoint always stores whole tensors, written in parallel; leave it out"
        )
    if use_async:
        raise UsageError("use_async=True: these methods return when the data is durable; leave it out")


def file_bytes(size_per_shard: object) -> int:
    """Return the largest size of a file, given in MiB, in bytes.

    Raises:
        UsageError: it is not a positive, finite number.
    """
    if isinstance(size_per_shard, bool) or not isinstance(size_per_shard, int | float) or not size_per_shard > 0:
        raise UsageError(f"size_per_shard={size_per_shard!r} is not a positive number of MiB")
    if size_per_shard == float("inf"):
        raise UsageError("size_per_shard is infinite; for one file, say shard=False")
    return max(1, int(size_per_shard * _MIB))


def path(checkpoint: str | os.PathLike[str]) -> Path:
    """Return a path.

    Raises:
        UsageError: it is none, or empty.
    """
    try:
        text = os.fspath(checkpoint)
    except TypeError as error:
        raise UsageError(f"checkpoint is a {type(checkpoint).__name__}, not a path") from error
    if not text:
        raise UsageError("checkpoint is an empty path")
    return Path(text)


def directory_path(checkpoint: str | os.PathLike[str], prefix: str | None) -> Path:
    """Return the path of a directory whose files have a prefix.

    Raises:
        UsageError: it is no path, or the prefix cannot stand in a file's name.
    """
    if prefix is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", prefix):
        raise UsageError(f"prefix={prefix!r} becomes part of file names: use letters, digits, '_', '-' and '.'")
    return path(checkpoint)


def file_path(checkpoint: str | os.PathLike[str], prefix: str | None, wanted: str = "*.safetensors") -> Path:
    """Return the path of one file.

    Raises:
        UsageError: it is no path, a prefix is given, or the name promises a pickle.
    """
    file = path(checkpoint)
    if prefix is not None:
        raise UsageError(f"prefix={prefix!r} names the files of a directory; it has no meaning with shard=False")
    if file.suffix in _EXECUTABLE_SUFFIXES:
        raise UsageError(
            f"{file.name}: a name in {file.suffix} promises a pickle; what Shardpoint writes is never executable: "
            f"name it {wanted}"
        )
    return file
