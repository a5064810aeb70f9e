"""Are NaN and infinite values found in every floating-point format, exactly, and nothing else?"""

from __future__ import annotations

import pytest
import torch

from shardpoint.adapters.tensors import flat_bytes, torch_dtype
from shardpoint.dtypes import ITEMSIZE_BYTES
from shardpoint.engine import finite
from shardpoint.engine.finite import not_finite_bytes

FLOATS = [name for name in ITEMSIZE_BYTES if torch_dtype(name).is_floating_point]


def by_torch(values: torch.Tensor) -> int:
    """Count by torch, in doubles: the smaller formats convert exactly."""
    return int((~torch.isfinite(values.to(torch.float64))).sum()) * values.element_size()


def found(values: torch.Tensor, dtype: str) -> int:
    return not_finite_bytes(flat_bytes(values).numpy().data, dtype)


@pytest.mark.parametrize("dtype", [name for name in FLOATS if ITEMSIZE_BYTES[name] <= 2])
def test_every_pattern_of_the_small_formats_by_itself(dtype: str) -> None:
    size = ITEMSIZE_BYTES[dtype]
    patterns = torch.arange(256**size, dtype=torch.int32).to(torch.uint8 if size == 1 else torch.uint16)
    values = patterns.view(torch_dtype(dtype))
    expected = ~torch.isfinite(values.to(torch.float64))
    assert expected.any()
    assert found(values, dtype) == by_torch(values)
    for index in {0, 1, 2**15, *expected.nonzero().flatten().tolist()[:300], *range(0, len(values), 97)}:
        if index < len(values):
            assert found(values[index : index + 1], dtype) == size * int(expected[index]), hex(index)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_the_edges_of_the_large_formats(dtype: str) -> None:
    kind = torch_dtype(dtype)
    limits = torch.finfo(kind)
    fine = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny, 1.0, -1.0], dtype=kind)
    assert found(fine, dtype) == 0
    for bad in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        for index in range(len(fine)):
            values = fine.clone()
            values[index] = bad
            assert found(values, dtype) == limits.bits // 8


def test_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "BLOCK_BYTES", 4096)
    for dtype in FLOATS:
        bits = torch.randint(0, 256, (3 * 4096 + 64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        values = bits.view(torch_dtype(dtype))
        assert found(values, dtype) == by_torch(values)


def test_complex_numbers_and_what_has_no_such_values() -> None:
    values = torch.tensor([1 + 2j, complex(0, -torch.inf), complex(torch.nan, 0)], dtype=torch.complex64)
    assert found(values, "C64") == 8  # one real of each of two
    whole = torch.full((64,), 0xFF, dtype=torch.uint8).numpy().data
    assert [not_finite_bytes(whole, name) for name in ITEMSIZE_BYTES if name not in (*FLOATS, "C64")] == [0] * 9
    assert not_finite_bytes(whole[:0], "F32") == 0
