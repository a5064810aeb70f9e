"""What was planned already: a job saves the same structure again and again, and need not plan it again.

A plan is a pure function of the merged table, the naming of the parts, the largest file and the rank. All of them are
in the key (the table as its digest, which covers names, shapes, dtypes, placements, meshes and the world), so that
nothing that could change a plan is left out: a cache that went by names alone would write a tensor of a new shape at
the offsets of the old one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shardpoint.planning import Layout, MergedTable, PartNaming, WriteItem, owned_items, plan_files

MAX_PLANS = 8

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a save of one structure is, as one rank sees it.

    Attributes:
        layout: the files, the same on every rank.
        items: what the rank writes.
    """

    layout: Layout
    items: tuple[WriteItem, ...]


class PlanCache:
    """Layouts and items of the last structures. Threads may share one.

    Args:
        max_plans: how many layouts are kept, and how many ranks' items: those that were used last.
    """

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._layouts: OrderedDict[Any, Layout] = OrderedDict()
        self._items: OrderedDict[Any, tuple[WriteItem, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, merged: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int, rank: int) -> Plan:
        """Return the plan of a structure.

        Args:
            merged: the merged table.
            naming: part -> how its files are called.
            max_file_bytes: the largest file.
            rank: whose items.

        Raises:
            UsageError: as `plan_files` says.
        """
        return Plan(self.layout(merged, naming, max_file_bytes), self.items(merged, rank))

    def layout(self, merged: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int) -> Layout:
        """Return what `plan_files` returns (and raises)."""
        key = (merged.digest, _naming_key(naming), max_file_bytes)
        return self._recall(self._layouts, key, lambda: plan_files(merged, naming, max_file_bytes))

    def items(self, merged: MergedTable, rank: int) -> tuple[WriteItem, ...]:
        """Return what `owned_items` returns."""
        return self._recall(self._items, (merged.digest, rank), lambda: tuple(owned_items(merged, rank)))

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
