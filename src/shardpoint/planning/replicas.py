"""Which ranks hold the same bytes of which tensors, and which of those bytes a save compares.

Writing needs no answer for tensors that nothing guarantees to be equal; comparing does: every rank that holds the same
region of a tensor is a replica, whatever mesh it sees, or none (plain tensors). The tensors whose replicas are the same
ranks form a group, so that a rank tells one digest for thousands of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np

from shardpoint.checksum import crc64
from shardpoint.geometry import Region
from shardpoint.layout import owned_region, replica_ranks
from shardpoint.planning.facts import Entry, Holding, MergedTable
from shardpoint.planning.ownership import held_region

NUM_WINDOWS = 32
MIN_WINDOW_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """Tensors of which the same ranks hold the same part.

    Attributes:
        key: 64 bits that identify the ranks; equal on all of them.
        ranks: they, ascending; two or more.
        entries: indices into the merged table, ascending.
    """

    key: int
    ranks: tuple[int, ...]
    entries: tuple[int, ...]


def replica_groups(table: MergedTable, rank: int) -> tuple[ReplicaGroup, ...]:
    """Return what a rank holds that other ranks hold too, by who they are.

    Args:
        table: the merged table, the same on every rank.
        rank: which rank.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    known: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
    for index, entry in enumerate(table.entries):
        # Tensors of one shape, held alike, have the same replicas; `merge_tables` gives them one object of holdings.
        kind = (id(entry.holdings), entry.shape)
        if kind not in known:
            known[kind] = holders_alike(entry, rank)
        if len(known[kind]) > 1:
            groups.setdefault(known[kind], []).append(index)
    return tuple(ReplicaGroup(_key(ranks), ranks, tuple(entries)) for ranks, entries in groups.items())


def holders_alike(entry: Entry, rank: int) -> tuple[int, ...]:
    """Return, ascending, who holds the same part of a tensor as a rank, itself too; nobody where it has none."""
    region = held_region(entry, rank)
    if region is None or not region.numel:
        return ()
    own = next(holding for holding in entry.holdings if rank in holding.ranks)
    ranks = {other for holding in entry.holdings for other in _holders(entry, holding, own, rank, region)}
    return tuple(sorted(ranks))


def _holders(entry: Entry, holding: Holding, own: Holding, rank: int, region: Region) -> Iterable[int]:
    """Return the ranks of one way of holding that hold a region, which `rank` holds in its own way."""
    mesh = holding.mesh
    if mesh is None:
        return holding.ranks if region == Region.whole(entry.shape) else ()
    if own.mesh is not None and (mesh.shape, holding.placements) == (own.mesh.shape, own.placements):
        coordinate = own.mesh.coordinate(rank)
        assert coordinate is not None  # noqa: S101 - it holds a region
        return replica_ranks(mesh, holding.placements, coordinate)
    axes = zip(mesh.shape, holding.placements, strict=True)
    for coordinate in product(*(range(size if placement.cuts else 1) for size, placement in axes)):
        if owned_region(entry.shape, mesh.shape, coordinate, holding.placements) == region:
            return replica_ranks(mesh, holding.placements, coordinate)
    return ()


def _key(ranks: tuple[int, ...]) -> int:
    return crc64(np.array(ranks, dtype="<u4").tobytes())


def turn_of(name: str) -> int:
    """Return the number by which a save of a name chooses what it compares: the same on all ranks, whoever began when.

    Not a counter: a rank that had counted one save more would compare other bytes, and all would seem to differ.
    """
    return crc64(name.encode("utf-8", "surrogatepass"))


def compared_window(num_bytes: int, turn: int) -> tuple[int, int]:
    """Return the first of the bytes of a shard that a sampled comparison reads, and the byte after the last.

    A 32nd of the shard, 64 KiB at least. Which one follows from the turn: whatever differs lastingly is found by one of
    the next saves.

    Args:
        num_bytes: the shard's size, 1 at least.
        turn: from `turn_of`.

    Examples:
        >>> compared_window(1000, 7), compared_window(32 * 2**20, 33)
        ((0, 1000), (1048576, 2097152))
    """
    size = max(MIN_WINDOW_BYTES, -(-num_bytes // NUM_WINDOWS))
    start = turn % -(-num_bytes // size) * size
    return start, min(start + size, num_bytes)
