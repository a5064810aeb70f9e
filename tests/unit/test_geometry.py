from __future__ import annotations

from shardpoint.geometry import Region, cut_spans, merge_spans, runs


def test_spans_that_touch_are_joined_and_empty_ones_dropped() -> None:
    assert merge_spans([]) == ()
    assert merge_spans([(3, 0)]) == ()
    assert merge_spans([(0, 2), (2, 0), (2, 1), (4, 1)]) == ((0, 3), (4, 1))


def test_a_cut_counts_along_the_spans() -> None:
    spans = [(0, 2), (10, 3), (20, 1)]
    assert cut_spans(spans, 0, 6) == tuple(spans)
    assert cut_spans(spans, 1, 4) == ((1, 1), (10, 2))
    assert cut_spans(spans, 4, 100) == ((12, 1), (20, 1))
    assert cut_spans(spans, 3, 3) == ()
    assert cut_spans(spans, 7, 9) == ()


def test_a_scalar_is_one_element_and_one_run() -> None:
    scalar = Region.whole(())
    assert (scalar.lengths, scalar.numel, list(scalar.boxes())) == ((), 1, [((), ())])
    assert list(runs(scalar, (), 8)) == [(0, 0, 8)]


def test_an_empty_region_has_no_runs_and_no_boxes() -> None:
    empty = Region.whole((3, 0))
    assert (empty.lengths, empty.numel, list(empty.boxes())) == ((3, 0), 0, [])
    assert len(runs(empty, (3, 0), 4)) == 0
    assert runs(empty, (3, 0), 4).total_bytes == 0
    assert len(runs(empty, (3, 0), 4).clip(0, 10)) == 0


def test_a_whole_tensor_is_one_run() -> None:
    assert list(runs(Region.whole((3, 4, 5)), (3, 4, 5), 2)) == [(0, 0, 120)]


def test_rows_are_one_run_and_columns_one_for_each_row() -> None:
    rows = Region((((2, 3),), ((0, 4),)))
    columns = Region((((0, 3),), ((1, 2),)))
    assert list(runs(rows, (8, 4), 4)) == [(32, 0, 48)]
    assert list(runs(columns, (3, 4), 1)) == [(1, 0, 2), (5, 2, 2), (9, 4, 2)]


def test_packed_columns_are_several_runs_in_each_row() -> None:
    packed = Region((((0, 2),), ((0, 1), (4, 1))))
    assert list(runs(packed, (2, 8), 2)) == [(0, 0, 2), (8, 2, 2), (16, 4, 2), (24, 6, 2)]
    assert list(packed.boxes()) == [((0, 0), (2, 1)), ((0, 4), (2, 1))]


def test_large_offsets_do_not_wrap() -> None:
    last = Region((((2**31, 1),), ((0, 2**20),)))
    assert list(runs(last, (2**31 + 1, 2**20), 8)) == [(2**54, 0, 2**23)]


def test_a_clip_cuts_the_runs_at_its_edges() -> None:
    whole = runs(Region((((0, 3),), ((1, 2),))), (3, 4), 4)
    assert list(whole.clip(4, 18)) == [(8, 4, 4), (20, 8, 8), (36, 16, 2)]
    assert list(whole.clip(0, 24)) == list(whole)
    assert list(whole.clip(5, 5)) == []
