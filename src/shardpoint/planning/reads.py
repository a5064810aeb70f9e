"""In which reads a rank's bytes come in: neighbours joined, large runs cut for several threads, its own share first.

A read is contiguous in its file and scattered in memory. Runs that stand close together in a file become one read: the
bytes between them are in pages that are read anyway, and cost less than another call. Large runs are cut, so that
several threads share them and a piece is checksummed while it is in the processor's cache. A rank begins with the bytes
that it counts towards the checksums; its replicas count others, so that together they ask a device for each page once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import itemsize_bytes, stored_form
from shardpoint.geometry import IntArray, Region, Runs
from shardpoint.planning.facts import Entry
from shardpoint.planning.ownership import held_runs

MAX_GAP_BYTES = 4096
MAX_VECTORS = 1024
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Wanted:
    """The bytes of one tensor that a rank reads.

    Attributes:
        file: which file.
        byte_offset: where the tensor begins in it.
        runs: what is wanted, within the tensor and within the rank's memory of it; or one run as a triple (offset in
            the tensor, offset in memory, bytes).
        counted: first and last + 1 byte, in the rank's memory, of what it counts towards the tensor's checksum.
        is_alone: whether no other rank wants any of these bytes.
    """

    file: int
    byte_offset: int
    runs: Runs | tuple[int, int, int]
    counted: tuple[int, int]
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of a file.

    Attributes:
        file: which file.
        byte_offset: where it begins.
        num_bytes: its length, gaps included.
        first: its first segment.
        stop: the segment after its last.
        vectors: pieces of memory that it goes to, gaps included.
        is_alone: whether no other rank wants any of it: then there is no use in leaving it in the page cache.
    """

    file: int
    byte_offset: int
    num_bytes: int
    first: int
    stop: int
    vectors: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of a rank, in the order in which to start them, and the segments that they are made of.

    A segment is contiguous in the file and in one tensor's memory. Segments stand in file order.

    Attributes:
        reads: what is read.
        tensors: for each segment, the index of its `Wanted`.
        file_offsets: where it begins in its file.
        tensor_offsets: where it begins in its tensor.
        local_offsets: where it begins in the rank's memory of the tensor.
        num_bytes: its length.
        counted: whether it counts towards the tensor's checksum.
    """

    reads: tuple[Read, ...]
    tensors: list[int]
    file_offsets: list[int]
    tensor_offsets: list[int]
    local_offsets: list[int]
    num_bytes: list[int]
    counted: list[bool]

    @property
    def wanted_bytes(self) -> int:
        """The bytes of all segments."""
        return sum(self.num_bytes)

    @property
    def read_bytes(self) -> int:
        """The bytes of all reads: those wanted, and the gaps between neighbours."""
        return sum(read.num_bytes for read in self.reads)


def wanted_runs(entry: Entry, region: Region) -> Runs | tuple[int, int, int]:
    """Return a region's bytes within the whole tensor; as one triple where they are contiguous (the common case)."""
    dtype, shape = stored_form(entry.dtype, entry.shape)
    spans = region.spans
    if not spans:
        return 0, 0, prod(shape) * itemsize_bytes(dtype)
    inner_is_whole = all(held == ((0, length),) for held, length in zip(spans[1:], entry.shape[1:], strict=True))
    if inner_is_whole and len(spans[0]) == 1:
        row_bytes = prod(shape[1:]) * itemsize_bytes(dtype)
        start, length = spans[0][0]
        return start * row_bytes, 0, length * row_bytes
    return held_runs(entry, region)


def plan_reads(wanted: Sequence[Wanted], *, piece_bytes: int = PIECE_BYTES) -> ReadPlan:
    """Plan how to read what is wanted.

    Args:
        wanted: one for each tensor; disjoint in memory.
        piece_bytes: a read has at most as many bytes; a multiple of 4096.

    Returns:
        The reads: first those that are mostly this rank's share, then the others in file order, from the end of the
        share on, around to its beginning.
    """
    table = _segments(wanted)
    if not table.shape[1]:
        return ReadPlan((), [], [], [], [], [], [])
    table = _cut(table, piece_bytes)
    table = table[:, np.lexsort((table[_FILE_OFFSET], table[_FILE]))]
    is_alone = np.array([item.is_alone for item in wanted])[table[_TENSOR]]
    reads = _own_first(_joined(table, piece_bytes, is_alone), table)
    tensors, _, file_offsets, tensor_offsets, local_offsets, num_bytes, counted = (column.tolist() for column in table)
    return ReadPlan(
        tuple(reads), tensors, file_offsets, tensor_offsets, local_offsets, num_bytes, [flag != 0 for flag in counted]
    )


_TENSOR, _FILE, _FILE_OFFSET, _TENSOR_OFFSET, _LOCAL_OFFSET, _NUM_BYTES, _COUNTED = range(7)
_OFFSETS = (_FILE_OFFSET, _TENSOR_OFFSET, _LOCAL_OFFSET)


def _segments(wanted: Sequence[Wanted]) -> IntArray:
    """Return the wanted runs, cut where the counted bytes begin and end: int64 `[7, num_segments]`."""
    single: list[tuple[int, int, int, int, int, int, int]] = []
    several: list[IntArray] = []
    for index, item in enumerate(wanted):
        low, high = item.counted
        if isinstance(item.runs, tuple):
            offset, local, length = item.runs
            edges = [local, min(max(low, local), local + length), max(min(high, local + length), local), local + length]
            for part, (start, stop) in enumerate(pairwise(edges)):
                if start < stop:
                    inside = offset + start - local
                    row = (index, item.file, item.byte_offset + inside, inside, start, stop - start, int(part == 1))
                    single.append(row)
            continue
        for is_counted, start, stop in ((0, 0, low), (1, low, high), (0, high, item.runs.total_bytes)):
            if start < stop:
                runs = item.runs.clip(start, stop)
                columns = (index, item.file, item.byte_offset + runs.byte_offsets, runs.byte_offsets)
                rest = (runs.local_byte_offsets, runs.num_bytes, is_counted)
                several.append(np.stack(np.broadcast_arrays(*columns, *rest)))
    rows = np.array(single, dtype=np.int64).reshape(-1, 7).T
    return np.concatenate([rows, *several], axis=1)


def _cut(table: IntArray, piece_bytes: int) -> IntArray:
    """Cut segments at the multiples of `piece_bytes` of their file."""
    start, stop = table[_FILE_OFFSET], table[_FILE_OFFSET] + table[_NUM_BYTES]
    first = start // piece_bytes
    pieces = (stop - 1) // piece_bytes - first + 1
    if int(pieces.max()) == 1:
        return table
    origin = np.repeat(np.arange(table.shape[1]), pieces)
    number = np.arange(len(origin)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + first[origin]
    low = np.maximum(start[origin], number * piece_bytes)
    high = np.minimum(stop[origin], (number + 1) * piece_bytes)
    cut = table[:, origin]
    shift = low - start[origin]
    for column in _OFFSETS:
        cut[column] += shift
    cut[_NUM_BYTES] = high - low
    return cut


def _joined(table: IntArray, piece_bytes: int, is_alone: npt.NDArray[np.bool_]) -> list[Read]:
    """Join neighbours into reads of at most `piece_bytes` and `MAX_VECTORS`, gaps included."""
    starts, stops = table[_FILE_OFFSET], table[_FILE_OFFSET] + table[_NUM_BYTES]
    gaps = starts[1:] - stops[:-1]
    apart = (table[_FILE, 1:] != table[_FILE, :-1]) | (gaps < 0) | (gaps > MAX_GAP_BYTES)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), table.shape[1]]
    # The vectors up to and with each segment: one for itself, and one for a gap in front of it.
    vectors = np.cumsum(1 + np.concatenate([np.zeros(1, np.int64), (gaps > 0) & ~apart])).tolist()
    shared = np.cumsum(~is_alone).tolist()
    files, begins, ends = table[_FILE].tolist(), starts.tolist(), stops.tolist()
    reads: list[Read] = []
    for low, high in pairwise(edges):
        first = low
        while first < high:
            before = vectors[first] - 1
            by_bytes = bisect_right(ends, begins[first] + piece_bytes, first, high)
            by_vectors = bisect_right(vectors, before + MAX_VECTORS, first, high)
            stop = max(first + 1, min(by_bytes, by_vectors))
            length = ends[stop - 1] - begins[first]
            is_shared = shared[stop - 1] > (shared[first - 1] if first else 0)
            num_vectors = vectors[stop - 1] - before
            reads.append(Read(files[first], begins[first], length, first, stop, num_vectors, not is_shared))
            first = stop
    return reads


def _own_first(reads: list[Read], table: IntArray) -> list[Read]:
    """Return the reads that are mostly counted, then the others, from the end of the longest stretch of those on."""
    counted: npt.NDArray[np.int64] = np.cumsum(table[_NUM_BYTES] * table[_COUNTED])
    wanted = np.cumsum(table[_NUM_BYTES])

    def total(sums: IntArray, read: Read) -> int:
        return int(sums[read.stop - 1]) - (int(sums[read.first - 1]) if read.first else 0)

    own = [2 * total(counted, read) >= total(wanted, read) for read in reads]
    if all(own) or not any(own):
        return reads
    stretches: list[tuple[int, int]] = []
    position = 0
    for is_own, stretch in groupby(own):
        length = len(list(stretch))
        position += length
        if is_own:
            stretches.append((length, position))
    after = max(stretches)[1]
    order = [*range(after, len(reads)), *range(after)]
    return [read for read, is_own in zip(reads, own, strict=True) if is_own] + [
        reads[index] for index in order if not own[index]
    ]
