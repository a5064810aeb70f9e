"""Where the tensors of a file lie that `torch.save` made: nothing of it is executed, and no tensor is read.

Such a file is a zip archive without compression, so each tensor's bytes are contiguous in it, at an offset that torch
tells. They can be read like those of any other tensor file: by runs, by threads, each rank only its part.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardpoint.adapters.tensors import dtype_name
from shardpoint.errors import NotFoundError, TruncatedError, UnsupportedFormatError

_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Located:
    """One tensor of a file.

    Attributes:
        dtype: logical name.
        shape: its shape.
        byte_offset: where its bytes start in the file.
        num_bytes: how many there are.
    """

    dtype: str
    shape: tuple[int, ...]
    byte_offset: int
    num_bytes: int


def read_values(file: str | io.BytesIO, place: str) -> Any:
    """Return what a file holds; nothing of it is executed.

    Args:
        file: a path on a local filesystem, whose tensors are mapped, not read; or the bytes.
        place: for messages.

    Raises:
        NotFoundError: it is not there.
        TruncatedError: it is not a whole archive.
        UnsupportedFormatError: it holds something that is neither a tensor nor plain data, or is compressed.
    """
    try:
        _refuse_compressed(file, place)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, str))
    except FileNotFoundError as error:
        raise NotFoundError(f"{place} is not there") from error
    except UnsupportedFormatError:
        raise
    except Exception as error:
        # torch raises RuntimeError, EOFError, UnpicklingError, ... without telling damage from what it refuses.
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            text = f"{place} holds more than tensors and plain data, which loading would execute: {_first_line(error)}"
            raise UnsupportedFormatError(text) from error
        text = f"{place} cannot be read as a file of torch.save: {_first_line(error)}. Load another checkpoint"
        raise TruncatedError(text, key=place, expected="a whole archive", actual=type(error).__name__) from error


def _refuse_compressed(file: str | io.BytesIO, place: str) -> None:
    """Refuse an archive with a record whose bytes are not those of the tensor.

    torch tells the place of a compressed one as if it were plain, and gives one that it inflates as much memory as that
    asks for.

    Raises:
        UnsupportedFormatError: there is one.
        BadZipFile: it begins as an archive and is none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                    raise UnsupportedFormatError(
                        f"{place} has the compressed record {record.filename}, which torch.save never writes: load it "
                        "with torch, and save it again"
                    )
    except zipfile.BadZipFile:
        with nullcontext(file) if isinstance(file, io.BytesIO) else Path(file).open("rb") as opened:
            opened.seek(0)
            if opened.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:  # torch may see an archive where this reader sees none
                raise
    if isinstance(file, io.BytesIO):
        file.seek(0)


def locate_tensors(path: str, place: str) -> dict[Any, Any]:
    """Return a file's dict, with a `Located` in place of each tensor, at the top or one dict below.

    Args:
        path: on a local filesystem.
        place: for messages.

    Raises:
        NotFoundError: it is not there.
        TruncatedError: it is not a whole archive.
        UnsupportedFormatError: it is not a dict, or a tensor's elements do not lie one after the other.
    """
    with FakeTensorMode():
        values = read_values(path, place)
        if not isinstance(values, Mapping):
            raise UnsupportedFormatError(f"{place} holds a {type(values).__name__}, not tensors by name")
        return {key: _located(value, f"{place}: {key}") for key, value in values.items()}


def _located(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _located(item, f"{place} [{key}]") for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or not value.is_contiguous():
        text = (
            f"{place} is not stored element after element (its strides are {value.stride()}): load it with the library "
            "that wrote it, make it contiguous, and save again"
        )
        raise UnsupportedFormatError(text)
    num_bytes = value.numel() * value.element_size()
    start = offset + value.storage_offset() * value.element_size()
    return Located(dtype_name(value.dtype, place), tuple(value.shape), start, num_bytes)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
