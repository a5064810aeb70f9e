"""Which part of a tensor each rank holds, given the mesh and the placements.

The rule was compared with the real local tensors of FSDP2, HSDP, tensor parallel, TP x FSDP, HSDP x TP, expert parallel
and packed weights, even and uneven. torch's own `compute_local_shape_and_global_offset` is wrong for several uneven
`_StridedShard` layouts, so it is not used; the caller checks the result against the real local tensor's shape.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Literal

import msgspec

from shardpoint.errors import UsageError
from shardpoint.geometry import Region, Span, cut_spans, merge_spans

PlacementKind = Literal["replicate", "shard", "strided_shard"]


class Placement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one mesh axis treats a tensor: holds it alike, or cuts one of its dims.

    Attributes:
        kind: `"replicate"`, `"shard"` (cut as `torch.chunk` does) or `"strided_shard"`.
        dim: the tensor dim that is cut; 0 for replicate.
        split_factor: for a strided shard, torch's `split_factor`; 1 otherwise.
    """

    kind: PlacementKind
    dim: int = 0
    split_factor: int = 1

    @property
    def cuts(self) -> bool:
        """Whether the axis cuts a dim."""
        return self.kind != "replicate"


@dataclass(frozen=True)
class Mesh:
    """An n-dimensional arrangement of ranks.

    A value: equal meshes are interchangeable. Its hash and the ranks' positions are computed once, since a table of
    thousands of tensors looks up one mesh of thousands of ranks for each of them.

    Attributes:
        shape: size of each axis.
        ranks: the ranks in row-major order, `prod(shape)` of them.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if prod(self.shape) != len(self.ranks) or len(set(self.ranks)) != len(self.ranks):
            text = f"a mesh of shape {self.shape} needs {prod(self.shape)} distinct ranks, got {self.ranks}"
            raise UsageError(text)

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.ranks))

    @cached_property
    def _position_of(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def __hash__(self) -> int:
        return self._hash

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Return a rank's index along each axis, or None when it is not in the mesh."""
        position = self._position_of.get(rank)
        if position is None:
            return None
        coordinate: list[int] = []
        for size in reversed(self.shape):
            position, index = divmod(position, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    def rank_at(self, coordinate: tuple[int, ...]) -> int:
        """Return the rank at an index along each axis."""
        position = 0
        for size, index in zip(self.shape, coordinate, strict=True):
            position = position * size + index
        return self.ranks[position]


def _chunk(spans: tuple[Span, ...], num_chunks: int, index: int) -> tuple[Span, ...]:
    total = sum(length for _, length in spans)
    size = -(-total // num_chunks)
    return cut_spans(spans, min(size * index, total), min(size * (index + 1), total))


def _strided_chunk(spans: tuple[Span, ...], split_factor: int, num_chunks: int, index: int) -> tuple[Span, ...]:
    pieces = (_chunk(_chunk(spans, split_factor, piece), num_chunks, index) for piece in range(split_factor))
    return merge_spans(span for piece in pieces for span in piece)


def owned_region(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> Region:
    """Return the part of a tensor that the rank at a mesh coordinate holds.

    Along each tensor dim the axes that cut it are applied one after another. Plain shards cut from left to right. A
    strided shard whose split factor equals the product of the sizes of the cutting axes of the same dim to its right
    was cut last (FSDP over tensor parallel), so it is applied after them, from right to left. Any other strided shard
    is literal (packed weights): each of `split_factor` pieces is chunked, and a rank holds its chunk of every piece.

    Args:
        shape: the global shape.
        mesh_shape: size of each mesh axis.
        coordinate: the rank's index along each axis.
        placements: one per axis.

    Raises:
        UsageError: a placement cuts a dim that the tensor does not have.
    """
    spans: list[tuple[Span, ...]] = [merge_spans([(0, length)]) for length in shape]
    axes_of_dim: dict[int, list[int]] = defaultdict(list)
    for axis, placement in enumerate(placements):
        if placement.cuts:
            if not 0 <= placement.dim < len(shape):
                text = f"placement {placement} cuts dim {placement.dim} of a tensor of shape {shape}"
                raise UsageError(text)
            axes_of_dim[placement.dim].append(axis)
    for dim, axes in axes_of_dim.items():
        outer: list[int] = []
        for axis in axes:
            placement = placements[axis]
            inner_size = prod(mesh_shape[other] for other in axes if other > axis)
            if placement.kind == "strided_shard" and placement.split_factor == inner_size > 1:
                outer.insert(0, axis)
        for axis in [axis for axis in axes if axis not in outer] + outer:
            placement = placements[axis]
            if placement.kind == "shard" or axis in outer:
                spans[dim] = _chunk(spans[dim], mesh_shape[axis], coordinate[axis])
            else:
                spans[dim] = _strided_chunk(spans[dim], placement.split_factor, mesh_shape[axis], coordinate[axis])
    return Region(tuple(spans))


@lru_cache(maxsize=4096)
def replica_ranks(mesh: Mesh, placements: tuple[Placement, ...], coordinate: tuple[int, ...]) -> tuple[int, ...]:
    """Return, ascending, the ranks that hold what the one at `coordinate` holds: they differ on replicate axes only."""
    choices = [
        (index,) if placement.cuts else range(size)
        for size, index, placement in zip(mesh.shape, coordinate, placements, strict=True)
    ]
    return tuple(sorted(mesh.rank_at(other) for other in product(*choices)))
