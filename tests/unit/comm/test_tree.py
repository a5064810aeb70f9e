"""Does every rank have one parent, and is everybody near?"""

from __future__ import annotations

import pytest

from shardpoint.comm.tree import Tree


@pytest.mark.parametrize("fanout", [1, 2, 3, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 33, 34, 100])
def test_every_rank_but_the_coordinator_is_one_ranks_child(world_size: int, fanout: int) -> None:
    tree = Tree(world_size, fanout)
    children = [child for rank in range(world_size) for child in tree.children(rank)]
    assert sorted(children) == list(range(1, world_size))
    assert max(len(tree.children(rank)) for rank in range(world_size)) <= fanout
    assert all(child > rank for rank in range(world_size) for child in tree.children(rank))
    for rank in range(world_size):
        below = [tree.levels_below(child) for child in tree.children(rank)]
        assert tree.levels_below(rank) == (1 + max(below) if below else 0)


def test_small_groups_are_flat_and_large_ones_shallow() -> None:
    assert list(Tree(33, 32).children(0)) == list(range(1, 33))
    assert Tree(33, 32).levels_below(0) == 1
    assert Tree(34, 32).levels_below(0) == 2
    assert Tree(16_384, 32).levels_below(0) == 3
