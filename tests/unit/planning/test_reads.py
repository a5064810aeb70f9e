from __future__ import annotations

import numpy as np
import pytest

from shardpoint.geometry import Region
from shardpoint.planning import Entry, Read, Wanted, plan_reads, wanted_runs
from shardpoint.planning.ownership import held_runs
from shardpoint.planning.reads import MAX_GAP_BYTES, MAX_VECTORS

KIB = 1024


def wanted(byte_offset: int, num_bytes: int, counted: tuple[int, int] = (0, 0), file: int = 0) -> Wanted:
    """Want a whole tensor."""
    return Wanted(file, byte_offset, (0, 0, num_bytes), counted)


def places(reads: tuple[Read, ...]) -> list[tuple[int, int, int]]:
    return [(read.file, read.byte_offset, read.num_bytes) for read in reads]


def test_ten_thousand_small_tensors_are_a_handful_of_reads() -> None:
    plan = plan_reads([wanted(4096 + index * KIB, KIB) for index in range(10_000)])
    assert len(plan.reads) <= 12
    assert plan.read_bytes == plan.wanted_bytes == 10_000 * KIB
    assert max(read.vectors for read in plan.reads) <= MAX_VECTORS


def test_a_small_gap_is_read_and_a_large_one_is_not() -> None:
    near, far = 100 + MAX_GAP_BYTES, 100 + MAX_GAP_BYTES + 50 + MAX_GAP_BYTES + 1
    plan = plan_reads([wanted(0, 100), wanted(near, 50), wanted(far, 7)])
    assert places(plan.reads) == [(0, 0, near + 50), (0, far, 7)]
    assert [read.vectors for read in plan.reads] == [3, 1]
    assert (plan.wanted_bytes, plan.read_bytes) == (157, 157 + MAX_GAP_BYTES)


def test_gaps_count_as_vectors() -> None:
    plan = plan_reads([wanted(index * 20, 10) for index in range(2000)])
    assert [read.vectors for read in plan.reads] == [1023, 1023, 1023, 927]
    assert sum(read.vectors for read in plan.reads) == 2000 + 1996  # no gap between two reads is read


def test_files_are_never_joined() -> None:
    plan = plan_reads([wanted(100, 10, file=1), wanted(0, 100, file=0), wanted(110, 10, file=1)])
    assert places(plan.reads) == [(0, 0, 100), (1, 100, 20)]


def test_a_large_tensor_is_cut_at_multiples_within_its_file() -> None:
    plan = plan_reads([wanted(1000, 20_000)], piece_bytes=8192)
    assert places(plan.reads) == [(0, 1000, 7192), (0, 8192, 8192), (0, 16384, 4616)]
    assert plan.local_offsets == plan.tensor_offsets == [0, 7192, 15384]
    assert plan.file_offsets == [1000, 8192, 16384]


def test_what_is_counted_is_cut_out() -> None:
    plan = plan_reads([wanted(0, 100, counted=(30, 70))])
    assert list(zip(plan.local_offsets, plan.num_bytes, plan.counted, strict=True)) == [
        (0, 30, False),
        (30, 40, True),
        (70, 30, False),
    ]
    assert places(plan.reads) == [(0, 0, 100)]  # still one call


@pytest.mark.parametrize("rank", range(4))
def test_a_replica_starts_with_its_share_and_goes_on_around(rank: int) -> None:
    piece = 64 * KIB
    tensors = [wanted(index * piece, piece, (0, piece) if index // 2 == rank else (0, 0)) for index in range(8)]
    order = [read.byte_offset // piece for read in plan_reads(tensors, piece_bytes=piece).reads]
    assert order == [(2 * rank + step) % 8 for step in range(8)]


def test_a_share_in_several_places_comes_first() -> None:
    piece = 64 * KIB
    own = {1, 4, 5}
    tensors = [wanted(index * piece, piece, (0, piece) if index in own else (0, 0)) for index in range(7)]
    order = [read.byte_offset // piece for read in plan_reads(tensors, piece_bytes=piece).reads]
    assert order == [1, 4, 5, 6, 0, 2, 3]


def test_without_replicas_the_order_is_that_of_the_files() -> None:
    for counted in ((0, 100), (0, 0)):
        plan = plan_reads([wanted(50_000, 100, counted), wanted(0, 100, counted)])
        assert [read.byte_offset for read in plan.reads] == [0, 50_000]


def test_nothing_to_read() -> None:
    empty = plan_reads([wanted(0, 0), Wanted(0, 0, held_runs(entry((0, 3)), Region.whole((0, 3))), (0, 0))])
    assert empty.reads == ()
    assert plan_reads([]).reads == ()


def test_a_read_is_alone_where_all_that_it_fills_is() -> None:
    items = [(0, True), (1, True), (2, False), (6, True)]
    plan = plan_reads([Wanted(0, 100 * KIB * place, (0, 0, 100 * KIB), (0, 0), is_alone) for place, is_alone in items])
    assert [(read.num_bytes, read.is_alone) for read in plan.reads] == [(300 * KIB, False), (100 * KIB, True)]


def entry(shape: tuple[int, ...], dtype: str = "F32") -> Entry:
    return Entry("modeling", "w", None, "w", dtype, shape, ())


@pytest.mark.parametrize(
    "shape, region, expected",
    [
        ((4, 6), Region.whole((4, 6)), (0, 0, 96)),
        ((4, 6), Region((((1, 2),), ((0, 6),))), (24, 0, 48)),
        ((), Region(()), (0, 0, 4)),
        ((7,), Region((((3, 4),),)), (12, 0, 16)),
    ],
)
def test_contiguous_regions_are_one_run(shape: tuple[int, ...], region: Region, expected: tuple[int, int, int]) -> None:
    assert wanted_runs(entry(shape), region) == expected
    assert list(held_runs(entry(shape), region)) == [expected]


def test_other_regions_are_runs() -> None:
    runs = wanted_runs(entry((4, 6)), Region((((0, 4),), ((1, 2),))))
    assert not isinstance(runs, tuple)
    assert list(runs) == [(4, 0, 8), (28, 8, 8), (52, 16, 8), (76, 24, 8)]
    two_spans = wanted_runs(entry((4, 6)), Region((((0, 1), (2, 1)), ((0, 6),))))
    assert not isinstance(two_spans, tuple)
    assert list(two_spans) == [(0, 0, 24), (48, 24, 24)]
    pairs = wanted_runs(entry((4, 3), "C128"), Region((((1, 1),), ((0, 3),))))
    assert pairs == (48, 0, 48)


def test_the_columns_of_a_large_embedding_are_few_reads() -> None:
    rows = 100_000
    runs = wanted_runs(entry((rows, 64)), Region((((0, rows),), ((0, 32),))))
    plan = plan_reads([Wanted(0, 4096, runs, (0, rows * 128))])
    assert len(plan.num_bytes) >= rows
    assert len(plan.reads) <= 1 + 2 * rows // MAX_VECTORS
    covered = np.zeros(rows * 128, dtype=np.int64)
    for start, length in zip(plan.local_offsets, plan.num_bytes, strict=True):
        covered[start : start + length] += 1
    assert (covered == 1).all()
