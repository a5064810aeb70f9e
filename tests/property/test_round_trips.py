from __future__ import annotations

import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from shardpoint.checksum import crc64
from shardpoint.container import StoredTensor, header_size_bytes, layout_file, parse_header
from shardpoint.dtypes import ITEMSIZE_BYTES, stored_form, tensor_bytes
from shardpoint.manifest import (
    FileEntry,
    Finding,
    Holders,
    Manifest,
    RawTensor,
    Suspect,
    TensorEntry,
    decode_document,
    decode_manifest,
    encode_document,
    encode_manifest,
)
from tests.property.drawn import shapes

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMPY_DTYPES = ["bool", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype, shape = np.dtype(draw(st.sampled_from(NUMPY_DTYPES))), draw(shapes(3, 3))
    num_bytes = dtype.itemsize * math.prod(shape)
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    array: np.ndarray[Any, Any] = np.frombuffer(bytearray(data), dtype) if data else np.zeros(0, dtype)
    return array.reshape(shape)


@st.composite
def raw_tensors(draw: st.DrawFn) -> RawTensor:
    dtype, shape = draw(st.sampled_from([*ITEMSIZE_BYTES, "C128", "C32"])), draw(shapes(3, 3))
    num_bytes = tensor_bytes(*stored_form(dtype, shape))
    return RawTensor(dtype, shape, draw(st.binary(min_size=num_bytes, max_size=num_bytes)))


KEYS = st.one_of(
    TEXTS, st.integers(), st.floats(allow_nan=False), st.binary(max_size=4), st.tuples(TEXTS, st.integers())
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.sampled_from(["$tuple", "$", "\ufeff", "\u2028", "\0", '"]}']),
    st.binary(max_size=9),
    st.complex_numbers(),
    arrays(),
    arrays().filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0]),
    raw_tensors(),
    st.sets(KEYS, max_size=4),
    st.dictionaries(st.integers(), st.integers(), max_size=4).map(Counter),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(TEXTS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Compare values and types down to the last bit: -0.0 is not 0.0, True is not 1, a list no tuple."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    elif isinstance(a, (float, complex)):
        equal = repr(a) == repr(b)
    elif isinstance(a, (list, tuple)):
        equal = len(a) == len(b) and all(map(same, a, b))
    elif isinstance(a, dict):
        equal = len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    elif isinstance(a, set):
        equal = a == b and sorted(map(repr, a)) == sorted(map(repr, b))
    else:
        equal = a == b
    return bool(equal)


@given(VALUES)
def test_documents_come_back_exactly(value: Any) -> None:
    data = encode_document(value)
    assert same(decode_document(data), value)
    assert encode_document(decode_document(data)) == data


@given(st.dictionaries(KEYS, LEAVES, max_size=6))
def test_an_ordered_dict_keeps_its_order(value: dict[Any, Any]) -> None:
    found = decode_document(encode_document(OrderedDict(value)))
    assert type(found) is dict
    assert same(found, value)


@st.composite
def files(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    names = draw(st.lists(TEXTS.filter(lambda name: name != "__metadata__"), unique=True, max_size=8))
    dims = st.one_of(shapes(2, 5), st.sampled_from([(64,), (1024,), (4096,), (64, 65)]))
    return [(name, draw(st.sampled_from(sorted(ITEMSIZE_BYTES))), draw(dims)) for name in names]


@given(files(), st.dictionaries(TEXTS, TEXTS, max_size=2))
def test_the_raw_library_reads_a_file_as_it_was_laid_out(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    layout = layout_file(tensors, metadata)
    assert len(layout.header) % 4096 == 0
    random = np.random.default_rng(2)
    body = random.integers(0, 256, layout.num_bytes - len(layout.header), dtype=np.uint8).tobytes()
    whole = layout.header + body
    found = dict(deserialize(whole))  # type: ignore[no-untyped-call]
    assert found.keys() == {name for name, _, _ in tensors}
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    for name, dtype, shape in tensors:
        stored = by_name[name]
        assert (stored.dtype, stored.shape) == (dtype, shape)
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (dtype, shape)
        assert bytes(found[name]["data"]) == whole[stored.byte_offset : stored.byte_offset + stored.num_bytes]
        assert stored.byte_offset % ITEMSIZE_BYTES[dtype] == 0
        if stored.num_bytes % 4096 == 0:
            assert stored.byte_offset % 4096 == 0
    # Our own reader agrees with both.
    assert header_size_bytes(whole[:8], len(whole), "x") == len(layout.header)
    assert parse_header(layout.header, len(whole), "x") == layout


def test_the_raw_library_opens_a_file_from_disk(tmp_path: Path) -> None:
    layout = layout_file([("odd", "U8", (3,)), ("w", "F32", (2, 2)), ("big", "F32", (32, 32))], {"k": "v"})
    values = np.arange(4, dtype="<f4").reshape(2, 2)
    whole = bytearray(layout.header.ljust(layout.num_bytes, b"\0"))
    place: StoredTensor = next(tensor for tensor in layout.tensors if tensor.name == "w")
    whole[place.byte_offset : place.byte_offset + place.num_bytes] = values.tobytes()
    (tmp_path / "x.safetensors").write_bytes(whole)
    with safe_open(tmp_path / "x.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt", "k": "v"}
        assert np.array_equal(opened.get_tensor("w"), values)
    assert [tensor.name for tensor in layout.tensors] == ["big", "w", "odd"]


def suspects() -> st.SearchStrategy[Suspect]:
    counts = st.integers(0, 2**53)
    holders = st.lists(st.builds(Holders, st.lists(counts, max_size=3), counts), min_size=1, max_size=3)
    kinds = st.sampled_from(["replicas_differ", "not_finite"])
    findings = st.builds(Finding, kinds, TEXTS, TEXTS, st.one_of(st.none(), TEXTS), holders, counts)
    return st.builds(Suspect, counts, st.lists(findings, max_size=3))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    hex16, hex32 = (st.text("0123456789abcdef", min_size=n, max_size=n) for n in (16, 32))
    components = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=9).filter(
        lambda text: text not in (".", "..")
    )
    paths = draw(st.lists(st.lists(components, min_size=1, max_size=3).map("/".join), unique=True, max_size=4))
    counts = st.integers(0, 2**53)
    sizes, tensors = [0] * len(paths), []
    for number in range(draw(st.integers(0, 5)) if paths else 0):
        file, dtype, shape = (
            draw(st.integers(0, len(paths) - 1)),
            draw(st.sampled_from(["BF16", "C128"])),
            draw(shapes()),
        )
        state = draw(st.one_of(st.none(), TEXTS))
        fqn, num_bytes = draw(TEXTS) + str(number), tensor_bytes(*stored_form(dtype, shape))
        tensors.append(
            TensorEntry("modeling", fqn, state, fqn, dtype, shape, file, sizes[file], num_bytes, draw(hex16))
        )
        sizes[file] += num_bytes
    return Manifest(
        format="shardpoint",
        version=(1, 1),
        checkpoint_id=draw(hex32),
        replaces=draw(st.one_of(st.none(), hex32)),
        sequence=f"{draw(st.integers(0, 10**12 - 1)):012d}",
        name=draw(components),
        epoch=draw(st.one_of(st.none(), counts)),
        step=draw(st.one_of(st.none(), counts)),
        sample_start_index=draw(st.one_of(st.none(), counts)),
        created_utc=draw(TEXTS),
        library=draw(TEXTS),
        world_size=draw(counts),
        roles=draw(st.lists(TEXTS, max_size=3)),
        metrics=draw(st.dictionaries(TEXTS, st.floats(allow_nan=False, allow_infinity=False), max_size=3)),
        files=[FileEntry(path, size, draw(hex16)) for path, size in zip(paths, sizes, strict=True)],
        tensors=tensors,
        suspect=draw(st.one_of(st.none(), suspects())),
    )


@given(manifests())
def test_manifests_come_back_equal_and_end_with_their_own_checksum(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    found = decode_manifest(data)
    assert found == manifest
    assert all(
        math.copysign(1, v) == math.copysign(1, found.metric_values[k]) for k, v in manifest.metric_values.items()
    )
    digits = data[-len('0123456789abcdef"\n}\n') :][:16]
    assert int(digits, 16) == crc64(data[: -len('0123456789abcdef"\n}\n')])
