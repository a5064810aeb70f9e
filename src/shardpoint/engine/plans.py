"""What a rank does in a save, planned once for each structure and used again for as long as nothing changes.

A plan is looked up by everything that it follows from: the digest of the merged table (names, shapes, dtypes,
placements, meshes, world), the files' names and greatest size, the rank, and the size of a staging buffer.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from shardpoint.planning import (
    Chunk,
    Layout,
    MergedTable,
    PartNaming,
    RunTable,
    gathered_entries,
    owned_items,
    plan_chunks,
    plan_files,
    split_items,
    tabulate_runs,
    whole_items,
)

MAX_CACHED = 8

T = TypeVar("T")


@dataclass(frozen=True)
class SavePlan:
    """One rank's part of a save.

    Attributes:
        layout: all files.
        chunks: what this rank stages and writes, in order.
        small_chunks: on the coordinator, the gathered tensors, which it stages and writes once it has them.
        gathered: the small tensors whose parts go to the coordinator, by index.
        sent_runs: this rank's runs of them, as they travel.
        sent_local: (entry, offset in the shard, length) of each of these runs.
    """

    layout: Layout
    chunks: list[Chunk]
    small_chunks: list[Chunk]
    gathered: tuple[int, ...]
    sent_runs: RunTable
    sent_local: list[tuple[int, int, int]]

    def all_chunks(self) -> list[Chunk]:
        """Return what this rank writes, in the order of files; of one file the small tensors come last."""
        return list(heapq.merge(self.chunks, self.small_chunks, key=lambda chunk: chunk.file))


def make_plan(table: MergedTable, layout: Layout, rank: int, buffer_bytes: int) -> SavePlan:
    """Plan one rank's part."""
    gathered = gathered_entries(table)
    written, sent = split_items(owned_items(table, rank), gathered)
    small = whole_items(table, gathered) if rank == 0 else []
    runs, local = tabulate_runs(table, sent)
    return SavePlan(
        layout,
        plan_chunks(table, layout, written, buffer_bytes),
        plan_chunks(table, layout, small, buffer_bytes),
        gathered,
        runs,
        local,
    )


@dataclass
class PlanCache:
    """The last layouts and plans, by all that they follow from."""

    _layouts: OrderedDict[bytes, Layout] = field(default_factory=OrderedDict)
    _plans: OrderedDict[bytes, SavePlan] = field(default_factory=OrderedDict)

    def layout(self, table: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int) -> Layout:
        """Return where everything lies.

        Raises:
            UsageError: as `plan_files`.
        """
        key = _layout_key(table, naming, max_file_bytes)
        return _cached(self._layouts, key, lambda: plan_files(table, naming, max_file_bytes))

    def plan(
        self, table: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int, rank: int, buffer_bytes: int
    ) -> SavePlan:
        """Return one rank's part.

        Raises:
            UsageError: as `plan_files`.
        """
        layout_key = _layout_key(table, naming, max_file_bytes)
        key = _digest((layout_key, rank, buffer_bytes))
        return _cached(
            self._plans,
            key,
            lambda: make_plan(table, self.layout(table, naming, max_file_bytes), rank, buffer_bytes),
        )


def _layout_key(table: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int) -> bytes:
    names = [
        (part, named.stem, named.single, named.variant, sorted((named.metadata or {}).items()))
        for part, named in sorted(naming.items())
    ]
    return _digest((table.digest, names, max_file_bytes))


def _digest(value: Any) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(value)).digest()


def _cached(known: OrderedDict[bytes, T], key: bytes, make: Callable[[], T]) -> T:
    if key not in known:
        known[key] = make()
        while len(known) > MAX_CACHED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]
