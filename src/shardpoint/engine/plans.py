"""What was planned already: a job saves the same structure again and again, and need not plan it again.

A plan is a pure function of the merged table, the naming of the parts, the largest file, the rank and the size of a
staging buffer. All of them are in the key (the table as its digest, which covers names, shapes, dtypes, placements,
meshes and the world), so that nothing that could change a plan is left out: a cache that went by names alone would
write a tensor of a new shape at the offsets of the old one.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shardpoint.planning import (
    Chunk,
    Layout,
    MergedTable,
    PartNaming,
    ReplicaGroup,
    RunTable,
    WriteItem,
    gathered_entries,
    owned_items,
    plan_chunks,
    plan_files,
    replica_groups,
    split_items,
    tabulate_runs,
    whole_items,
)

MAX_PLANS = 8
BUFFER_BYTES = 16 * 2**20

Made = TypeVar("Made")


@dataclass(frozen=True)
class SavePlan:
    """One rank's part of a save.

    Attributes:
        layout: all files.
        items: what this rank owns.
        chunks: what this rank stages and writes, in order.
        small_chunks: on the coordinator, the gathered tensors, which it stages and writes once it has them.
        frozen_chunks: what this rank owns of files that are not expected to change; written where one cannot be linked.
        frozen_files: those files, by index.
        gathered: the small tensors whose parts go to the coordinator, by index.
        sent_runs: this rank's runs of them, as they travel.
        sent_local: (entry, offset in the shard, length) of each of these runs.
        replicas: what other ranks hold too, by who they are.
    """

    layout: Layout
    items: tuple[WriteItem, ...]
    chunks: list[Chunk]
    small_chunks: list[Chunk]
    frozen_chunks: list[Chunk]
    frozen_files: frozenset[int]
    gathered: tuple[int, ...]
    sent_runs: RunTable
    sent_local: list[tuple[int, int, int]]
    replicas: tuple[ReplicaGroup, ...]

    def all_chunks(self, linked: Container[int] = ()) -> list[Chunk]:
        """Return what this rank writes, in the order of files; of one file the small tensors come last.

        Args:
            linked: files that nobody writes.
        """
        frozen = self.unlinked_chunks(linked)
        return list(heapq.merge(self.chunks, self.small_chunks, frozen, key=lambda chunk: chunk.file))

    def unlinked_chunks(self, linked: Container[int]) -> list[Chunk]:
        """Return what this rank writes of frozen files."""
        return [chunk for chunk in self.frozen_chunks if chunk.file not in linked]


def make_plan(
    table: MergedTable, layout: Layout, rank: int, buffer_bytes: int, frozen: frozenset[int] = frozenset()
) -> SavePlan:
    """Plan one rank's part; `frozen` are the files of which nothing is expected to change, by index."""
    items = tuple(owned_items(table, rank))
    gathered = tuple(index for index in gathered_entries(table) if layout.tensors[index].file not in frozen)
    written, sent = split_items(items, gathered)
    still = [item for item in written if layout.tensors[item.entry].file in frozen]
    moving = [item for item in written if layout.tensors[item.entry].file not in frozen]
    small = whole_items(table, gathered) if rank == 0 else []
    runs, local = tabulate_runs(table, sent)
    return SavePlan(
        layout,
        items,
        plan_chunks(table, layout, moving, buffer_bytes),
        plan_chunks(table, layout, small, buffer_bytes),
        plan_chunks(table, layout, still, buffer_bytes),
        frozen,
        gathered,
        runs,
        local,
        replica_groups(table, rank),
    )


class PlanCache:
    """Layouts and plans of the last structures. Threads may share one.

    Args:
        max_plans: how many layouts are kept, and how many ranks' plans: those that were used last.
    """

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._layouts: OrderedDict[Any, Layout] = OrderedDict()
        self._plans: OrderedDict[Any, SavePlan] = OrderedDict()
        self._lock = threading.Lock()

    def layout(self, merged: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int) -> Layout:
        """Return what `plan_files` returns (and raises)."""
        key = (merged.digest, _naming_key(naming), max_file_bytes)
        return self._recall(self._layouts, key, lambda: plan_files(merged, naming, max_file_bytes))

    def plan(
        self,
        merged: MergedTable,
        naming: Mapping[str, PartNaming],
        max_file_bytes: int,
        rank: int,
        buffer_bytes: int = BUFFER_BYTES,
        frozen: frozenset[int] = frozenset(),
    ) -> SavePlan:
        """Return what a rank does in a save of a structure.

        Args:
            merged: the merged table.
            naming: part -> how its files are called.
            max_file_bytes: the largest file.
            rank: whose plan.
            buffer_bytes: the size of a staging buffer, a multiple of 4096.
            frozen: the files of which nothing is expected to change, by index.

        Raises:
            UsageError: as `plan_files` says.
        """
        layout = self.layout(merged, naming, max_file_bytes)
        key = (merged.digest, _naming_key(naming), max_file_bytes, rank, buffer_bytes, frozen)
        return self._recall(self._plans, key, lambda: make_plan(merged, layout, rank, buffer_bytes, frozen))

    def _recall(self, known: OrderedDict[Any, Made], key: Any, make: Callable[[], Made]) -> Made:
        with self._lock:
            if key in known:
                known.move_to_end(key)
                return known[key]
        made = make()
        with self._lock:
            known[key] = made
            while len(known) > self._max_plans:
                known.popitem(last=False)
        return made


def _naming_key(naming: Mapping[str, PartNaming]) -> tuple[Any, ...]:
    # Order: of the parts no matter; of a header's texts it is that of the header, and so of the bytes on disk.
    return tuple(
        (part, names.stem, names.single, names.variant, tuple((names.metadata or {}).items()))
        for part, names in sorted(naming.items())
    )
