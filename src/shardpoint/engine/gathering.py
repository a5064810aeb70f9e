"""How a save works where writers on different hosts cannot share a file: each file has one writer, and bytes go to it.

Two NFS clients that write into one page overwrite each other's bytes. There, tensor files are assigned to ranks, and
every rank sends what it owns of a file to the file's writer, one bounded chunk at a time. What is on disk in the end,
checksums included, is the same as when every rank writes for itself.

Order: all ranks go through the files in the same order, and a file's writer through the ranks in theirs, so that no two
ranks ever wait for each other. A rank that fails goes on taking its part in the exchange, without data, until all files
are done: nobody is left waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from shardpoint.adapters.collect import Held
from shardpoint.checksum import Partial
from shardpoint.engine.writing import STAGING_BYTES, OpenFiles, stage_items
from shardpoint.errors import DistributedError
from shardpoint.planning import Layout, MergedTable, WriteItem, owned_items
from shardpoint.storage import Store


class ByteExchange(Protocol):
    """How bytes go from one rank to another, each message in the order in which it was sent."""

    def send(self, data: memoryview | None, to_rank: int) -> None:
        """Send a chunk; None says that this rank failed and that no further chunk of this file comes."""
        ...

    def receive(self, room: memoryview, from_rank: int) -> int | None:
        """Receive a chunk into `room` and return its length, or None where the sender failed."""
        ...


def writer_of(file: int, world_size: int) -> int:
    """Return the rank that writes a file."""
    return file % world_size


def write_gathered(
    store: Store,
    key: str,
    table: MergedTable,
    layout: Layout,
    held: Mapping[tuple[str, str], Held],
    rank: int,
    world_size: int,
    exchange: ByteExchange,
    progress: Callable[[int], None],
) -> list[tuple[int, Partial]]:
    """Bring what this rank owns to the files' writers, and write this rank's files.

    Args:
        store: the root.
        key: the attempt.
        table: the merged table.
        layout: where each tensor lies.
        held: the live tensors.
        rank: this rank.
        world_size: the number of ranks.
        exchange: the way between ranks.
        progress: told of each chunk's bytes.

    Returns:
        (entry, its partial checksum) for each tensor of which this rank owns bytes.

    Raises:
        StorageError: a write, an fsync or a close failed on this rank.
        DistributedError: a rank that was to send failed.

    Collective:
        All ranks.

    Durability:
        On return every byte that was written survives power loss, once its file has a durable name.

    Memory:
        Two chunks of 16 MiB.
    """
    own = _by_file(owned_items(table, rank), layout)
    partials: list[tuple[int, Partial]] = []
    failure: Exception | None = None
    others: dict[int, dict[int, list[WriteItem]]] = {}
    with OpenFiles(store, key, layout) as files:
        for file in range(len(layout.files)):
            writer = writer_of(file, world_size)
            if writer != rank:
                failure = _send(table, layout, own.get(file, []), held, progress, exchange, writer, partials, failure)
                continue
            if not others:
                others = {r: _by_file(owned_items(table, r), layout) for r in range(world_size) if r != rank}
            for sender in range(world_size):
                if sender == rank:
                    failure = _stage(table, layout, own.get(file, []), held, progress, files.write, partials, failure)
                else:
                    expected = others[sender].get(file, [])
                    failure = _receive(table, layout, expected, progress, exchange, sender, files, failure)
        if failure is not None:
            raise failure
        files.sync(progress)
    return partials


def _by_file(items: list[WriteItem], layout: Layout) -> dict[int, list[WriteItem]]:
    found: dict[int, list[WriteItem]] = {}
    for item in items:
        found.setdefault(layout.tensors[item.entry].file, []).append(item)
    for listed in found.values():
        listed.sort(key=lambda item: layout.tensors[item.entry].byte_offset)
    return found


def _stage(
    table: MergedTable,
    layout: Layout,
    items: list[WriteItem],
    held: Mapping[tuple[str, str], Held],
    progress: Callable[[int], None],
    put: Callable[[int, memoryview, int], None],
    partials: list[tuple[int, Partial]],
    failure: Exception | None,
) -> Exception | None:
    """Stage items unless something failed before; return the failure, for the end."""
    if failure is not None:
        return failure
    try:
        partials += stage_items(table, layout, items, held, progress, put)
    except Exception as error:  # noqa: BLE001 - raised at the end, when no rank waits for this one any more
        return error
    return None


def _send(
    table: MergedTable,
    layout: Layout,
    items: list[WriteItem],
    held: Mapping[tuple[str, str], Held],
    progress: Callable[[int], None],
    exchange: ByteExchange,
    writer: int,
    partials: list[tuple[int, Partial]],
    failure: Exception | None,
) -> Exception | None:
    if not items:
        return failure
    before = failure

    def put(_: int, chunk: memoryview, __: int) -> None:
        exchange.send(chunk, writer)

    failure = _stage(table, layout, items, held, progress, put, partials, failure)
    if failure is not None and (before is not None or not isinstance(failure, DistributedError)):
        exchange.send(None, writer)
    return failure


def _receive(
    table: MergedTable,
    layout: Layout,
    items: list[WriteItem],
    progress: Callable[[int], None],
    exchange: ByteExchange,
    sender: int,
    files: OpenFiles,
    failure: Exception | None,
) -> Exception | None:
    """Take what a rank owns of a file; after a failure of this rank what comes is taken and dropped."""
    room = np.empty(STAGING_BYTES, dtype=np.uint8).data if items else memoryview(b"")
    for item in items:
        placed = layout.tensors[item.entry]
        for byte_offset, _, num_bytes in item.runs(table):
            for done in range(0, num_bytes, STAGING_BYTES):
                expected = min(STAGING_BYTES, num_bytes - done)
                received = exchange.receive(room, sender)
                if received is None:
                    return failure or DistributedError(f"rank {sender} failed while it sent its part of {placed.file}")
                if received != expected:
                    failure = failure or DistributedError(f"rank {sender} sent {received} bytes, {expected} were due")
                if failure is None:
                    try:
                        files.write(placed.file, room[:received], placed.byte_offset + byte_offset + done)
                    except Exception as error:  # noqa: BLE001 - raised at the end, as in `_stage`
                        failure = error
                progress(received)
    return failure
