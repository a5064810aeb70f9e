"""Which elements a shard is, and where their bytes lie: regions of a tensor, and runs of a file.

A `Region` is a product of one list of spans per dim, which covers every way in which DTensor cuts a tensor (a box is
the case of one span per dim). `runs` turns it into contiguous byte ranges of the row-major whole tensor, each with its
place in the shard's own row-major memory. Runs are held as numpy arrays: a Shard(1) of a large embedding is 100,000 of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]
"""(start, length) along one dim, in elements."""

IntArray = npt.NDArray[np.int64]


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join spans that touch, and drop empty ones; order is kept.

    Examples:
        >>> merge_spans([(0, 2), (2, 3), (7, 0), (8, 1)])
        ((0, 5), (8, 1))
    """
    merged: list[Span] = []
    for start, length in spans:
        if not length:
            continue
        if merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return tuple(merged)


def cut_spans(spans: Iterable[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Return elements `start` to `stop`, counted along the spans laid end to end.

    Examples:
        >>> cut_spans([(0, 4), (10, 4)], 3, 6)
        ((3, 1), (10, 2))
    """
    kept: list[Span] = []
    position = 0
    for span_start, length in spans:
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            kept.append((span_start + low - position, high - low))
        position += length
    return merge_spans(kept)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor: along each dim, the spans that it holds, ascending and disjoint, in elements of the whole."""

    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """Return the region that is all of a tensor of this shape."""
        return cls(tuple(merge_spans([(0, length)]) for length in shape))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The shape of the shard in memory, in elements."""
        return tuple(sum(length for _, length in spans) for spans in self.spans)

    @property
    def numel(self) -> int:
        """The number of elements (1 for a 0-dim tensor)."""
        return prod(self.lengths)

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Yield (offsets, lengths) of each box, in row-major order."""
        for spans in product(*self.spans):
            yield tuple(start for start, _ in spans), tuple(length for _, length in spans)


@dataclass(frozen=True, slots=True)
class Runs:
    """Contiguous byte ranges, in order of the shard's memory.

    Attributes:
        byte_offsets: int64 `[num_runs]`, where each run starts in the whole tensor's bytes.
        local_byte_offsets: int64 `[num_runs]`, where it starts in the shard's bytes.
        num_bytes: int64 `[num_runs]`, its length.
    """

    byte_offsets: IntArray
    local_byte_offsets: IntArray
    num_bytes: IntArray

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def total_bytes(self) -> int:
        """The bytes of all runs."""
        return int(self.num_bytes.sum())

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.byte_offsets.tolist(), self.local_byte_offsets.tolist(), self.num_bytes.tolist(), strict=True)

    def clip(self, local_start: int, local_stop: int) -> Runs:
        """Return the part of the runs whose shard bytes lie in `[local_start, local_stop)`."""
        low = np.maximum(self.local_byte_offsets, local_start)
        high = np.minimum(self.local_byte_offsets + self.num_bytes, local_stop)
        keep = high > low
        shift = low - self.local_byte_offsets
        return Runs((self.byte_offsets + shift)[keep], low[keep], (high - low)[keep])


def runs(region: Region, shape: tuple[int, ...], itemsize_bytes: int) -> Runs:
    """Return a region's contiguous byte ranges within the row-major whole tensor.

    Args:
        region: the part, one list of spans per dim of `shape`.
        shape: the whole tensor's shape.
        itemsize_bytes: bytes of one element.

    Examples:
        >>> list(runs(Region((((0, 2),), ((1, 2),))), (2, 4), 4))
        [(4, 0, 8), (20, 8, 8)]
        >>> list(runs(Region((((1, 1),), ((0, 4),))), (2, 4), 4))
        [(16, 0, 16)]
    """
    empty = np.zeros(0, dtype=np.int64)
    if region.numel == 0:
        return Runs(empty, empty, empty)
    strides = [itemsize_bytes] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    cut_dim = len(shape) - 1
    while cut_dim >= 0 and region.spans[cut_dim] == ((0, shape[cut_dim]),):
        cut_dim -= 1
    if cut_dim < 0:
        whole = np.array([prod(shape) * itemsize_bytes], dtype=np.int64)
        return Runs(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), whole)
    offsets = np.array([start * strides[cut_dim] for start, _ in region.spans[cut_dim]], dtype=np.int64)
    sizes = np.array([length * strides[cut_dim] for _, length in region.spans[cut_dim]], dtype=np.int64)
    for dim in range(cut_dim - 1, -1, -1):
        indices = np.concatenate([np.arange(start, start + length) for start, length in region.spans[dim]])
        offsets = (indices[:, None] * strides[dim] + offsets[None, :]).reshape(-1)
        sizes = np.tile(sizes, len(indices))
    local = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)[:-1]])
    return Runs(offsets, local, sizes)
