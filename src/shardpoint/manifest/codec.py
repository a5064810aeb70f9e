"""How Python values become JSON and come back exactly as they were.

Plain JSON loses tuples, non-string keys, non-finite floats and arrays: it turned `MultiStepLR`'s integer keys into strings
and a learning rate of 0.001 into 0.1, silently. So whatever JSON has no form for is an object with one key that starts
with `$`; everything else is ordinary JSON that a person can read. What cannot come back exactly is refused on encoding.

Source: docs/spec/FORMAT.md, "Documents".
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpoint.errors import ManifestError, UsageError

MAX_DEPTH = 64

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_ARRAY_KINDS = "biufc"


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A small tensor inside a document: its safetensors dtype name, its shape, its row-major little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_document(value: object) -> bytes:
    """Return a value as UTF-8 JSON that `decode_document` turns back into an equal value of the same types.

    Args:
        value: None, bool, int, float, str, bytes, complex, list, tuple, dict, `Counter`, set, numpy arrays and scalars of
            bool, integer, float or complex kind, `RawTensor`, nested to a depth of 64. An `OrderedDict` comes back as a
            dict of the same order.

    Raises:
        UsageError: a value of another type; the message gives its place.
    """
    tree = _encode(value, "$", 0)
    try:
        return (json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
    except UnicodeEncodeError as error:
        text = f"a string cannot be written as UTF-8: {error}"
        raise UsageError(text) from error


def _encode(value: Any, place: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        text = f"the value at {place} is nested deeper than {MAX_DEPTH} levels"
        raise UsageError(text)
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [_encode(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [_encode(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]}
    if kind in (dict, OrderedDict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
        return {"$dict": _pairs(value, place, depth)}
    if kind is Counter:
        return {"$counter": _pairs(value, place, depth)}
    if kind is set:
        encoded = [_encode(item, f"{place}{{}}", depth + 1) for item in value]
        return {"$set": sorted(encoded, key=lambda item: json.dumps(item, sort_keys=True))}
    if kind is complex:
        return {"$complex": [_encode(value.real, place, depth + 1), _encode(value.imag, place, depth + 1)]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is RawTensor:
        data = base64.b64encode(value.data).decode()
        return {"$tensor": {"dtype": value.dtype, "shape": list(value.shape), "data": data}}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _ARRAY_KINDS:
        array = np.asarray(value)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        fields = {
            "dtype": little.dtype.str,
            "shape": list(array.shape),
            "data": base64.b64encode(little.tobytes()).decode(),
        }
        return {"$array" if isinstance(value, np.ndarray) else "$scalar": fields}
    text = (
        f"the value at {place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: give plain "
        "Python numbers, strings, lists, tuples, dicts, sets, bytes, or numpy arrays"
    )
    raise UsageError(text)


def _pairs(value: dict[Any, Any], place: str, depth: int) -> list[Any]:
    return [
        [_encode(key, f"{place}.<key>", depth + 1), _encode(item, f"{place}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]


def parse_strict_json(data: bytes, key: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and depth over 64 (checked before parsing).

    Args:
        data: the document.
        key: what it is called in an error.

    Raises:
        ManifestError: the bytes are not such JSON.
    """
    depth = 0
    for token in _TOKENS.finditer(data):
        first = token.group()[:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > 2 * MAX_DEPTH + 4:
            text = f"{key} is nested deeper than {MAX_DEPTH} levels: it was not written by Shardpoint"
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

    try:
        return json.loads(data.decode(), object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except ValueError as error:
        text = f"{key} is not valid JSON ({error}): the file is damaged or was not written by Shardpoint"
        raise ManifestError(text, key=key) from error


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
    return _decode_tagged(tags[0], value[tags[0]])


def _decode_tagged(tag: str, body: Any) -> Any:
    match tag:
        case "$float":
            return _NON_FINITE[body]
        case "$tuple":
            return tuple(_decode(item) for item in body)
        case "$dict" | "$counter":
            pairs = [(_decode(key), _decode(item)) for key, item in body]
            result = Counter() if tag == "$counter" else {}
            result.update(dict(pairs))
            if len(result) != len(pairs):
                text = "duplicate keys"
                raise ValueError(text)
            return result
        case "$set":
            return {_decode(item) for item in body}
        case "$complex":
            real, imag = (_decode(item) for item in body)
            return complex(real, imag)
        case "$bytes":
            return base64.b64decode(body, validate=True)
        case "$tensor":
            data = base64.b64decode(body["data"], validate=True)
            return RawTensor(body["dtype"], tuple(body["shape"]), data)
        case "$array" | "$scalar":
            dtype = np.dtype(body["dtype"])
            if dtype.kind not in _ARRAY_KINDS:
                text = f"array dtype {body['dtype']!r} is not plain"
                raise ValueError(text)
            flat = np.frombuffer(base64.b64decode(body["data"], validate=True), dtype=dtype)
            array = flat.reshape(body["shape"]).astype(dtype.newbyteorder("="))
            return array if tag == "$array" else array[()]
        case _:
            text = f"unknown tag {tag}"
            raise ValueError(text)
