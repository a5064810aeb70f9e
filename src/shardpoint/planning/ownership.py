"""Which bytes of which tensor each rank writes, so that every byte has exactly one writer and replicas share the work.

Ranks that hold the same bytes (replicas) form a group. The shards that a group holds are laid end to end, in table
order, and cut into as many equal pieces as the group has members: each member writes one piece. A cut is moved down to
a multiple of 4096 bytes inside its tensor, so small tensors have one writer and large ones are shared. What nothing
guarantees to be equal (a plain tensor, or one that ranks see on different meshes) is written by the lowest rank that
holds it, or by that rank's mesh.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardpoint.dtypes import itemsize_bytes, stored_form
from shardpoint.geometry import Region, Runs, runs
from shardpoint.layout import owned_region, replica_ranks
from shardpoint.planning.facts import Entry, MergedTable

CUT_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class WriteItem:
    """The part of one tensor that a rank owns.

    Attributes:
        entry: index of the tensor in the merged table.
        region: all of the tensor that the rank holds.
        local_start: first byte, in the rank's own shard, that it owns.
        local_stop: the byte after the last.
    """

    entry: int
    region: Region
    local_start: int
    local_stop: int

    def runs(self, table: MergedTable) -> Runs:
        """Return the owned bytes as runs within the whole tensor."""
        return held_runs(table.entries[self.entry], self.region).clip(self.local_start, self.local_stop)


def held_runs(entry: Entry, region: Region) -> Runs:
    """Return all bytes of a region as runs within the whole tensor, in stored form."""
    dtype, shape = stored_form(entry.dtype, entry.shape)
    extra = Region.whole(shape[len(entry.shape) :])
    return runs(Region(region.spans + extra.spans), shape, itemsize_bytes(dtype))


def held_region(entry: Entry, rank: int) -> Region | None:
    """Return the part of a tensor that a rank holds, or None when it holds none of it."""
    for holding in entry.holdings:
        if rank not in holding.ranks:
            continue
        if holding.mesh is None:
            return Region.whole(entry.shape)
        coordinate = holding.mesh.coordinate(rank)
        if coordinate is None:
            return None
        return owned_region(entry.shape, holding.mesh.shape, coordinate, holding.placements)
    return None


def is_held_alone(entry: Entry, rank: int) -> bool:
    """Tell whether no other rank holds any byte of what a rank holds of a tensor."""
    if len(entry.holdings) != 1:
        return False
    (holding,) = entry.holdings
    if holding.mesh is None:
        return holding.ranks == (rank,)
    coordinate = holding.mesh.coordinate(rank)
    return coordinate is not None and replica_ranks(holding.mesh, holding.placements, coordinate) == (rank,)


def _share(entry: Entry, rank: int) -> tuple[Region, tuple[int, ...]] | None:
    """Return the part that a rank's group writes and the group's members, or None when the rank writes none of it.

    Where ranks hold a tensor in different ways (the data-parallel mesh as each tensor-parallel rank sees it), those of
    the lowest rank write it: between two meshes nothing guarantees equal bytes, and a mixture is a state that no rank
    had.
    """
    writing = min(entry.holdings, key=lambda holding: holding.ranks[0])
    if writing.mesh is None:
        return (Region.whole(entry.shape), (rank,)) if rank == writing.ranks[0] else None
    coordinate = writing.mesh.coordinate(rank)
    if coordinate is None:
        return None
    members = replica_ranks(writing.mesh, writing.placements, coordinate)
    return owned_region(entry.shape, writing.mesh.shape, coordinate, writing.placements), members


def owned_items(table: MergedTable, rank: int) -> list[WriteItem]:
    """Return what a rank writes.

    Args:
        table: the merged table, the same on every rank.
        rank: which rank.

    Returns:
        One item for each tensor of which the rank owns at least a byte, in table order.
    """
    groups: dict[tuple[int, ...], list[tuple[int, Region, int]]] = {}
    shares: dict[tuple[int, tuple[int, ...], str], _Share | None] = {}
    for index, entry in enumerate(table.entries):
        # Tensors of one kind, held alike, are shared alike; `merge_tables` gives them one object of holdings.
        kind = (id(entry.holdings), entry.shape, entry.dtype)
        if kind not in shares:
            shares[kind] = _share_in_group(entry, rank, groups)
        share = shares[kind]
        if share is not None:
            group, region, num_bytes = share
            group.append((index, region, num_bytes))
    items: list[WriteItem] = []
    for members, shards in groups.items():
        position = members.index(rank)
        total = sum(num_bytes for _, _, num_bytes in shards)
        low, high = total * position // len(members), total * (position + 1) // len(members)
        start = 0
        for index, region, num_bytes in shards:
            local_start, local_stop = _cut(low - start, num_bytes), _cut(high - start, num_bytes)
            if local_start < local_stop:
                items.append(WriteItem(index, region, local_start, local_stop))
            start += num_bytes
    items.sort(key=lambda item: item.entry)
    return items


_Share = tuple[list[tuple[int, Region, int]], Region, int]


def _share_in_group(
    entry: Entry, rank: int, groups: dict[tuple[int, ...], list[tuple[int, Region, int]]]
) -> _Share | None:
    """Return the group's list, the part that the group writes, and its size; None where the rank writes nothing."""
    share = _share(entry, rank)
    if share is None:
        return None
    region, members = share
    dtype, shape = stored_form(entry.dtype, entry.shape)
    pair_factor = 2 if len(shape) > len(entry.shape) else 1
    num_bytes = region.numel * pair_factor * itemsize_bytes(dtype)
    return (groups.setdefault(members, []), region, num_bytes) if num_bytes else None


def _cut(edge: int, num_bytes: int) -> int:
    if edge <= 0:
        return 0
    if edge >= num_bytes:
        return num_bytes
    return edge - edge % CUT_ALIGNMENT_BYTES
