from __future__ import annotations

import numpy as np
import pytest
from safetensors import deserialize

from shardpoint.container import layout_file
from shardpoint.dtypes import ITEMSIZE_BYTES, MAX_SIZE, itemsize_bytes, sized_bytes, stored_form, tensor_bytes
from shardpoint.errors import UnsupportedFormatError


@pytest.mark.parametrize("name", ITEMSIZE_BYTES)
def test_the_library_has_each_dtype_with_the_same_size(name: str) -> None:
    layout = layout_file([("t", name, (3,))])
    found = dict(deserialize(layout.header + bytes(layout.num_bytes - len(layout.header))))["t"]  # type: ignore[no-untyped-call]
    assert (found["dtype"], len(found["data"])) == (name, 3 * ITEMSIZE_BYTES[name])


def test_pairs_have_the_bytes_of_numpys_complex_numbers() -> None:
    assert stored_form("C128", (2, 3)) == ("F64", (2, 3, 2))
    assert stored_form("C32", ()) == ("F16", (2,))
    assert tensor_bytes(*stored_form("C128", (2, 3))) == np.zeros((2, 3), np.complex128).nbytes
    assert tensor_bytes(*stored_form("C64", (2, 3))) == np.zeros((2, 3), np.complex64).nbytes


@pytest.mark.parametrize("name", ["F31", "", "f32", "C128"])
def test_an_unknown_dtype_is_named(name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"'{name}'"):
        itemsize_bytes(name)
    if name != "C128":
        with pytest.raises(UnsupportedFormatError):
            stored_form(name, ())


def test_a_claimed_size_is_the_size_or_none() -> None:
    assert sized_bytes("BF16", (3, 4)) == tensor_bytes("BF16", (3, 4)) == 24
    assert sized_bytes("U8", (MAX_SIZE,)) == MAX_SIZE
    assert sized_bytes("U8", (MAX_SIZE + 1,)) is None
    assert sized_bytes("U8", (0, MAX_SIZE + 1)) is None
    assert sized_bytes("F32", (2**62,)) is None
    assert sized_bytes("F32", (2**62, 2**62, 0)) is None
