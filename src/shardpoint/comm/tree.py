"""Which rank hands its votes to which? A tree by arithmetic, so that every rank knows all of it without asking."""

from __future__ import annotations

from dataclasses import dataclass

FANOUT = 32


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree in which rank `r` has the children `r * fanout + 1` to `r * fanout + fanout`, as far as there are ranks.

    The coordinator is its root. With `world_size <= fanout + 1` all others are the coordinator's children.

    Attributes:
        world_size: how many ranks there are.
        fanout: the most children that a rank has.

    Examples:
        >>> [list(Tree(6, 2).children(rank)) for rank in range(6)]
        [[1, 2], [3, 4], [5], [], [], []]
    """

    world_size: int
    fanout: int

    def children(self, rank: int) -> range:
        """Return the ranks whose votes a rank takes."""
        first = rank * self.fanout + 1
        return range(min(first, self.world_size), min(first + self.fanout, self.world_size))

    def levels_below(self, rank: int) -> int:
        """Return over how many ranks the farthest vote comes to this rank; 0 where it has no children.

        Examples:
            >>> [Tree(6, 2).levels_below(rank) for rank in range(6)]
            [2, 1, 1, 0, 0, 0]
        """
        levels = 0
        while len(children := self.children(rank)):
            rank, levels = children[0], levels + 1
        return levels
