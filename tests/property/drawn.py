"""Which meshes, placements, shapes and values the property tests draw."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import MergedTable, Table, TensorFact, merge_tables

RankedTables = Sequence[tuple[Sequence[int], Table]]


@st.composite
def meshes(draw: st.DrawFn, max_axes: int = 3, max_ranks: int = 8) -> Mesh:
    """Draw a mesh whose ranks stand in any order."""
    shape: list[int] = []
    for _ in range(draw(st.integers(1, max_axes))):
        shape.append(draw(st.integers(1, max_ranks // prod(shape))))
    return Mesh(tuple(shape), tuple(draw(st.permutations(range(prod(shape))))))


@st.composite
def placements_on(draw: st.DrawFn, mesh_shape: tuple[int, ...], num_dims: int) -> tuple[Placement, ...]:
    """Draw placements, among them strided shards whose split factor is torch's (cut last) and literal ones."""
    drawn: list[Placement] = []
    for axis in range(len(mesh_shape)):
        kind = draw(st.sampled_from(["replicate", "shard", "strided_shard"] if num_dims else ["replicate"]))
        dim = draw(st.integers(0, num_dims - 1)) if num_dims else 0
        if kind == "replicate":
            drawn.append(Placement("replicate"))
        elif kind == "shard":
            drawn.append(Placement("shard", dim))
        else:
            factors = st.one_of(st.just(prod(mesh_shape[axis + 1 :])), st.integers(1, 4))
            drawn.append(Placement("strided_shard", dim, draw(factors)))
    return tuple(drawn)


def shapes(max_dims: int = 3, max_length: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes: 0-dim, empty and uneven ones too."""
    return st.lists(st.integers(0, max_length), max_size=max_dims).map(tuple)


def elements(region: Region, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the row-major numbers of a region's elements in the whole tensor, in the shard's shape, by numpy alone."""
    whole = np.arange(prod(shape)).reshape(shape)
    if not shape:
        return whole
    indices = [
        np.array([i for start, n in spans for i in range(start, start + n)], dtype=np.int64) for spans in region.spans
    ]
    return whole[np.ix_(*indices)]


DTYPES = st.sampled_from(["U8", "BF16", "F32", "I64", "C64", "C128", "C32"])
# Long enough that replicas share a tensor (cuts at multiples of 4096 bytes), and short, uneven and empty ones.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 65, 130]))
SHAPES = st.lists(LENGTHS, max_size=2).map(tuple)


@st.composite
def ranked_tables(draw: st.DrawFn) -> tuple[RankedTables, int]:
    """Draw a world's tables: whole meshes, halves side by side, plain tensors, names that only some ranks have."""
    world = draw(st.integers(1, 6))
    facts: list[list[TensorFact]] = [[] for _ in range(world)]
    rank_meshes: list[dict[Mesh, int]] = [{} for _ in range(world)]

    def add(
        rank: int, key: str, dtype: str, shape: tuple[int, ...], mesh: Mesh | None, how: tuple[Placement, ...]
    ) -> None:
        index = None if mesh is None else rank_meshes[rank].setdefault(mesh, len(rank_meshes[rank]))
        facts[rank].append(TensorFact("modeling", key, None, key, dtype, shape, index, how))

    for number in range(draw(st.integers(1, 5))):
        key, dtype, shape = f"t{number}", draw(DTYPES), draw(SHAPES)
        order = draw(st.permutations(range(world)))
        kind = draw(st.sampled_from(["mesh", "stage", "side by side", "plain", "mixed"]))
        if kind == "plain":
            for rank in draw(st.sets(st.integers(0, world - 1), min_size=1)):
                add(rank, key, dtype, shape, None, ())
            continue
        drawn = draw(meshes(max_ranks=world if kind == "mesh" else max(1, world // 2)))
        placements = draw(placements_on(drawn.shape, len(shape)))
        size = len(drawn.ranks)
        groups = [order[:size]] if kind in ("mesh", "stage", "mixed") else [order[:size], order[size : 2 * size]]
        for group in (group for group in groups if len(group) == size):
            mesh = Mesh(drawn.shape, tuple(group))
            for rank in group:
                add(rank, key, dtype, shape, mesh, placements)
        if kind == "mixed":
            for rank in order[size : size + 1]:
                add(rank, key, dtype, shape, None, ())
    tables = [([rank], Table(tuple(rank_meshes[rank]), tuple(facts[rank]))) for rank in range(world)]
    return tables, world


def worlds() -> st.SearchStrategy[MergedTable]:
    """Draw a world's merged table."""
    return ranked_tables().map(lambda drawn: merge_tables(*drawn))
