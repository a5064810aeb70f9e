"""How Python values become JSON and come back exactly as they were.

Plain JSON loses tuples, non-string keys, non-finite floats and arrays: it turned `MultiStepLR`'s integer keys into
strings and a learning rate of 0.001 into 0.1, silently. So whatever JSON has no form for is an object with one key that
starts with `$`; everything else is ordinary JSON that a person can read. What cannot come back exactly is refused on
encoding.

Source: docs/spec/FORMAT.md, "Documents".
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from shardpoint.dtypes import MAX_SIZE, sized_bytes, stored_form
from shardpoint.errors import ManifestError, UnsupportedFormatError, UsageError

MAX_DEPTH = 64
MAX_BRACKETS = 2 * MAX_DEPTH + 4

# A string that is never closed is one token up to the end: trying again from its every character would take quadratic
# time, which an attacker would choose.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MAX_DIMS = 32  # of an array: what every numpy allows
_ARRAY_DTYPES = frozenset(
    ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")
)


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A small tensor inside a document: its logical dtype name, its shape, its row-major little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_document(value: object) -> bytes:
    """Return a value as UTF-8 JSON that `decode_document` turns back into an equal value of the same types.

    Args:
        value: None, bool, int, float, str, bytes, complex, list, tuple, dict, `Counter`, set, numpy arrays and scalars
            of bool, integer, float or complex kind (no long doubles), `RawTensor`, nested to a depth of 64. An
            `OrderedDict` comes back as a dict of the same order, an array in native byte order.

    Raises:
        UsageError: a value of another type, or too deep, or too large; the message gives its place where it has one.
    """
    tree = _encode(value, "$", 0)
    try:
        dense = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        text = f"a value cannot be written as JSON in UTF-8: {error}"
        raise UsageError(text) from error
    if _is_too_deep(dense):
        # Tags take brackets too: what a reader refuses is not written.
        text = f"the value is nested deeper than the {MAX_BRACKETS} levels of brackets that a document may have"
        raise UsageError(text)
    # json indents in Python, many times slower.
    return msgspec.json.format(dense, indent=1) + b"\n"


def _encode(value: Any, place: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        text = f"the value at {place} is nested deeper than {MAX_DEPTH} levels"
        raise UsageError(text)
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](value, place, depth)
    if kind in _LEAVES:
        return _LEAVES[kind](value)
    if kind is np.ndarray or isinstance(value, np.generic):
        little = np.asarray(value)
        little = little.astype(little.dtype.newbyteorder("<"), copy=False)
        if little.dtype.str in _ARRAY_DTYPES:
            fields = {
                "dtype": little.dtype.str,
                "shape": list(little.shape),
                "data": base64.b64encode(little.tobytes()).decode(),
            }
            return {"$array" if kind is np.ndarray else "$scalar": fields}
    text = (
        f"the value at {place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: give plain "
        "Python numbers, strings, lists, tuples, dicts, sets, bytes, or numpy arrays"
    )
    raise UsageError(text)


def _encode_items(value: list[Any] | tuple[Any, ...], place: str, depth: int) -> list[Any]:
    return [_encode(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]


def _encode_dict(value: dict[Any, Any], place: str, depth: int) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
    return {"$dict": _encode_pairs(value, place, depth)}


def _encode_pairs(value: dict[Any, Any], place: str, depth: int) -> list[Any]:
    return [
        [_encode(key, f"{place}.<key>", depth + 1), _encode(item, f"{place}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]


def _encode_set(value: set[Any], place: str, depth: int) -> Any:
    encoded = [_encode(item, f"{place}{{}}", depth + 1) for item in value]
    return {"$set": sorted(encoded, key=lambda item: json.dumps(item, sort_keys=True))}


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _encode_tensor(value: RawTensor) -> Any:
    fields = {"dtype": value.dtype, "shape": list(value.shape), "data": base64.b64encode(value.data).decode()}
    try:
        _check_tensor(fields, value.data)
    except ValueError as error:
        text = f"a tensor of {value.dtype} {list(value.shape)} with {len(value.data)} bytes: {error}"
        raise UsageError(text) from error
    return {"$tensor": fields}


_CONTAINERS: dict[type, Callable[[Any, str, int], Any]] = {
    list: _encode_items,
    tuple: lambda value, place, depth: {"$tuple": _encode_items(value, place, depth)},
    dict: _encode_dict,
    OrderedDict: _encode_dict,
    Counter: lambda value, place, depth: {"$counter": _encode_pairs(value, place, depth)},
    set: _encode_set,
}
_LEAVES: dict[type, Callable[[Any], Any]] = {
    float: _encode_float,
    complex: lambda value: {"$complex": [_encode_float(value.real), _encode_float(value.imag)]},
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    RawTensor: _encode_tensor,
}


def _is_too_deep(data: bytes) -> bool:
    brackets = np.frombuffer(_STRINGS.sub(b"", data).translate(None, _NOT_BRACKETS), dtype=np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    depths = np.cumsum(np.where(opening, 1, -1))
    return bool(len(depths)) and int(depths.max()) > MAX_BRACKETS


def parse_strict_json(data: bytes, key: str) -> Any:
    """Parse JSON, refusing what JSON readers disagree about.

    Refused: duplicate keys, NaN and Infinity, numbers that no float holds, lone surrogates, and over 132 levels of
    brackets (checked before parsing).

    Args:
        data: the document.
        key: what it is called in an error.

    Raises:
        ManifestError: the bytes are not such JSON.
    """
    if _is_too_deep(data):
        text = f"{key} is nested deeper than {MAX_BRACKETS} levels: it was not written by Shardpoint"
        raise ManifestError(text, key=key)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            text = f"duplicate keys {names}"
            raise ValueError(text)
        return result

    def refuse_constant(name: str) -> None:
        text = f"{name} is not JSON"
        raise ValueError(text)

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            text = f"{digits[:40]} is beyond any float"
            raise ValueError(text)
        return value

    try:
        tree = json.loads(
            data.decode(), object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant, parse_float=finite
        )
        if _SURROGATE.search(data):
            json.dumps(tree, ensure_ascii=False).encode()  # refuses a surrogate without its other half
    except ValueError as error:
        text = f"{key} is not valid JSON ({error}): the file is damaged or was not written by Shardpoint"
        raise ManifestError(text, key=key) from error
    return tree


def decode_document(data: bytes, key: str = "document") -> Any:
    """Return the value that `encode_document` encoded.

    Args:
        data: the document.
        key: what it is called in an error.

    Raises:
        ManifestError: the bytes are not a document.
    """
    tree = parse_strict_json(data, key)
    try:
        return _decode(tree)
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        text = f"{key} holds a malformed value ({error}): the file is damaged or was not written by Shardpoint"
        raise ManifestError(text, key=key) from error


def _decode(value: Any) -> Any:
    if type(value) is list:
        return [_decode(item) for item in value]
    if type(value) is not dict:
        return value
    tags = [name for name in value if name.startswith("$")]
    if not tags:
        return {name: _decode(item) for name, item in value.items()}
    if len(value) != 1:
        text = f"an object with the tag {tags[0]} has other keys too"
        raise ValueError(text)
    decoder = _DECODERS.get(tags[0])
    if decoder is None:
        text = f"unknown tag {tags[0]}"
        raise ValueError(text)
    return decoder(value[tags[0]])


def _list(body: Any, length: int | None = None) -> list[Any]:
    if type(body) is not list or (length is not None and len(body) != length):
        text = f"a list {'' if length is None else f'of {length} '}is expected"
        raise ValueError(text)
    return body


def _decode_pairs(body: Any) -> dict[Any, Any]:
    pairs = [(_decode(key), _decode(item)) for key, item in (_list(pair, 2) for pair in _list(body))]
    result = dict(pairs)
    if len(result) != len(pairs):
        text = "duplicate keys"
        raise ValueError(text)
    return result


def _decode_set(body: Any) -> set[Any]:
    items = [_decode(item) for item in _list(body)]
    if len(set(items)) != len(items):
        text = "a set has a value twice"
        raise ValueError(text)
    return set(items)


def _decode_complex(body: Any) -> complex:
    real, imag = (_decode(item) for item in _list(body, 2))
    if type(real) is not float or type(imag) is not float:
        text = "a complex number is not a pair of floats"
        raise ValueError(text)
    return complex(real, imag)


def _decode_fields(body: Any) -> tuple[str, tuple[int, ...], bytes]:
    if type(body) is not dict or set(body) != {"dtype", "shape", "data"} or type(body["dtype"]) is not str:
        text = "an array without exactly a dtype, a shape and data"
        raise ValueError(text)
    shape = tuple(_list(body["shape"]))
    if not all(type(length) is int and length >= 0 for length in shape):
        text = "a shape that is none"
        raise ValueError(text)
    return body["dtype"], shape, base64.b64decode(body["data"], validate=True)


def _check_tensor(fields: dict[str, Any], data: bytes) -> None:
    try:
        dtype, shape = stored_form(fields["dtype"], tuple(fields["shape"]))
    except UnsupportedFormatError as error:
        raise ValueError(str(error)) from error
    if sized_bytes(dtype, shape) != len(data):
        text = "the bytes are not as many as dtype and shape need"
        raise ValueError(text)


def _decode_tensor(body: Any) -> RawTensor:
    dtype, shape, data = _decode_fields(body)
    _check_tensor(body, data)
    return RawTensor(dtype, shape, data)


def _decode_array(body: Any) -> Any:
    name, shape, data = _decode_fields(body)
    if name not in _ARRAY_DTYPES:
        text = f"array dtype {name!r} is not plain"
        raise ValueError(text)
    dtype = np.dtype(name)
    if len(shape) > _MAX_DIMS or any(length > MAX_SIZE for length in shape):
        text = "a shape that no array has"
        raise ValueError(text)
    flat = np.frombuffer(data, dtype=dtype) if data else np.zeros(0, dtype=dtype)
    return flat.reshape(shape).astype(dtype.newbyteorder("="))


def _decode_scalar(body: Any) -> Any:
    array = _decode_array(body)
    if array.ndim:
        text = "a scalar with a shape"
        raise ValueError(text)
    return array[()]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": lambda body: _NON_FINITE[body],
    "$tuple": lambda body: tuple(_decode(item) for item in _list(body)),
    "$dict": _decode_pairs,
    "$counter": lambda body: Counter(_decode_pairs(body)),
    "$set": _decode_set,
    "$complex": _decode_complex,
    "$bytes": lambda body: base64.b64decode(body, validate=True),
    "$tensor": _decode_tensor,
    "$array": _decode_array,
    "$scalar": _decode_scalar,
}
