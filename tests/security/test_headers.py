"""Attacks on the header of a tensor file: each is refused with the error that says what it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from shardpoint.container import header_size_bytes, layout_file, parse_header
from shardpoint.errors import CorruptionError, ManifestError, TruncatedError, UnsupportedFormatError

DATA_BYTES = 24
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]},
}


def file_of(text: str | bytes, data_bytes: int = DATA_BYTES) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def read(file: bytes) -> Any:
    size = header_size_bytes(file[:8], len(file), "x.safetensors")
    return parse_header(file[:size], len(file), "x.safetensors")


def changed(name: str, **fields: Any) -> str:
    return json.dumps({**GOOD, name: {**GOOD[name], **fields}})


def test_the_file_that_the_attacks_start_from_is_good() -> None:
    assert [tensor.name for tensor in read(file_of(json.dumps(GOOD))).tensors] == ["a", "b"]


A = '"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
B = '"b":{"dtype":"I64","shape":[],"data_offsets":[16,24]}'

# What the safetensors library opens, and this reader must not.
LET_THROUGH: dict[str, str | bytes] = {
    "a name twice": f"{{{A},{B},{A}}}",
    "a leading space": " " + json.dumps(GOOD),
    "an unknown field": changed("a", note="x"),
    "misaligned": json.dumps(
        {
            "c": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]},
            "d": {"dtype": "U8", "shape": [7], "data_offsets": [17, 24]},
        }
    ),
}

REFUSED: dict[str, str | bytes] = {
    "not JSON": "{",
    "an array": "[]",
    "a number": "7",
    "NUL as padding": json.dumps(GOOD) + "\0\0",
    "something behind the JSON": json.dumps(GOOD) + " {}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a lone surrogate": '{"\\ud800":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}',
    "nested too deep": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested too deep, never closed": '{"a":' + '{"a":' * 100_000,
    "NaN": changed("a", shape=[float("nan")]),
    "Infinity": changed("a", shape=[float("inf")]),
    "beyond any float": json.dumps(GOOD).replace("[2, 2]", "[2e999]"),
    "a hole": changed("b", data_offsets=[17, 25]),
    "an overlap": changed("b", data_offsets=[8, 16]),
    "the same bytes twice": json.dumps({"a": GOOD["a"], "b": GOOD["a"]}),
    "fields that are a number": '{"a": 5}',
    "fields that are null": '{"a": null}',
    "fields that are a list": '{"a": [1]}',
    "fields that are missing": '{"a": {"dtype": "F32"}}',
    "an unknown dtype": changed("a", dtype="F31"),
    "a logical dtype": changed("a", dtype="C128", shape=[1]),
    "a dtype that is a list": changed("a", dtype=["F32"]),
    "a dtype that is an object": changed("a", dtype={}),
    "a shape that is a number": changed("a", shape=4),
    "a negative length": changed("a", shape=[-2, -2]),
    "a length that is a boolean": changed("a", shape=[4, True]),
    "a length that is a float": changed("a", shape=[4.0]),
    "a negative offset": changed("a", data_offsets=[-8, 8]),
    "an offset that is a boolean": changed("a", data_offsets=[False, 16]),
    "an offset that is a float": changed("a", data_offsets=[0.0, 16]),
    "an offset that is a string": changed("a", data_offsets=["0", 16]),
    "one offset": changed("a", data_offsets=[16]),
    "three offsets": changed("a", data_offsets=[0, 16, 24]),
    "offsets that are an object": changed("a", data_offsets={"0": 16}),
    "offsets the wrong way round": changed("a", data_offsets=[16, 0]),
    "another size than dtype and shape": changed("a", shape=[2, 3]),
    "lengths whose product overflows": changed("a", shape=[2**62, 4]),
    "an overflow that a zero would hide": changed("a", shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
    "huge lengths": changed("a", shape=[int("9" * 4000)] * 2),
    "many lengths": changed("a", shape=[2**62] * 100_000),
    "huge offsets": changed("b", data_offsets=[int("9" * 4000), int("9" * 4000) + 8]),
    "a number of 5,000 digits": json.dumps(GOOD).replace("24]", "9" * 5_000 + "]"),
    "metadata that is null": '{"__metadata__": null}',
    "metadata that is a list": '{"__metadata__": []}',
    "metadata that is no text": '{"__metadata__": {"format": 1}}',
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(file_of(REFUSED[name]))
    assert caught.value.key == "x.safetensors"


@pytest.mark.parametrize("name", LET_THROUGH)
def test_refused_although_the_library_lets_it_through(name: str) -> None:
    file = file_of(LET_THROUGH[name])
    assert deserialize(file)  # type: ignore[no-untyped-call]
    with pytest.raises(ManifestError):
        read(file)


@pytest.mark.parametrize("data_bytes", [0, 8, 23, 25, 4096])
def test_bytes_missing_or_left_over_at_the_end(data_bytes: int) -> None:
    with pytest.raises(TruncatedError):
        read(file_of(json.dumps(GOOD), data_bytes))


@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_a_file_that_ends_in_its_header(length: int) -> None:
    with pytest.raises(CorruptionError):
        read(file_of(json.dumps(GOOD))[:length])


def test_a_header_that_claims_more_than_the_limit_is_not_read() -> None:
    with pytest.raises(ManifestError, match="limit"):
        header_size_bytes((100_000_001).to_bytes(8, "little"), 2**40, "x")
    with pytest.raises(ManifestError, match="limit"):
        header_size_bytes(b"\xff" * 8, 2**40, "x")
    assert header_size_bytes((100_000_000).to_bytes(8, "little"), 2**40, "x") == 100_000_008


def test_a_header_that_claims_more_than_the_file_is_not_read() -> None:
    with pytest.raises(TruncatedError):
        header_size_bytes((4097).to_bytes(8, "little"), 4104, "x")


@pytest.mark.timeout(60)
def test_a_string_that_never_ends_takes_linear_time() -> None:
    # Looking for its end again from each of its quotes would take hours.
    with pytest.raises(ManifestError):
        read(file_of('{"' + '\\"' * 1_000_000))


VALID = layout_file([("w", "F32", (3,)), ("x", "BF16", (2, 2)), ("y", "U8", (3,))]).header.rstrip()


def refuses_or_agrees_with_the_library(file: bytes) -> None:
    try:
        layout = read(file)
    except (CorruptionError, UnsupportedFormatError):
        return
    found = dict(deserialize(file))  # type: ignore[no-untyped-call]
    assert {tensor.name for tensor in layout.tensors} == found.keys()
    for tensor in layout.tensors:
        content = file[tensor.byte_offset : tensor.byte_offset + tensor.num_bytes]
        assert bytes(found[tensor.name]["data"]) == content


@given(st.binary(max_size=80))
def test_any_bytes(file: bytes) -> None:
    refuses_or_agrees_with_the_library(file)


@given(st.binary(max_size=80), st.integers(0, 24))
def test_any_header(text: bytes, data_bytes: int) -> None:
    refuses_or_agrees_with_the_library(file_of(b"{" + text, data_bytes))


@given(st.integers(8, len(VALID) - 1), st.integers(0, 3), st.binary(max_size=3))
def test_any_change_of_a_good_header(at: int, drop: int, put: bytes) -> None:
    refuses_or_agrees_with_the_library(file_of(VALID[8:at] + put + VALID[at + drop :], 23))


SIZES = st.one_of(st.integers(-2, 30), st.booleans(), st.floats(), st.none(), st.integers(), st.text(max_size=2))
FIELDS = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "U8", "F4", "C128"]), SIZES),
            "shape": st.one_of(st.lists(SIZES, max_size=3), SIZES),
            "data_offsets": st.one_of(st.lists(SIZES, min_size=2, max_size=2), SIZES),
        }
    ),
    SIZES,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS, max_size=3))
def test_any_fields(tree: dict[str, Any]) -> None:
    refuses_or_agrees_with_the_library(file_of(json.dumps(tree), 24))


def test_the_library_refuses_holes_too() -> None:
    with pytest.raises(SafetensorError):
        deserialize(file_of(REFUSED["a hole"]))  # type: ignore[no-untyped-call]
