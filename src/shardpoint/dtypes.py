"""What the element types are called on disk and how many bytes each takes.

Names are safetensors' (`"F32"`, `"BF16"`, `"F8_E4M3"`, ...). Two *logical* dtypes have no safetensors name and are
stored as pairs of reals with a last dim of 2: `"C128"` as F64 and `"C32"` as F16; the manifest keeps the logical name.

Source: safetensors 0.8 `Dtype`; docs/spec/FORMAT.md, "Tensor files".
"""

from __future__ import annotations

from shardpoint.errors import UnsupportedFormatError

MAX_SIZE = 2**63 - 1
"""The greatest length, offset or size in bytes: what a signed 64-bit integer holds."""

ITEMSIZE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}

_STORED_AS_PAIRS = {"C128": "F64", "C32": "F16"}


def itemsize_bytes(stored_dtype: str) -> int:
    """Return the bytes of one element of a stored dtype.

    Raises:
        UnsupportedFormatError: the name is none that this release stores.
    """
    size = ITEMSIZE_BYTES.get(stored_dtype)
    if size is None:
        known = ", ".join(sorted(ITEMSIZE_BYTES))
        text = f"dtype {stored_dtype!r} is not one that Shardpoint stores (known: {known})"
        raise UnsupportedFormatError(text)
    return size


def stored_form(logical_dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape that a tensor has in the file.

    Args:
        logical_dtype: the dtype that training sees.
        shape: the global shape that training sees.

    Examples:
        >>> stored_form("F32", (3, 4))
        ('F32', (3, 4))
        >>> stored_form("C128", (3,))
        ('F64', (3, 2))
    """
    if logical_dtype in _STORED_AS_PAIRS:
        return _STORED_AS_PAIRS[logical_dtype], (*shape, 2)
    itemsize_bytes(logical_dtype)
    return logical_dtype, shape


def tensor_bytes(stored_dtype: str, stored_shape: tuple[int, ...]) -> int:
    """Return the bytes of a whole tensor.

    Examples:
        >>> tensor_bytes("BF16", (3, 4)), tensor_bytes("F32", ()), tensor_bytes("F32", (0, 7))
        (24, 4, 0)
    """
    total = itemsize_bytes(stored_dtype)
    for length in stored_shape:
        total *= length
    return total


def sized_bytes(stored_dtype: str, stored_shape: tuple[int, ...]) -> int | None:
    """Return the bytes of a whole tensor that somebody else describes, or None when no tensor is that large.

    Multiplies no further than 64 bits, whatever the shape claims; as safetensors does, a zero behind an overflow is too
    late.

    Examples:
        >>> sized_bytes("F32", (3, 4)), sized_bytes("F32", (2**62, 2**62)), sized_bytes("F32", (0, 2**62))
        (48, None, 0)
    """
    total = itemsize_bytes(stored_dtype)
    for length in stored_shape:
        total *= length
        if total > MAX_SIZE or length > MAX_SIZE:
            return None
    return total
