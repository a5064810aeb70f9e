from __future__ import annotations

from dataclasses import replace

import pytest

from shardpoint.errors import UsageError
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import Table, TensorFact, decode_table, decode_tables, encode_table, merge_tables

W = TensorFact("modeling", "w", None, "w", "F32", (4, 2))
SHARD, REPLICATE = (Placement("shard", 0),), (Placement("replicate"),)


def spread(key: str, placements: tuple[Placement, ...], mesh: int = 0) -> TensorFact:
    return replace(W, fqn=key, key=key, mesh=mesh, placements=placements)


def test_a_table_travels() -> None:
    table = Table((Mesh((2,), (0, 1)),), (W, spread("v", SHARD)), (("optimizer", "w"),))
    assert decode_table(encode_table(table)) == table
    assert encode_table(table) == encode_table(decode_table(encode_table(table)))


def test_what_tables_have_in_common_is_decoded_once() -> None:
    whole = Mesh((4,), (0, 1, 2, 3))
    tables = [Table((whole, Mesh((2,), ranks)), (W, spread("v", SHARD, 1))) for ranks in ((0, 2), (1, 3))]
    one, other = decode_tables([encode_table(table) for table in tables])
    assert [one, other] == tables
    assert one.facts is other.facts
    assert one.meshes[0] is other.meshes[0]
    merged = merge_tables([([0, 2], one), ([1, 3], other)], 4)
    assert merged == merge_tables([([0, 2], tables[0]), ([1, 3], tables[1])], 4)
    assert [holding.mesh for holding in merged.entries[1].holdings] == [Mesh((2,), (0, 2)), Mesh((2,), (1, 3))]


def test_entries_stand_in_the_order_in_which_they_are_first_named() -> None:
    first, second = Table((), (replace(W, key="b", fqn="b"), W)), Table((), (W, replace(W, key="a", fqn="a")))
    merged = merge_tables([([0, 2], first), ([1], second)], 3)
    assert [entry.key for entry in merged.entries] == ["b", "w", "a"]
    assert [[holding.ranks for holding in entry.holdings] for entry in merged.entries] == [
        [(0, 2)],
        [(0, 1, 2)],
        [(1,)],
    ]
    assert merged.total_bytes == 3 * 32


def test_ranks_that_hold_a_tensor_alike_are_one_holding() -> None:
    mesh = Mesh((2,), (0, 1))
    tables = [
        ([0], Table((mesh,), (spread("w", SHARD), replace(W, key="x", fqn="x")))),
        ([1], Table((mesh,), (spread("w", SHARD),))),
    ]
    merged = merge_tables(tables, 2)
    assert [holding.ranks for holding in merged.entries[0].holdings] == [(0, 1)]


@pytest.mark.parametrize(
    "other",
    [replace(W, dtype="BF16"), replace(W, shape=(2, 4)), replace(W, fqn="v"), replace(W, state="s")],
)
def test_ranks_that_describe_one_name_differently(other: TensorFact) -> None:
    with pytest.raises(UsageError, match="do not describe the same tensors") as caught:
        merge_tables([([0, 2], Table((), (W,))), ([1, 3], Table((), (other,)))], 4)
    text = f"modeling/w: rank 0 has F32 [4, 2] of w, rank 1 has {other.dtype} {list(other.shape)} of {other.fqn}"
    assert text in str(caught.value)


def test_a_rank_that_names_a_tensor_twice() -> None:
    with pytest.raises(UsageError, match="rank 3 has two tensors called 'w' in modeling"):
        merge_tables([([3], Table((), (W, W)))], 4)


def test_a_tensor_under_two_keys() -> None:
    # A committed manifest would list one (part, FQN, state) twice, and could not be read.
    with pytest.raises(UsageError, match="w is stored under two names, 'w' and 'x'"):
        merge_tables([([0], Table((), (W,))), ([1], Table((), (replace(W, key="x"),)))], 2)


def test_all_conflicts_are_listed() -> None:
    with pytest.raises(UsageError) as caught:
        merge_tables([([0], Table((), (W, W))), ([1], Table((), (replace(W, dtype="BF16"),)))], 2)
    assert len(str(caught.value).splitlines()) == 3


def test_a_rank_of_the_mesh_that_lacks_the_tensor() -> None:
    # Its part would have no writer.
    mesh = Mesh((3,), (0, 1, 2))
    holds = Table((mesh,), (spread("v", SHARD), spread("w", SHARD)))
    lacks = Table((mesh,), (spread("v", SHARD),))
    with pytest.raises(
        UsageError, match=r"modeling/w: spread over the ranks \[0, 1, 2\], of which \[1\] do not have it"
    ):
        merge_tables([([0, 2], holds), ([1], lacks)], 3)
    with pytest.raises(UsageError, match=r"of which \[2\] do not have it"):
        merge_tables([([0, 1], holds)], 2)  # a mesh of more ranks than there are


def test_ranks_of_one_mesh_that_place_a_tensor_differently() -> None:
    mesh = Mesh((2,), (0, 1))
    tables = [([0], Table((mesh,), (spread("w", SHARD),))), ([1], Table((mesh,), (spread("w", REPLICATE),)))]
    with pytest.raises(UsageError, match="in this way"):
        merge_tables(tables, 2)


def test_meshes_that_overlap_in_part() -> None:
    one, other = Mesh((2,), (0, 1)), Mesh((2,), (1, 2))
    facts = (spread("w", REPLICATE),)
    with pytest.raises(UsageError, match=r"spread over the ranks \[1, 2\], of which \[1\]"):
        merge_tables([([0, 1], Table((one,), facts)), ([2], Table((other,), facts))], 3)


def test_the_digest_is_of_everything() -> None:
    mesh = Mesh((2,), (0, 1))
    base = Table((mesh,), (spread("w", SHARD),), (("optimizer", "w"),))
    others = [
        Table((mesh,), (spread("v", SHARD),), base.members),
        Table((mesh,), (spread("w", REPLICATE),), base.members),
        Table((Mesh((2,), (1, 0)),), base.facts, base.members),
        Table((Mesh((1, 2), (0, 1)),), (spread("w", (*REPLICATE, *SHARD)),), base.members),
        Table((mesh,), (replace(base.facts[0], dtype="I32"),), base.members),
        Table((mesh,), (replace(base.facts[0], shape=(2, 4)),), base.members),
        Table((mesh,), (replace(base.facts[0], part="critic"),), base.members),
        Table((mesh,), (replace(base.facts[0], state=""),), base.members),
        Table((mesh,), base.facts, ()),
    ]
    digests = [merge_tables([([0, 1], table)], 2).digest for table in [base, *others]]
    digests += [merge_tables([([0, 1], base), ([2], Table((), ()))], 3).digest]
    assert len(set(digests)) == len(digests)
    assert merge_tables([([0, 1], base)], 2).digest == digests[0]


def test_a_label_names_part_tensor_and_state() -> None:
    entries = merge_tables([([0], Table((), (W, replace(W, part="optimizer", state="m"))))], 1).entries
    assert [entry.label for entry in entries] == ["modeling: w", "optimizer: w [m]"]
