"""Which meshes, placements, shapes and values the property tests draw."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement


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
