"""What the `.metadata` of a DCP checkpoint says, read without running anything that it names.

`.metadata` is a pickle, and torch itself reads it with `pickle.load`, which runs whatever the file asks for. Here an
unpickler that knows the names of DCP's own classes and nothing else makes plain records of them, one set of stand-in
classes for each file, so that not even torch's classes are touched. Any other name ends the reading. What the records
say is then checked against the files that are there before a tensor is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardpoint.errors import ManifestError, NotFoundError, TruncatedError, UnsupportedFormatError

METADATA_NAME = ".metadata"

_PACKAGE = "torch.distributed.checkpoint"
_RECORDS = frozenset(
    {
        (f"{_PACKAGE}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {(f"{_PACKAGE}.filesystem", "_StorageInfo")}
)
_PATHS = frozenset(
    (module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "WindowsPath")
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Under which keys of a DCP checkpoint's dict things lie.

    Attributes:
        model: the model's state dict; `""` where its tensors lie at the top.
        optimizer: the optimizer's, as torch's `get_optimizer_state_dict` makes it, nested or flattened.
    """

    model: str = "model"
    optimizer: str = "optimizer"


DEFAULT_KEYS = Keys()


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part of a tensor, or a value, is stored.

    Attributes:
        offsets: where the part begins in the tensor.
        lengths: its shape.
        file: name of the file.
        byte_offset: where the part's archive begins in it.
        num_bytes: the archive's length.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    file: str
    byte_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry of a DCP checkpoint.

    Attributes:
        key: its flat name.
        path: the keys that lead to it in the nested state dict.
        dtype: of a tensor; None for any other value.
        shape: of the whole tensor.
        pieces: parts that cover it exactly once; of a value the one place where it lies.
    """

    key: str
    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """The pickle names something that no DCP checkpoint needs."""


def read_metadata(directory: Path) -> dict[str, Stored]:
    """Return what a DCP checkpoint holds, by flat name.

    Args:
        directory: the checkpoint.

    Raises:
        NotFoundError: there is no `.metadata`.
        UnsupportedFormatError: it names anything but DCP's own classes, or uses a feature that is not read.
        ManifestError: it is no pickle of DCP's metadata, or contradicts itself.
        TruncatedError: a file that it names is missing or too short.
    """
    place = directory / METADATA_NAME
    try:
        data = place.read_bytes()
    except FileNotFoundError as error:
        text = f"{directory} has no {METADATA_NAME}: it is no DCP checkpoint, or its save never ended"
        raise NotFoundError(text) from error
    try:
        root = _unpickler(data).load()
    except _Refused as error:
        text = f"{place} was refused: it names {error}, which is none of DCP's classes; nothing was run"
        raise UnsupportedFormatError(text) from error
    except Exception as error:
        # Damaged bytes raise whatever they happen to mean: UnpicklingError, EOFError, TypeError, IndexError, ...
        text = f"{place} cannot be read as DCP's metadata ({type(error).__name__}: {error})"
        raise ManifestError(text, key=METADATA_NAME) from error
    try:
        found = _entries(root)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        text = f"{place} does not have the form of DCP's metadata ({type(error).__name__}: {error})"
        raise ManifestError(text, key=METADATA_NAME) from error
    _check_files(directory, found)
    return found


def _unpickler(data: bytes) -> pickle._Unpickler:
    class Record:
        """Attributes, as the pickle gives them."""

        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                self.__dict__.update(state)
            else:
                self.arguments = state

    def as_tuple(values: Any = ()) -> tuple[Any, ...]:
        return tuple(values)

    def as_record(*arguments: Any) -> Record:
        return Record(*arguments)

    known: dict[tuple[str, str], Any] = {name: type(name[1], (Record,), {}) for name in _RECORDS}
    known |= dict.fromkeys(_PATHS, as_record) | {("torch.serialization", "_get_layout"): as_record}
    known["torch", "Size"] = as_tuple

    # The one written in Python: the other one's memo is an array, as long as the largest number that the file names.
    class Unpickler(pickle._Unpickler):  # noqa: SLF001 - the standard library's own name for it
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in known:
                return known[module, name]
            dtype = vars(torch).get(name) if module == "torch" else None
            if isinstance(dtype, torch.dtype):
                return dtype
            raise _Refused(f"{module}.{name}")

    return Unpickler(io.BytesIO(data))


def _entries(root: Any) -> dict[str, Stored]:
    paths = getattr(root, "planner_data", None) or {}
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in dict(root.storage_data).items():
        offset = None if getattr(index, "offset", None) is None else _numbers(index.offset)
        if (index.fqn, offset) in places:
            raise ValueError(f"{index.fqn} is stored twice at {offset}")
        places[index.fqn, offset] = info
    found: dict[str, Stored] = {}
    for key, entry in dict(root.state_dict_metadata).items():
        if not isinstance(key, str):
            raise TypeError(f"the name {key!r} is no text")
        path = paths.get(key, (key,))
        if not isinstance(path, tuple) or not path or not all(isinstance(item, (str, int)) for item in path):
            raise ValueError(f"{key} has no path of names")
        if not hasattr(entry, "chunks"):
            found[key] = Stored(key, path, None, (), (_piece(places[key, None], key, (), ()),))
            continue
        dtype = entry.properties.arguments[0]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{key} has the dtype {dtype!r}")
        shape = _numbers(entry.size)
        chunks = [(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in entry.chunks]
        pieces = tuple(
            _piece(places[key, offsets], key, offsets, lengths) for offsets, lengths in chunks if math.prod(lengths)
        )
        _check_cover(key, shape, pieces)
        found[key] = Stored(key, path, dtype, shape, pieces)
    return found


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers!r} is no shape or offset")
    return numbers


def _piece(info: Any, key: str, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Piece:
    if getattr(info, "transform_descriptors", None):
        text = f"{key} was transformed when it was written ({info.transform_descriptors}): that is not read"
        raise UnsupportedFormatError(text)
    file = info.relative_path
    if not isinstance(file, str) or file in ("", ".", "..") or "\0" in file or Path(file).name != file:
        raise ValueError(f"{key} lies in {file!r}, which is no name of a file in the checkpoint")
    byte_offset, num_bytes = _numbers((info.offset, info.length))
    return Piece(offsets, lengths, file, byte_offset, num_bytes)


def _check_cover(key: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    """Refuse parts that do not cover a tensor exactly once."""
    starts = np.array([piece.offsets for piece in pieces], dtype=np.int64).reshape(len(pieces), -1)
    lengths = np.array([piece.lengths for piece in pieces], dtype=np.int64).reshape(len(pieces), -1)
    if pieces and (starts.shape[1] != len(shape) or lengths.shape[1] != len(shape)):
        raise ValueError(f"{key}: a part has another number of dims than the tensor")
    stops = starts + lengths
    if pieces and (stops > np.array(shape, dtype=np.int64)).any():
        raise ValueError(f"{key}: a part reaches beyond the tensor")
    for number in range(len(pieces)):
        later = slice(number + 1, None)
        apart = (starts[later] >= stops[number]) | (stops[later] <= starts[number])
        if not apart.any(axis=1).all():
            raise ValueError(f"{key}: two parts overlap")
    if sum(math.prod(piece.lengths) for piece in pieces) != math.prod(shape):
        raise ValueError(f"{key}: the parts do not cover the tensor of shape {list(shape)}")


def _check_files(directory: Path, found: dict[str, Stored]) -> None:
    sizes: dict[str, int] = {}
    for stored in found.values():
        for piece in stored.pieces:
            if piece.file not in sizes:
                path = directory / piece.file
                if not path.is_file():
                    text = f"{piece.file} of {directory} is missing, though {METADATA_NAME} names it"
                    raise TruncatedError(text, key=piece.file, expected="a file", actual="nothing")
                sizes[piece.file] = path.stat().st_size
            stop = piece.byte_offset + piece.num_bytes
            if stop > sizes[piece.file]:
                text = f"{piece.file} of {directory} has {sizes[piece.file]} bytes, and {stored.key} ends at {stop}"
                raise TruncatedError(text, key=piece.file, expected=str(stop), actual=str(sizes[piece.file]))
        if stored.dtype is not None:
            # Order: before memory for it is asked for. A file cannot hold more than its own size.
            held, wanted = sum(piece.num_bytes for piece in stored.pieces), math.prod(stored.shape)
            if wanted * stored.dtype.itemsize > held:
                text = f"{stored.key} of {directory} has {wanted} values, and its parts only {held} bytes"
                raise ManifestError(text, key=METADATA_NAME)
