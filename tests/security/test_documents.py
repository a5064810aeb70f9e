"""Attacks on documents: whatever the bytes, a document is a value or a ManifestError."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.errors import ManifestError, UsageError
from shardpoint.manifest import RawTensor, decode_document, encode_document

ZEROS = base64.b64encode(bytes(8)).decode()


def array(**fields: Any) -> str:
    return json.dumps({"$array": {"dtype": "<f4", "shape": [2], "data": ZEROS, **fields}})


def tensor(**fields: Any) -> str:
    return json.dumps({"$tensor": {"dtype": "F32", "shape": [2], "data": ZEROS, **fields}})


REFUSED: dict[str, str | bytes] = {
    "nothing": "",
    "not UTF-8": b'"\xff"',
    "UTF-16": '"a"'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf"a"',
    "a lone surrogate": '"\\udc80"',
    "a lone surrogate as a key": '{"\\uD800": 1}',
    "NaN": "NaN",
    "Infinity": "[Infinity]",
    "-Infinity": '{"a": -Infinity}',
    "beyond any float": "1e999",
    "a number of 5,000 digits": "9" * 5_000,
    "a duplicate key": '{"a": 1, "a": 2}',
    "a duplicate key inside": '[{"b": {"a": 1, "a": 1}}]',
    "a duplicate key by escape": '{"a": 1, "\\u0061": 2}',
    "lists nested too deep": "[" * 133 + "]" * 133,
    "lists nested very deep": "[" * 200_000,
    "objects nested very deep": '{"a":' * 200_000,
    "deep behind a string": '["]]]]]]",' + "[" * 200_000,
    "deep behind an escaped quote": '["\\"]]]]",' + "[" * 200_000,
    "an unknown tag": '{"$pickle": "gASVAA=="}',
    "a tag beside a key": '{"$tuple": [], "a": 1}',
    "two tags": '{"$tuple": [], "$set": []}',
    "an empty tag": '{"$": 1}',
    "a float that is none": '{"$float": "1.5"}',
    "a float that is a list": '{"$float": []}',
    "a tuple that is a text": '{"$tuple": "abc"}',
    "a tuple that is an object": '{"$tuple": {"a": 1}}',
    "a dict that is an object": '{"$dict": {"ab": 1}}',
    "a dict of texts": '{"$dict": ["ab"]}',
    "a pair of three": '{"$dict": [[1, 2, 3]]}',
    "a pair of one": '{"$counter": [[1]]}',
    "a key that is a list": '{"$dict": [[[], 1]]}',
    "a key that is a dict": '{"$dict": [[{}, 1]]}',
    "a key that is an array": '{"$dict": [[' + array() + ", 1]]}",
    "a key that holds a list": '{"$dict": [[{"$tuple": [[]]}, 1]]}',
    "a duplicate key in a dict": '{"$dict": [[1, 2], [1, 3]]}',
    "keys that are equal": '{"$dict": [[1, 2], [1.0, 3]]}',
    "a duplicate key in a counter": '{"$counter": [[1, 2], [1, 2]]}',
    "a list in a set": '{"$set": [[]]}',
    "a value twice in a set": '{"$set": [1, 1]}',
    "a set that is a text": '{"$set": "ab"}',
    "a complex number of one": '{"$complex": [1.0]}',
    "a complex number of texts": '{"$complex": ["1", "2"]}',
    "a complex number of complex ones": '{"$complex": [{"$complex": [1.0, 1.0]}, 1.0]}',
    "a complex number that is a text": '{"$complex": "1j"}',
    "bytes with other characters": '{"$bytes": "AA*="}',
    "bytes with a newline": '{"$bytes": "AA\\n=="}',
    "bytes without padding": '{"$bytes": "AAA"}',
    "bytes that are not ASCII": '{"$bytes": "\u00e4\u00e4=="}',
    "bytes that are a list": '{"$bytes": [0]}',
    "bytes that are a number": '{"$bytes": 4}',
    "an array of objects": array(dtype="|O"),
    "an array of objects, spelt out": array(dtype="object"),
    "an array of records": array(dtype="<f4,<f4", shape=[1]),
    "an array of texts": array(dtype="<U2", shape=[1]),
    "an array of dates": array(dtype="<M8[s]", shape=[1]),
    "an array of voids": array(dtype="|V8", shape=[1]),
    "an array of a dtype in another spelling": array(dtype="float32"),
    "an array of big-endian numbers": array(dtype=">f4"),
    "an array of long doubles": array(dtype="<f16", shape=[]),
    "an array of no dtype": array(dtype=""),
    "an array of a dtype that breaks numpy's parser": array(dtype="(,)f4"),
    "an array of a subarray": array(dtype="(2,)f4", shape=[1]),
    "an array whose dtype is a list": array(dtype=[["a", "<f4"]]),
    "an array whose dtype is an object": array(dtype={"names": ["a"], "formats": ["O"]}),
    "an array with too few bytes": array(shape=[3]),
    "an array with too many bytes": array(shape=[1]),
    "an array with half an element": array(data="AAA="),
    "an array with a length of -1": array(shape=[-1]),
    "an array with a boolean length": array(shape=[2, True]),
    "an array with a float length": array(shape=[2.0]),
    "an array whose shape is a number": array(shape=2),
    "an array whose shape is null": array(shape=None),
    "an array with a huge length": array(shape=[0, 10**30], data=""),
    "an array with lengths that overflow": array(shape=[0, 2**62, 2**62], data=""),
    "an array with many dims": array(shape=[1] * 1_000 + [2]),
    "an array whose data are a list": array(data=[0] * 8),
    "an array whose data are not base64": array(data="*" * 12),
    "an array with another field": array(order="F"),
    "an array without data": '{"$array": {"dtype": "<f4", "shape": [0]}}',
    "an array that is a list": '{"$array": [1, 2]}',
    "a scalar with a shape": '{"$scalar": {"dtype": "<f4", "shape": [1], "data": "AAAAAA=="}}',
    "a tensor with too few bytes": tensor(shape=[3]),
    "a tensor with too many bytes": tensor(shape=[1]),
    "a tensor of another dtype": tensor(dtype="F64"),
    "a tensor of an unknown dtype": tensor(dtype="F31"),
    "a tensor whose dtype is a list": tensor(dtype=["F32"]),
    "a tensor with negative lengths": tensor(shape=[-1, -2]),
    "a tensor with a boolean length": tensor(shape=[2, True]),
    "a tensor with a float length": tensor(shape=[2.0]),
    "a tensor whose shape is a text": tensor(shape="2"),
    "a tensor with a huge length": tensor(shape=[10**4000, 0], data=""),
    "a tensor with many huge lengths": tensor(shape=[2**62] * 100_000),
    "a tensor with another field": tensor(device="cuda"),
    "a tensor that is null": '{"$tensor": null}',
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.timeout(60)
def test_refused(name: str) -> None:
    bad = REFUSED[name]
    with pytest.raises(ManifestError) as caught:
        decode_document(bad if isinstance(bad, bytes) else bad.encode(), "param_groups.json")
    assert caught.value.key == "param_groups.json"
    assert "param_groups.json" in str(caught.value)


def test_the_arrays_and_tensors_that_the_attacks_start_from_are_good() -> None:
    assert decode_document(array().encode()).tolist() == [0.0, 0.0]
    assert decode_document(tensor().encode()) == RawTensor("F32", (2,), bytes(8))


def test_132_levels_are_read_and_surrogate_pairs_too() -> None:
    assert decode_document(b"[" * 132 + b"]" * 132)
    assert decode_document(b'"\\ud83d\\ude00\\\\ud800"') == "\U0001f600\\ud800"


@pytest.mark.timeout(60)
def test_a_string_that_never_ends_takes_linear_time() -> None:
    with pytest.raises(ManifestError):
        decode_document(b'"' + b'\\"' * 1_000_000)


def decodes_or_refuses(data: bytes) -> None:
    try:
        value = decode_document(data)
    except ManifestError:
        return
    try:
        again = encode_document(value)
    except UsageError as error:
        assert "deep" in str(error)  # noqa: PT017 - a document may be flatter than what it would be written as
        return
    assert encode_document(decode_document(again)) == again


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    decodes_or_refuses(data)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 2**70),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from(["nan", "AAAA", "AAAAAAAAAAA=", "<f4", "|O", "F32", "BF16", "C128"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["$float", "$tuple", "$dict", "$counter", "$set", "$complex", "$bytes", "a", "dtype", "shape", "data"]
            ),
            inner,
            max_size=3,
        ),
        st.sampled_from(["$array", "$scalar", "$tensor"]).flatmap(
            lambda tag: st.fixed_dictionaries(
                {tag: st.fixed_dictionaries({"dtype": inner, "shape": st.lists(inner, max_size=2), "data": inner})}
            )
        ),
        st.sampled_from(["$tuple", "$set", "$complex"]).flatmap(
            lambda tag: st.fixed_dictionaries({tag: st.lists(inner, max_size=2)})
        ),
        st.sampled_from(["$dict", "$counter"]).flatmap(
            lambda tag: st.fixed_dictionaries({tag: st.lists(st.lists(inner, max_size=3), max_size=2)})
        ),
    ),
    max_leaves=10,
)


@given(JSON)
def test_any_json_with_tags(tree: Any) -> None:
    decodes_or_refuses(json.dumps(tree).encode())


VALID = encode_document(
    {"g": [(1, 2.5), {3: b"x"}], "t": RawTensor("BF16", (2,), bytes(4)), "s": {1, 2}, "i": float("inf")}
)


@given(st.integers(0, len(VALID) - 1), st.integers(0, 3), st.binary(max_size=3))
def test_any_change_of_a_good_document(at: int, drop: int, put: bytes) -> None:
    decodes_or_refuses(VALID[:at] + put + VALID[at + drop :])
