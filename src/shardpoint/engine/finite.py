"""How NaN and infinite values are found in staged bytes, exactly, without a copy.

Read as integers, the floating-point numbers of one sign are ordered, and what is not finite comes last: it is there if
and only if the greatest of the signed integers (positive numbers), or of the unsigned ones (negative numbers), is not
less than the pattern of infinity. Two reductions that numpy vectorises for every size, bfloat16 and the 8-bit formats
included, and that release the interpreter's lock. Only where they find something are the values counted.

Source: IEEE 754, bfloat16; the OCP specifications of 8-bit formats (E4M3 has no infinity, FNUZ one NaN, E8M0 one NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How what is not finite looks as an integer.

    Attributes:
        num_bytes: of a number.
        least: the least pattern without its sign.
        is_signed: whether a number with the greatest bit set is the same without it, negated.
    """

    num_bytes: int
    least: int
    is_signed: bool = True


_PATTERNS = {
    "F16": _Pattern(2, 0x7C00),
    "BF16": _Pattern(2, 0x7F80),
    "F32": _Pattern(4, 0x7F80_0000),
    "C64": _Pattern(4, 0x7F80_0000),
    "F64": _Pattern(8, 0x7FF0_0000_0000_0000),
    "F8_E5M2": _Pattern(1, 0x7C),
    "F8_E4M3": _Pattern(1, 0x7F),
    "F8_E8M0": _Pattern(1, 0xFF, is_signed=False),
}
_MINUS_ZERO_IS_NAN = frozenset(("F8_E4M3FNUZ", "F8_E5M2FNUZ"))
_MINUS_ZERO = 0x80


def not_finite_bytes(data: memoryview, dtype: str) -> int:
    """Return how many bytes belong to values that are NaN or infinite.

    Args:
        data: whole values, little-endian, contiguous.
        dtype: the dtype as stored (of a complex number that is stored as two reals, that of the reals); integers and
            booleans have no such values.

    Memory:
        Nothing; 12 MiB where there are such values.
    """
    if dtype in _MINUS_ZERO_IS_NAN:
        return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == _MINUS_ZERO))
    pattern = _PATTERNS.get(dtype)
    if pattern is None or not len(data):
        return 0
    found = 0
    for start in range(0, len(data), BLOCK_BYTES):
        # In blocks that stay in a cache between the two reductions, yet are few native calls.
        block = np.frombuffer(data[start : start + BLOCK_BYTES], dtype=f"<u{pattern.num_bytes}")
        if _has(block, pattern):
            found += _count(block, pattern)
    return found * pattern.num_bytes


def _has(block: npt.NDArray[np.unsignedinteger], pattern: _Pattern) -> bool:
    sign = 1 << (8 * pattern.num_bytes - 1)
    if not pattern.is_signed:
        return int(block.max()) >= pattern.least
    signed = block.view(f"<i{pattern.num_bytes}")
    return int(signed.max()) >= pattern.least or int(block.max()) >= (sign | pattern.least)


def _count(block: npt.NDArray[np.unsignedinteger], pattern: _Pattern) -> int:
    mask = (1 << (8 * pattern.num_bytes)) - 1
    if pattern.is_signed:
        mask >>= 1
    kind = block.dtype.type
    return int(np.count_nonzero((block & kind(mask)) >= kind(pattern.least)))
