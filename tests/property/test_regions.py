from __future__ import annotations

from itertools import pairwise, product
from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.checksum import Partial, crc64
from shardpoint.geometry import Region, merge_spans, runs
from shardpoint.layout import Mesh, Placement, owned_region, replica_ranks
from tests.property.drawn import elements, meshes, placements_on, shapes

Layout = tuple[Mesh, tuple[Placement, ...], tuple[int, ...]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    mesh, shape = draw(meshes()), draw(shapes())
    return mesh, draw(placements_on(mesh.shape, len(shape))), shape


@st.composite
def regions(draw: st.DrawFn) -> tuple[Region, tuple[int, ...]]:
    """Draw any region, not only those that a mesh makes."""
    shape = draw(shapes())
    spans = []
    for length in shape:
        held = draw(st.sets(st.integers(0, length - 1))) if length else set()
        spans.append(merge_spans((index, 1) for index in sorted(held)))
    return Region(tuple(spans)), shape


@given(layouts())
def test_the_coordinates_together_hold_every_element_once_for_each_replica(layout: Layout) -> None:
    mesh, placements, shape = layout
    count = np.zeros(prod(shape), dtype=int)
    for coordinate in product(*(range(size) for size in mesh.shape)):
        np.add.at(count, elements(owned_region(shape, mesh.shape, coordinate, placements), shape).reshape(-1), 1)
    replicas = prod(size for size, placement in zip(mesh.shape, placements, strict=True) if not placement.cuts)
    assert (count == replicas).all()


@given(layouts())
def test_replicas_hold_the_same_and_are_each_others(layout: Layout) -> None:
    mesh, placements, shape = layout
    for rank in mesh.ranks:
        coordinate = mesh.coordinate(rank)
        assert coordinate is not None
        assert mesh.rank_at(coordinate) == rank
        members = replica_ranks(mesh, placements, coordinate)
        assert rank in members
        for member in members:
            other = mesh.coordinate(member)
            assert other is not None
            assert replica_ranks(mesh, placements, other) == members
            own = owned_region(shape, mesh.shape, coordinate, placements)
            assert owned_region(shape, mesh.shape, other, placements) == own


@given(layouts())
def test_spans_ascend_without_touching(layout: Layout) -> None:
    mesh, placements, shape = layout
    for coordinate in product(*(range(size) for size in mesh.shape)):
        for spans in owned_region(shape, mesh.shape, coordinate, placements).spans:
            assert all(length > 0 for _, length in spans)
            assert all(a + n < b for (a, n), (b, _) in pairwise(spans))


@given(regions(), st.sampled_from([1, 2, 4, 8]))
def test_runs_are_numpys_elements_in_the_shards_order(drawn: tuple[Region, tuple[int, ...]], itemsize: int) -> None:
    region, shape = drawn
    expected = elements(region, shape)
    assert region.lengths == expected.shape
    assert region.numel == expected.size
    found: list[int] = []
    local = 0
    for byte_offset, local_offset, num_bytes in runs(region, shape, itemsize):
        assert local_offset == local
        assert num_bytes > 0
        assert byte_offset % itemsize == num_bytes % itemsize == 0
        found += range(byte_offset // itemsize, (byte_offset + num_bytes) // itemsize)
        local += num_bytes
    assert found == expected.reshape(-1).tolist()
    assert runs(region, shape, itemsize).total_bytes == local


@given(regions(), st.integers(0, 400), st.integers(0, 400))
def test_clipped_runs_are_a_slice_of_the_shards_bytes(
    drawn: tuple[Region, tuple[int, ...]], start: int, stop: int
) -> None:
    region, shape = drawn
    item = 2
    byte_of = [number * item + k for number in elements(region, shape).reshape(-1).tolist() for k in range(item)]
    clipped = runs(region, shape, item).clip(start, stop)
    assert [b for offset, _, n in clipped for b in range(offset, offset + n)] == byte_of[start:stop]
    assert [b for _, local, n in clipped for b in range(local, local + n)] == list(range(len(byte_of)))[start:stop]


@given(regions())
def test_boxes_are_the_region(drawn: tuple[Region, tuple[int, ...]]) -> None:
    region, shape = drawn
    count = np.zeros(shape, dtype=int)
    for offsets, lengths in region.boxes():
        count[tuple(slice(start, start + n) for start, n in zip(offsets, lengths, strict=True))] += 1
    assert np.flatnonzero(count == 1).tolist() == elements(region, shape).reshape(-1).tolist()
    assert count.max(initial=0) <= 1


@given(layouts(), st.data())
def test_resharding_by_runs_is_the_identity(layout: Layout, data: st.DataObject) -> None:
    mesh, placements, shape = layout
    other = data.draw(meshes())
    new_placements = data.draw(placements_on(other.shape, len(shape)))
    whole = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    stored = np.zeros(whole.nbytes, dtype=np.uint8)
    flat = whole.reshape(-1, 4)
    for coordinate in product(*(range(size) for size in mesh.shape)):
        region = owned_region(shape, mesh.shape, coordinate, placements)
        shard = flat[elements(region, shape).reshape(-1)].reshape(-1)
        for byte_offset, local, n in runs(region, shape, 4):
            stored[byte_offset : byte_offset + n] = shard[local : local + n]
    for coordinate in product(*(range(size) for size in other.shape)):
        region = owned_region(shape, other.shape, coordinate, new_placements)
        shard = np.zeros(region.numel * 4, dtype=np.uint8)
        for byte_offset, local, n in runs(region, shape, 4):
            shard[local : local + n] = stored[byte_offset : byte_offset + n]
        assert shard.tolist() == flat[elements(region, shape).reshape(-1)].reshape(-1).tolist()


@st.composite
def partitions(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """Draw bytes and the runs that they are cut into (some may be empty), in any order."""
    data = draw(st.binary(max_size=300))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    edges = [0, *cuts, len(data)]
    return data, draw(st.permutations(list(pairwise(edges))))


def partial_of(data: bytes, cut: list[tuple[int, int]]) -> Partial:
    partial = Partial()
    for start, stop in cut:
        partial.add(crc64(data[start:stop]), start, stop - start, len(data))
    return partial


@given(partitions(), st.integers(0, 12))
def test_merged_partials_are_the_crc_of_the_whole(drawn: tuple[bytes, list[tuple[int, int]]], first_half: int) -> None:
    data, cut = drawn
    mine, theirs = partial_of(data, cut[:first_half]), partial_of(data, cut[first_half:])
    mine.merge(theirs)
    assert mine.covers(len(data))
    assert mine.whole_crc(len(data)) == crc64(data)


@given(partitions(), st.data())
def test_no_fault_in_the_cover_goes_unnoticed(drawn: tuple[bytes, list[tuple[int, int]]], data: st.DataObject) -> None:
    # Each run is counted any number of times and anywhere; the oracle counts bytes.
    whole, cut = drawn
    size = len(whole)
    faulty: list[tuple[int, int]] = []
    for start, stop in cut:
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 0, 2]))):
            moved = data.draw(st.one_of(st.just(start), st.integers(0, size - (stop - start))))
            faulty.append((moved, moved + stop - start))
    count = np.zeros(size, dtype=int)
    for start, stop in faulty:
        count[start:stop] += 1
    assert partial_of(whole, faulty).covers(size) == bool((count == 1).all())
