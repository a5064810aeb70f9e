"""How a rank fills its tensors: the bytes that it needs, read straight into their memory, checksummed as they are.

A rank reads everything that it holds, but counts towards a tensor's checksum only the bytes that are its share (the
same share that it would write), so that over all ranks each byte is counted exactly once. It begins with that share:
what it reads of its replicas' shares, they have read by then, and the page cache has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from shardpoint.adapters.collect import Held
from shardpoint.adapters.destinations import Destination, Destinations
from shardpoint.checksum import Partial
from shardpoint.engine.filling import Readers, check_size, fill
from shardpoint.engine.source import Source
from shardpoint.errors import NotFoundError
from shardpoint.planning import (
    PIECE_BYTES,
    Match,
    MergedTable,
    Wanted,
    is_held_alone,
    owned_items,
    plan_reads,
    wanted_runs,
)
from shardpoint.storage import BufferPool


@dataclass(frozen=True, slots=True)
class Filled:
    """What a rank read.

    Attributes:
        partials: (entry, partial checksum of this rank's share) of each tensor that it has a share of.
        num_bytes: bytes that went into its tensors.
        read_bytes: bytes that it asked the store for: those, and the gaps between neighbours.
        num_tensors: tensors that it filled (a part of).
    """

    partials: list[tuple[int, Partial]]
    num_bytes: int
    read_bytes: int
    num_tensors: int


def check_files(source: Source, parts: Collection[str]) -> None:
    """Look whether every tensor file that a load may read is there, with its committed size.

    Args:
        source: the checkpoint.
        parts: the parts that are loaded.

    Raises:
        TruncatedError: a file is missing, or has another size.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
    """
    for file in sorted({tensor.file for tensor in source.manifest.tensors if tensor.part in parts}):
        entry = source.manifest.files[file]
        try:
            size_bytes = source.store.size_bytes(source.path(entry.path))
        except NotFoundError as error:
            raise source.gone(entry.path, error) from error
        check_size(source, entry, size_bytes)


@torch.no_grad()
def read_tensors(
    source: Source,
    target: MergedTable,
    match: Match,
    held: Mapping[tuple[str, str], Held],
    rank: int,
    progress: Callable[[int], None],
    *,
    parts: Collection[str] | None = None,
    piece_bytes: int = PIECE_BYTES,
    before_each: Callable[[], None] = lambda: None,
    pool: BufferPool | None = None,
) -> Filled:
    """Fill this rank's tensors.

    Args:
        source: the checkpoint.
        target: the target's merged table.
        match: which stored tensor fills which entry.
        held: the live tensors, by (part, key).
        rank: this rank.
        progress: told of each read's bytes, from any thread.
        parts: fill the tensors of these only; None fills all.
        piece_bytes: the largest read.
        before_each: called before each read, from any thread; what it raises ends the work.
        pool: lends memory for reads past the page cache.

    Raises:
        TruncatedError: a file is missing or short.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        StorageError: a read failed.
    """
    shares = {item.entry: (item.local_start, item.local_stop) for item in owned_items(target, rank)}
    make = Destinations()
    entries: list[int] = []
    wanted: list[Wanted] = []
    destinations: list[Destination] = []
    totals: list[int] = []
    alone: dict[int, bool] = {}
    for index, entry in enumerate(target.entries):
        stored_index, item = match.stored[index], held.get((entry.part, entry.key))
        if stored_index is None or item is None or (parts is not None and entry.part not in parts):
            continue
        stored = source.manifest.tensors[stored_index]
        runs = wanted_runs(entry, item.region)
        # Tensors that are held alike share one object of holdings.
        is_alone = alone.get(id(entry.holdings))
        if is_alone is None:
            is_alone = alone[id(entry.holdings)] = is_held_alone(entry, rank)
        wanted.append(Wanted(stored.file, stored.byte_offset, runs, shares.get(index, (0, 0)), is_alone))
        destinations.append(make.of(item.local, entry.dtype))
        entries.append(index)
        totals.append(stored.num_bytes)
    plan = plan_reads(wanted, piece_bytes=piece_bytes)
    readers = Readers(source, plan.reads)
    try:
        partials = fill(readers, plan, destinations, totals, progress, before_each, pool)
    finally:
        readers.close()
    counted = [(entry, partial) for entry, partial in zip(entries, partials, strict=True) if entry in shares]
    return Filled(counted, plan.wanted_bytes, plan.read_bytes, len(entries))
