from __future__ import annotations

import msgspec
import pytest

from shardpoint.errors import UsageError
from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement, owned_region, replica_ranks

R = Placement("replicate")


def shard(dim: int) -> Placement:
    return Placement("shard", dim)


def strided(dim: int, factor: int) -> Placement:
    return Placement("strided_shard", dim, factor)


def rows(shape: tuple[int, ...], mesh: tuple[int, ...], at: tuple[int, ...], *how: Placement) -> list[int]:
    return [i for start, n in owned_region(shape, mesh, at, how).spans[0] for i in range(start, start + n)]


def test_a_mesh_has_each_rank_once() -> None:
    for shape, ranks in (((2,), (0,)), ((2,), (0, 0)), ((2, 2), (0, 1, 2))):
        with pytest.raises(UsageError, match="distinct ranks"):
            Mesh(shape, ranks)


def test_coordinates_are_row_major() -> None:
    mesh = Mesh((2, 3), (5, 4, 3, 2, 1, 0))
    assert [mesh.coordinate(rank) for rank in (5, 3, 2, 0)] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert mesh.coordinate(6) is None
    assert mesh.rank_at((1, 1)) == 1


def test_a_shard_is_cut_as_torch_chunk_cuts() -> None:
    # 10 rows over 4 ranks: 3, 3, 3, 1; 2 rows over 4: the last two hold nothing.
    assert [rows((10,), (4,), (i,), shard(0)) for i in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [rows((2,), (4,), (i,), shard(0)) for i in range(4)] == [[0], [1], [], []]
    assert [rows((5,), (4,), (i,), shard(0)) for i in range(4)] == [[0, 1], [2, 3], [4], []]


def test_fsdp_over_tensor_parallel_cuts_the_tensor_parallel_part() -> None:
    # Mesh (dp=2, tp=2): tensor parallel cut first (rows 0-3 and 4-7), FSDP halves each rank's part.
    how = (strided(0, 2), shard(0))
    assert rows((8,), (2, 2), (0, 0), *how) == [0, 1]
    assert rows((8,), (2, 2), (0, 1), *how) == [4, 5]
    assert rows((8,), (2, 2), (1, 0), *how) == [2, 3]
    assert rows((8,), (2, 2), (1, 1), *how) == [6, 7]


def test_fsdp_over_tensor_parallel_with_uneven_rows() -> None:
    # 7 rows, dp=3, tp=2: torch's own offsets are wrong here. tp cuts 4 and 3; dp cuts those by 2 and by 1.
    how = (strided(0, 2), shard(0))
    assert [rows((7,), (3, 2), (dp, 0), *how) for dp in range(3)] == [[0, 1], [2, 3], []]
    assert [rows((7,), (3, 2), (dp, 1), *how) for dp in range(3)] == [[4], [5], [6]]


def test_fsdp_over_expert_over_tensor_parallel_is_applied_from_the_right() -> None:
    # Mesh (fsdp=2, ep=2, tp=2) on one dim: (strided by 4, shard, shard), as torch gives it.
    how = (strided(0, 4), shard(0), shard(0))
    assert rows((8,), (2, 2, 2), (0, 0, 0), *how) == [0]
    assert rows((8,), (2, 2, 2), (1, 0, 0), *how) == [1]
    assert rows((8,), (2, 2, 2), (0, 0, 1), *how) == [2]
    assert rows((8,), (2, 2, 2), (0, 1, 0), *how) == [4]


def test_two_axes_that_were_cut_last_are_applied_from_right_to_left() -> None:
    how = (strided(0, 4), strided(0, 2), shard(0))
    assert rows((8,), (2, 2, 2), (1, 0, 0), *how) == [1]
    assert rows((8,), (2, 2, 2), (0, 1, 0), *how) == [2]
    assert rows((8,), (2, 2, 2), (0, 0, 1), *how) == [4]


def test_packed_weights_give_a_chunk_of_every_piece() -> None:
    # gate and up stacked (rows 0-3 and 4-7), tensor parallel over 2: half of each.
    assert rows((8,), (2,), (0,), strided(0, 2)) == [0, 1, 4, 5]
    assert rows((8,), (2,), (1,), strided(0, 2)) == [2, 3, 6, 7]
    assert rows((6,), (2,), (0,), strided(0, 2)) == [0, 1, 3, 4]


def test_a_strided_shard_over_axes_of_another_dim_is_literal() -> None:
    # The axis to the right cuts dim 1, so nothing was cut before: factor 2 means two pieces.
    assert owned_region((8, 4), (2, 2), (0, 0), (strided(0, 2), shard(1))) == Region((((0, 2), (4, 2)), ((0, 2),)))


def test_two_shards_of_one_dim_cut_from_left_to_right() -> None:
    assert [rows((8,), (2, 2), (i, j), shard(0), shard(0)) for i in (0, 1) for j in (0, 1)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


def test_replicate_holds_everything() -> None:
    assert owned_region((3, 4), (2,), (1,), (R,)) == Region.whole((3, 4))
    assert owned_region((), (2,), (1,), (R,)) == Region.whole(())


@pytest.mark.parametrize("how", [shard(1), shard(-1), strided(2, 2)])
def test_a_placement_of_a_dim_that_is_not_there(how: Placement) -> None:
    with pytest.raises(UsageError, match="cuts dim"):
        owned_region((8,), (2,), (0,), (how,))


def test_replicas_differ_on_replicate_axes_only() -> None:
    mesh = Mesh((2, 2), (3, 1, 2, 0))
    assert replica_ranks(mesh, (R, shard(0)), (0, 1)) == (0, 1)
    assert replica_ranks(mesh, (shard(0), R), (0, 1)) == (1, 3)
    assert replica_ranks(mesh, (R, R), (0, 0)) == (0, 1, 2, 3)
    assert replica_ranks(mesh, (shard(0), strided(0, 2)), (1, 0)) == (2,)


def test_a_mesh_that_was_looked_up_is_still_the_same_value() -> None:
    used, fresh = Mesh((2, 2), (3, 0, 2, 1)), Mesh((2, 2), (3, 0, 2, 1))
    assert [used.coordinate(rank) for rank in range(5)] == [(0, 1), (1, 1), (1, 0), (0, 0), None]
    assert {used: "found"}[fresh] == "found"
    assert used == fresh
    assert msgspec.msgpack.encode(used) == msgspec.msgpack.encode({"shape": (2, 2), "ranks": (3, 0, 2, 1)})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(used), type=Mesh) == fresh
