"""What the bytes of one safetensors file are: a header that is known before any data, and a reader that refuses holes.

The header is padded with spaces so that the data area starts on a 4096-byte boundary. Tensors are ordered by the
largest power of two (up to 4096) that divides their size, greatest first: then every tensor starts at a multiple of its
own element size, and one whose size is a multiple of 4096 starts at one, without a filler byte.

Source: safetensors format 0.8; docs/spec/FORMAT.md, "Tensor files".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardpoint.dtypes import ITEMSIZE_BYTES, MAX_SIZE, sized_bytes, tensor_bytes
from shardpoint.errors import ManifestError, TruncatedError, UsageError
from shardpoint.manifest.codec import parse_strict_json

DATA_ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: its key in the file.
        dtype: its stored dtype.
        shape: its stored shape.
        byte_offset: where its bytes start, from the start of the file.
        num_bytes: how many they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    byte_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A whole file's layout.

    Attributes:
        header: the bytes before the data area, its own length included.
        tensors: in offset order.
        num_bytes: the size of the file.
        metadata: the texts of `__metadata__`.
    """

    header: bytes
    tensors: tuple[StoredTensor, ...]
    num_bytes: int
    metadata: dict[str, str]


def alignment_bytes(num_bytes: int) -> int:
    """Return the largest power of two up to 4096 that divides a size.

    Examples:
        >>> [alignment_bytes(n) for n in (0, 3, 12, 8192)]
        [4096, 1, 4, 4096]
    """
    return min(num_bytes & -num_bytes, DATA_ALIGNMENT_BYTES) or DATA_ALIGNMENT_BYTES


def layout_file(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FileLayout:
    """Lay out one file.

    Args:
        tensors: (name, stored dtype, stored shape); names must differ.
        metadata: texts for `__metadata__`, beside `{"format": "pt"}`.

    Returns:
        The layout; tensors of one alignment keep the given order.

    Raises:
        UsageError: two tensors have one name, one is called `__metadata__` or not in UTF-8, or the header would be over
            100 MB.
    """
    sized = [(name, dtype, shape, tensor_bytes(dtype, shape)) for name, dtype, shape in tensors]
    sized.sort(key=lambda item: -alignment_bytes(item[3]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, dtype, shape, num_bytes in sized:
        if name in entries:
            message = f"a tensor file cannot have {name!r} twice, nor a tensor called '__metadata__': rename it"
            raise UsageError(message)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        message = f"a tensor's name cannot be written as UTF-8: {error}"
        raise UsageError(message) from error
    padded_bytes = -(-(_LENGTH_BYTES + len(text)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES
    text = text.ljust(padded_bytes - _LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        message = (
            f"a header of {len(text)} bytes for {len(sized)} tensors is over the format's limit of {MAX_HEADER_BYTES}: "
            "give a smaller greatest file size"
        )
        raise UsageError(message)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    stored = tuple(
        StoredTensor(name, dtype, shape, padded_bytes + entries[name]["data_offsets"][0], num_bytes)
        for name, dtype, shape, num_bytes in sized
    )
    return FileLayout(header, stored, padded_bytes + position, entries["__metadata__"])


def header_size_bytes(first_bytes: bytes, file_bytes: int, key: str) -> int:
    """Return how many bytes a file's header takes, its own length included.

    Args:
        first_bytes: the first 8 bytes of the file.
        file_bytes: its size.
        key: what it is called in an error.

    Raises:
        TruncatedError: the file is too short for its header.
        ManifestError: the header is larger than 100 MB.
    """
    if len(first_bytes) < _LENGTH_BYTES:
        text = f"{key} has {file_bytes} bytes: too short for a safetensors file"
        raise TruncatedError(text, key=key)
    length = int.from_bytes(first_bytes[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        text = f"{key} claims a header of {length} bytes, over the format's limit of {MAX_HEADER_BYTES}"
        raise ManifestError(text, key=key)
    if _LENGTH_BYTES + length > file_bytes:
        text = f"{key} has {file_bytes} bytes, but its header alone takes {_LENGTH_BYTES + length}"
        raise TruncatedError(text, key=key)
    return _LENGTH_BYTES + length


def parse_header(header: bytes, file_bytes: int, key: str) -> FileLayout:
    """Return the layout that a header describes, refusing everything that is not exact.

    Refused, although the safetensors library lets it through: duplicate names, a leading space, fields that the format
    does not have, tensors that do not start at a multiple of their element size. Refused as there: holes, overlaps, a
    trailer, unknown dtypes, sizes that do not fit.

    Args:
        header: the file's first bytes, as many as `header_size_bytes` says.
        file_bytes: the file's size.
        key: what the file is called in an error.

    Raises:
        ManifestError: the header is not exact.
        TruncatedError: the file is shorter or longer than its header says.
    """
    text = header[_LENGTH_BYTES:]
    if not text.startswith(b"{"):
        message = f"{key}: the header does not begin with an opening brace"
        raise ManifestError(message, key=key)
    tree = parse_strict_json(text, key)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        message = f"{key}: __metadata__ is not an object of strings"
        raise ManifestError(message, key=key)
    tensors = sorted(
        (_parse_tensor(name, fields, len(header), key) for name, fields in tree.items()),
        key=lambda tensor: (tensor.byte_offset, tensor.num_bytes),
    )
    position = len(header)
    for tensor in tensors:
        if tensor.byte_offset != position:
            place = f"{key}: tensor {tensor.name} starts at byte {tensor.byte_offset}"
            message = f"{place}, expected {position}: a hole or overlap"
            raise ManifestError(message, key=key)
        position += tensor.num_bytes
    if position != file_bytes:
        message = f"{key} has {file_bytes} bytes, but its header describes {position}"
        raise TruncatedError(message, key=key, expected=str(position), actual=str(file_bytes))
    return FileLayout(header, tuple(tensors), file_bytes, metadata)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _parse_tensor(name: str, fields: Any, data_start: int, key: str) -> StoredTensor:
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        message = f"{key}: tensor {name} has the fields {found}, expected {sorted(_FIELDS)}"
        raise ManifestError(message, key=key)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    known = isinstance(dtype, str) and dtype in ITEMSIZE_BYTES
    if not known or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin, end
        message = f"{key}: tensor {name} has a dtype, shape or offsets that the format does not have: {fields}"
        raise ManifestError(message, key=key)
    num_bytes = sized_bytes(dtype, tuple(shape))
    if num_bytes is None or offsets[1] - offsets[0] != num_bytes:
        needed = "more bytes than any file has" if num_bytes is None else f"{num_bytes} bytes"
        message = f"{key}: tensor {name} of {dtype} {shape} needs {needed}, its offsets give {offsets}"
        raise ManifestError(message, key=key)
    if (data_start + offsets[0]) % ITEMSIZE_BYTES[dtype]:
        message = f"{key}: tensor {name} starts at byte {data_start + offsets[0]}, no multiple of its element size"
        raise ManifestError(message, key=key)
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], num_bytes)
