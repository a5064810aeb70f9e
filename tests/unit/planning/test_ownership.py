from __future__ import annotations

import pytest

from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import MergedTable, Table, TensorFact, merge_tables, owned_items
from shardpoint.planning.ownership import held_region

SHARD, REPLICATE = Placement("shard", 0), Placement("replicate")


def fact(key: str, num_bytes: int, mesh: int | None = None, *placements: Placement) -> TensorFact:
    return TensorFact("modeling", key, None, key, "U8", (num_bytes,), mesh, placements)


def alike(world: int, mesh: Mesh, *facts: TensorFact) -> MergedTable:
    return merge_tables([(list(range(world)), Table((mesh,), facts))], world)


def shares(table: MergedTable, rank: int) -> list[tuple[str, int, int]]:
    return [(table.entries[i.entry].key, i.local_start, i.local_stop) for i in owned_items(table, rank)]


def test_replicas_share_a_large_tensor_at_multiples_of_4096() -> None:
    table = alike(3, Mesh((3,), (0, 1, 2)), fact("w", 30_000, 0, REPLICATE))
    assert [shares(table, rank) for rank in range(3)] == [
        [("w", 0, 8192)],
        [("w", 8192, 16384)],
        [("w", 16384, 30_000)],
    ]


def test_replicas_share_small_tensors_whole() -> None:
    table = alike(2, Mesh((2,), (0, 1)), *(fact(key, 100, 0, REPLICATE) for key in "abcd"))
    assert shares(table, 0) == [("a", 0, 100), ("b", 0, 100)]
    assert shares(table, 1) == [("c", 0, 100), ("d", 0, 100)]


def test_the_work_is_balanced_over_tensors_of_any_size() -> None:
    sizes = {"a": 10_000_000, "b": 50, "c": 3_000_000, "d": 7_000_000, "e": 4096}
    table = alike(4, Mesh((2, 2), (0, 1, 2, 3)), *(fact(k, n, 0, REPLICATE, REPLICATE) for k, n in sizes.items()))
    loads = [sum(stop - start for _, start, stop in shares(table, rank)) for rank in range(4)]
    assert sum(loads) == sum(sizes.values())
    assert max(loads) - min(loads) <= 2 * 4096


def test_shards_are_written_by_those_that_hold_them() -> None:
    table = alike(4, Mesh((2, 2), (0, 1, 2, 3)), fact("w", 40_000, 0, REPLICATE, SHARD))
    assert [shares(table, rank) for rank in range(4)] == [
        [("w", 0, 8192)],
        [("w", 0, 8192)],
        [("w", 8192, 20_000)],
        [("w", 8192, 20_000)],
    ]
    runs = [list(owned_items(table, rank)[0].runs(table)) for rank in range(4)]
    assert runs == [[(0, 0, 8192)], [(20_000, 0, 8192)], [(8192, 8192, 11_808)], [(28_192, 8192, 11_808)]]


def test_a_plain_tensor_is_written_whole_by_the_lowest_rank_that_has_it() -> None:
    # BatchNorm statistics differ between ranks: a mixture is what no rank had.
    table = merge_tables([([0], Table((), ())), ([1, 2], Table((), (fact("stats", 50_000),)))], 3)
    assert [shares(table, rank) for rank in range(3)] == [[], [("stats", 0, 50_000)], []]


def test_meshes_side_by_side_are_written_by_the_one_of_the_lowest_rank() -> None:
    # A norm under TP x FSDP: ranks 0 and 2 see one data-parallel mesh, 1 and 3 another; nothing keeps them equal.
    facts = (fact("norm", 20_000, 0, SHARD),)
    table = merge_tables(
        [([0, 2], Table((Mesh((2,), (0, 2)),), facts)), ([1, 3], Table((Mesh((2,), (1, 3)),), facts))], 4
    )
    assert [shares(table, rank) for rank in range(4)] == [[("norm", 0, 10_000)], [], [("norm", 0, 10_000)], []]
    assert held_region(table.entries[0], 3) == Region((((10_000, 10_000),),))


@pytest.mark.parametrize("plain", [0, 2])
def test_where_some_hold_it_plain_and_others_spread_the_lowest_ranks_way_counts(plain: int) -> None:
    spread = [rank for rank in range(3) if rank != plain]
    ways = [
        ([plain], Table((), (fact("w", 20_000),))),
        (spread, Table((Mesh((2,), tuple(spread)),), (fact("w", 20_000, 0, SHARD),))),
    ]
    table = merge_tables(sorted(ways), 3)
    writers = [rank for rank in range(3) if shares(table, rank)]
    assert writers == ([plain] if plain == 0 else spread)


def test_nothing_is_owned_of_what_is_empty() -> None:
    table = alike(4, Mesh((4,), (0, 1, 2, 3)), fact("w", 2, 0, SHARD), fact("none", 0, 0, REPLICATE))
    assert [shares(table, rank) for rank in range(4)] == [[("w", 0, 1)], [("w", 0, 1)], [], []]
    assert held_region(table.entries[0], 3) == Region(((),))


def test_a_rank_outside_holds_nothing() -> None:
    table = merge_tables([([0], Table((), ())), ([1], Table((Mesh((1,), (1,)),), (fact("w", 9, 0, SHARD),)))], 2)
    assert held_region(table.entries[0], 0) is None
    assert [shares(table, rank) for rank in range(2)] == [[], [("w", 0, 9)]]


def test_a_rank_that_has_a_tensor_of_a_mesh_without_it() -> None:
    # DTensor gives such a rank an empty local part.
    facts = (fact("w", 9, 0, REPLICATE),)
    table = merge_tables([([0, 1], Table((Mesh((1,), (1,)),), facts))], 2)
    assert held_region(table.entries[0], 0) is None
    assert [shares(table, rank) for rank in range(2)] == [[], [("w", 0, 9)]]


def test_complex_numbers_are_counted_by_their_stored_bytes() -> None:
    c128 = TensorFact("modeling", "c", None, "c", "C128", (1024, 2), 0, (Placement("shard", 1),))
    table = alike(2, Mesh((2,), (0, 1)), c128)
    (item,) = owned_items(table, 1)
    assert (item.local_start, item.local_stop) == (0, 16 * 1024)
    assert list(item.runs(table))[:2] == [(16, 0, 16), (48, 16, 16)]
