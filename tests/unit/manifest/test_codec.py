from __future__ import annotations

import enum
import math
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from shardpoint.errors import UsageError
from shardpoint.manifest import RawTensor, decode_document, encode_document


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


class Text(str):
    __slots__ = ()


def back(value: Any) -> Any:
    return decode_document(encode_document(value))


def test_plain_json_stays_plain() -> None:
    assert encode_document({"lr": 0.001, "name": "\u00fc", "n": [1, None, True]}) == (
        b'{\n "lr": 0.001,\n "name": "\xc3\xbc",\n "n": [\n  1,\n  null,\n  true\n ]\n}\n'
    )


def test_what_plain_json_loses_comes_back() -> None:
    value = {"milestones": Counter({2: 1, 5: 2}), "betas": (0.9, 0.999), "best": -math.inf, 3: {"x"}}
    found = back(value)
    assert found == value
    assert [type(key) for key in found["milestones"]] == [int, int]
    assert type(found["betas"]) is tuple


def test_types_that_are_equal_are_told_apart() -> None:
    for value in (1, 1.0, True, 0, 0.0, False):
        assert type(back(value)) is type(value)
    assert math.copysign(1, back(-0.0)) == -1
    assert [type(key) for key in back({True: 1, 2.0: 2, "2": 3})] == [bool, float, str]


def test_order_is_kept() -> None:
    assert list(back({2: "b", 1: "a"})) == [2, 1]
    assert list(back(OrderedDict(b=1, a=2))) == ["b", "a"]


def test_a_key_that_looks_like_a_tag_is_no_tag() -> None:
    assert back({"$tuple": [1]}) == {"$tuple": [1]}
    assert back({"a": {"$": 1, "b": 2}}) == {"a": {"$": 1, "b": 2}}


def test_equal_sets_give_equal_bytes() -> None:
    assert encode_document({8, 16, 0}) == encode_document({0, 16, 8}) == encode_document({16, 8, 0})


def test_arrays_come_back_writable_with_dtype_and_shape() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    found = back(array)
    assert found.dtype == np.int16
    assert np.array_equal(found, array)
    found += 1
    big = back(np.array([1, 256], dtype=">u2"))
    assert big.tolist() == [1, 256]
    assert big.dtype == np.uint16
    assert back(np.zeros((0, 3), dtype=bool)).shape == (0, 3)
    assert back(np.array(2.5)).shape == ()


def test_numpy_scalars_keep_their_type() -> None:
    for value in (np.float32(0.1), np.bool_(True), np.int64(-1), np.complex64(1j)):
        found = back(value)
        assert type(found) is type(value)
        assert found == value
    assert type(back(np.float64(0.5))) is np.float64


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Path("a"),
        Decimal(1),
        Colour.RED,
        Point(1),
        Text("a"),
        frozenset([1]),
        defaultdict(int),
        range(3),
        bytearray(b"a"),
        int,
        len,
        np.array(["a"]),
        np.array([None], dtype=object),
        np.array("2020", dtype="M8[s]"),
        np.zeros(1, dtype=[("a", "f4")]),
        np.ma.masked_array([1, 2], [True, False]),
        {Text("a"): 1},
        {"a": [{1: object()}]},
    ],
    ids=lambda value: type(value).__name__ + repr(value)[:12].encode("ascii", "replace").hex(),
)
def test_what_cannot_come_back_exactly_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        encode_document(value)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_long_doubles_are_refused_since_machines_differ() -> None:
    for value in (np.longdouble(1), np.zeros(2, np.clongdouble)):
        with pytest.raises(UsageError):
            encode_document(value)


def test_the_message_gives_the_place() -> None:
    with pytest.raises(UsageError, match=r"\$\.groups\[1\]\[2\] is a pathlib\.\w*Path"):
        encode_document({"groups": [0, {2: Path("a")}]})


def test_strings_that_are_not_utf8_and_numbers_that_json_readers_refuse() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        encode_document("\ud800")
    with pytest.raises(UsageError):
        encode_document({"\udfff": 1})
    with pytest.raises(UsageError):
        encode_document(10 ** (sys.get_int_max_str_digits() + 1))


@pytest.mark.parametrize(
    "tensor",
    [
        RawTensor("F32", (2,), bytes(4)),
        RawTensor("F31", (), b""),
        RawTensor("F32", (-1,), b""),
        RawTensor("U8", (), b""),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tensor: RawTensor) -> None:
    with pytest.raises(UsageError):
        encode_document(tensor)


def nested(wrap: Any, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value],
    "object": lambda value: {"a": value},
    "tuple": lambda value: (value,),
    "dict": lambda value: {1: value},
    "counter": lambda value: Counter({"a": value}),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_whatever_is_written_can_be_read(wrap: Any) -> None:
    # Tags take brackets too: a dict with other keys takes three for a level, and 64 levels of it would not be read.
    deepest = 0
    for depth in range(1, 70):
        try:
            data = encode_document(nested(wrap, depth))
        except UsageError as error:
            assert "deep" in str(error)  # noqa: PT017 - counts how deep it goes
            continue
        assert repr(decode_document(data)) == repr(nested(wrap, depth))  # Counter compares in time 2^depth
        deepest = depth
    assert 40 <= deepest <= 64


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UsageError, match="deeper than 64"):
        encode_document(value)


def test_complex_numbers_with_parts_that_are_not_finite() -> None:
    found = back(complex(math.nan, -math.inf))
    assert math.isnan(found.real)
    assert found.imag == -math.inf
