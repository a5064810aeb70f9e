"""What the checksum of a tensor is, computed from parts that any number of ranks hold in any order.

CRC-64/NVME is linear over GF(2): with `shift(x, n)` for "n zero bytes follow" and `zeros(n)` for the CRC of n zeros,

    crc(whole) = zeros(total) XOR (XOR over runs of shift(crc(run) XOR zeros(len(run)), bytes after the run))

so each rank XORs up its own runs into a `Partial` of 8 bytes and the coordinator XORs those. XOR alone does not notice
a run that nobody owned (it counts as zeros, which is what a preallocated file holds) or one that was counted twice (it
cancels); therefore a partial also carries the coverage sums `sum(len)` and `sum(end^2 - start^2)`, which must come to
`(n, n^2)`. They notice every single run that is missing, doubled or shifted; faults that are symmetric about the middle
(the first and last quarter missing, the inner two doubled) cancel in them, so a third sum, of `mix(end) - mix(start)`
with a mixing function, must come to `mix(n) - mix(0)`: there, only a cover of each byte exactly once cancels.

Source: CRC-64/NVME as in the NVMe base specification and S3's `ChecksumCRC64NVME`; awscrt's `combine_crc64nvme`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from awscrt import checksums

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MASK_64 = (1 << 64) - 1


def crc64(data: Buffer, previous: int = 0) -> int:
    """Return the CRC-64/NVME of some bytes, going on from `previous` (the CRC of the bytes before them).

    Args:
        data: any C-contiguous buffer. Calls of 64 KiB and more release the GIL.
        previous: 0, or the CRC so far.

    Examples:
        >>> hex(crc64(b"123456789"))
        '0xae8b14860a799888'
    """
    return int(checksums.crc64nvme(data, previous))


def combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC of A||B from the CRCs of A and of B, and B's length in bytes."""
    return int(checksums.combine_crc64nvme(first, second, second_bytes))


def shift(crc: int, num_bytes: int) -> int:
    """Return the linear contribution of bytes that `num_bytes` other bytes follow."""
    return int(checksums.combine_crc64nvme(crc, 0, num_bytes))


@lru_cache(maxsize=4096)
def zeros(num_bytes: int) -> int:
    """Return the CRC of `num_bytes` zero bytes, by doubling."""
    result, block, block_bytes = 0, crc64(b"\0"), 1
    while num_bytes:
        if num_bytes & 1:
            result = combine(result, block, block_bytes)
        num_bytes >>= 1
        if num_bytes:
            block = combine(block, block, block_bytes)
            block_bytes *= 2
    return result


def to_hex(crc: int) -> str:
    """Return a CRC as 16 hex digits, the form that manifests use.

    Examples:
        >>> to_hex(255)
        '00000000000000ff'
    """
    return f"{crc:016x}"


def _mix(position: int) -> int:
    """Return 64 bits that look random: unequal sets of positions have unequal sums."""
    value = ((position + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 31)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 29)


@dataclass(slots=True)
class Partial:
    """One rank's part of one tensor's checksum, with the evidence of which bytes it covers.

    Attributes:
        crc: XOR of the shifted contributions of the runs.
        sum_bytes: sum of the runs' lengths.
        sum_squares: sum of `end^2 - start^2` over the runs.
        sum_mixed: sum of `mix(end) - mix(start)` over the runs, modulo 2^64.
    """

    crc: int = 0
    sum_bytes: int = 0
    sum_squares: int = 0
    sum_mixed: int = 0

    def add(self, run_crc: int, byte_offset: int, num_bytes: int, total_bytes: int) -> None:
        """Count one run.

        Args:
            run_crc: plain CRC of the run's bytes.
            byte_offset: where it starts in the tensor.
            num_bytes: its length.
            total_bytes: the tensor's length.
        """
        end = byte_offset + num_bytes
        self.crc ^= shift(run_crc ^ zeros(num_bytes), total_bytes - end)
        self.sum_bytes += num_bytes
        self.sum_squares += end * end - byte_offset * byte_offset
        self.sum_mixed = (self.sum_mixed + _mix(end) - _mix(byte_offset)) & _MASK_64

    def merge(self, other: Partial) -> None:
        """Count another rank's runs too."""
        self.crc ^= other.crc
        self.sum_bytes += other.sum_bytes
        self.sum_squares += other.sum_squares
        self.sum_mixed = (self.sum_mixed + other.sum_mixed) & _MASK_64

    def covers(self, total_bytes: int) -> bool:
        """Whether the runs counted so far cover each of `total_bytes` bytes exactly once.

        The number of runs over byte x is the number of starts up to x less that of ends. If the mixed starts and ends
        cancel but for 0 and the end, that number is 1 everywhere; other boundaries cancel by a chance of 2^-64 only.
        """
        mixed = (_mix(total_bytes) - _mix(0)) & _MASK_64
        sums = (self.sum_bytes, self.sum_squares, self.sum_mixed)
        return sums == (total_bytes, total_bytes * total_bytes, mixed)

    def whole_crc(self, total_bytes: int) -> int:
        """Return the whole tensor's CRC; only meaningful when the runs `covers` it."""
        return self.crc ^ zeros(total_bytes)


_PACKED = struct.Struct("<IQQQQQ")


def pack_partials(partials: Iterable[tuple[int, Partial]]) -> bytes:
    """Return (tensor index, partial) pairs as 44 bytes each, for a vote."""
    return b"".join(
        _PACKED.pack(index, p.crc, p.sum_bytes, p.sum_squares & _MASK_64, p.sum_squares >> 64, p.sum_mixed)
        for index, p in partials
    )


def unpack_partials(packed: bytes) -> list[tuple[int, Partial]]:
    """Return the pairs that `pack_partials` packed."""
    return [
        (index, Partial(crc, sum_bytes, low | (high << 64), mixed))
        for index, crc, sum_bytes, low, high, mixed in _PACKED.iter_unpack(packed)
    ]


_ROW = np.dtype(
    [("index", "<u4"), ("crc", "<u8"), ("bytes", "<u8"), ("squares", "<u8"), ("squares_high", "<u8"), ("mixed", "<u8")]
)
"""What `pack_partials` packs, as numpy reads it."""

_Words = npt.NDArray[np.uint64]
_HALF = np.uint64(32)
_LOW = np.uint64((1 << 32) - 1)


def merge_packed(packed: Sequence[bytes]) -> bytes:
    """Merge what any number of ranks packed, as `Partial.merge` does, in any order and grouping.

    Args:
        packed: what `pack_partials` or this function returned.

    Returns:
        One partial for each tensor that occurs, packed, ascending by index. All sums are modulo their packed size, 2^64
        and 2^128: a cover that is right has no larger ones.

    Raises:
        ValueError: it is not a whole number of partials.
    """
    rows = np.frombuffer(b"".join(packed), dtype=_ROW)
    if not len(rows):
        return b""
    order = np.argsort(rows["index"], kind="stable")
    index = rows["index"][order]
    starts = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1]]))
    low, high = (rows[name].astype(np.uint64)[order] for name in ("squares", "squares_high"))
    # 2^32 numbers of 32 bits add up in 64 bits without loss; then the upper halves are carried.
    units = np.add.reduceat(low & _LOW, starts)
    halves = np.add.reduceat(low >> _HALF, starts) + (units >> _HALF)
    merged = np.empty(len(starts), dtype=_ROW)
    merged["index"] = index[starts]
    merged["crc"] = np.bitwise_xor.reduceat(rows["crc"].astype(np.uint64)[order], starts)
    merged["bytes"] = np.add.reduceat(rows["bytes"].astype(np.uint64)[order], starts)
    merged["squares"] = (units & _LOW) | (halves << _HALF)
    merged["squares_high"] = np.add.reduceat(high, starts) + (halves >> _HALF)
    merged["mixed"] = np.add.reduceat(rows["mixed"].astype(np.uint64)[order], starts)
    return merged.tobytes()


@dataclass(frozen=True, slots=True)
class WholeTensors:
    """What all ranks' partials say of a list of tensors.

    Attributes:
        crcs: each tensor's CRC; only meaningful where `covered`.
        counted_bytes: how many bytes the ranks counted of each.
        covered: whether the runs cover each byte exactly once, as `Partial.covers` says.
    """

    crcs: list[int]
    counted_bytes: list[int]
    covered: list[bool]


def whole_tensors(packed: Sequence[bytes], sizes_bytes: Sequence[int]) -> WholeTensors:
    """Return the CRCs of whole tensors, and whether the ranks covered them.

    Args:
        packed: what `pack_partials` or `merge_packed` returned.
        sizes_bytes: the tensors' sizes, in the order of the partials' indices.

    Raises:
        ValueError: a partial is of a tensor that is not there, or `packed` is not a whole number of partials.
    """
    rows = np.frombuffer(merge_packed(packed), dtype=_ROW)
    if len(rows) and int(rows["index"][-1]) >= len(sizes_bytes):
        text = f"the votes count bytes of tensor {rows['index'][-1]}, but there are {len(sizes_bytes)} tensors"
        raise ValueError(text)
    totals = np.zeros(len(sizes_bytes), dtype=_ROW)
    totals[rows["index"]] = rows
    sizes = np.array(sizes_bytes, dtype=np.uint64)
    squares = [size * size for size in sizes_bytes]
    covered = (totals["bytes"] == sizes) & (totals["mixed"] == _mix_all(sizes) - np.uint64(_mix(0)))
    covered &= totals["squares"] == np.array([square & _MASK_64 for square in squares], dtype=np.uint64)
    covered &= totals["squares_high"] == np.array([square >> 64 for square in squares], dtype=np.uint64)
    crcs = totals["crc"] ^ np.array([zeros(size) for size in sizes_bytes], dtype=np.uint64)
    return WholeTensors(crcs.tolist(), totals["bytes"].tolist(), covered.tolist())


def _mix_all(positions: npt.NDArray[Any]) -> _Words:
    """Return `_mix` of each position."""
    value = (positions.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(29))
