"""Which tensors are too small to be written by every rank that holds a part, and who sends which bytes of them.

Ten thousand tensors of 1 KB, each cut in half, would be twenty thousand writes of 512 bytes into pages that two ranks
share. Such tensors are gathered instead: every rank sends its parts to the coordinator in one round, and the
coordinator writes the whole tensors, which lie side by side in the file. How much is gathered is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from shardpoint.geometry import Region
from shardpoint.planning.facts import Entry, MergedTable
from shardpoint.planning.ownership import WriteItem

MAX_TENSOR_BYTES = 64 * 2**10
MAX_TOTAL_BYTES = 64 * 2**20

RUN_FIELDS = np.dtype([("entry", "<u4"), ("byte_offset", "<u4"), ("num_bytes", "<u4")])
"""One run of a gathered tensor, as it travels."""

RunTable = npt.NDArray[np.void]


def gathered_entries(table: MergedTable) -> tuple[int, ...]:
    """Return the tensors that are gathered, ascending: small ones that several ranks hold different parts of.

    In table order, for as long as they come to 64 MiB at most.
    """
    chosen: list[int] = []
    total = 0
    for index, entry in enumerate(table.entries):
        num_bytes = entry.num_bytes
        if 0 < num_bytes <= MAX_TENSOR_BYTES and _is_cut(entry):
            total += num_bytes
            if total > MAX_TOTAL_BYTES:
                break
            chosen.append(index)
    return tuple(chosen)


def _is_cut(entry: Entry) -> bool:
    writing = min(entry.holdings, key=lambda holding: holding.ranks[0])
    if writing.mesh is None:
        return False
    return any(p.cuts and size > 1 for p, size in zip(writing.placements, writing.mesh.shape, strict=True))


def split_items(items: Iterable[WriteItem], gathered: Iterable[int]) -> tuple[list[WriteItem], list[WriteItem]]:
    """Part what a rank owns into what it writes and what it sends to the coordinator.

    Args:
        items: what the rank owns.
        gathered: the tensors that are gathered.
    """
    small = frozenset(gathered)
    written: list[WriteItem] = []
    sent: list[WriteItem] = []
    for item in items:
        (sent if item.entry in small else written).append(item)
    return written, sent


def whole_items(table: MergedTable, gathered: Iterable[int]) -> list[WriteItem]:
    """Return what the coordinator writes of gathered tensors: all of them, whole."""
    entries = [(index, table.entries[index]) for index in gathered]
    return [WriteItem(index, Region.whole(entry.shape), 0, entry.num_bytes) for index, entry in entries]


def tabulate_runs(table: MergedTable, items: Iterable[WriteItem]) -> tuple[RunTable, list[tuple[int, int, int]]]:
    """Return the runs of what a rank sends: as they travel, and as (entry, offset in the shard, length)."""
    rows: list[tuple[int, int, int]] = []
    local: list[tuple[int, int, int]] = []
    for item in items:
        for byte_offset, local_offset, num_bytes in item.runs(table):
            rows.append((item.entry, byte_offset, num_bytes))
            local.append((item.entry, local_offset, num_bytes))
    return np.array(rows, dtype=RUN_FIELDS), local
