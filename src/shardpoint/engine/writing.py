"""How a rank writes the bytes that it owns: staged, checksummed, put in place, fsynced by the descriptors that wrote.

Memory: one staging buffer of 16 MiB, reused for every chunk. The checksum is taken over the staged bytes, so a fault
anywhere after staging is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

import numpy as np

from shardpoint.adapters.collect import Held
from shardpoint.checksum import Partial, crc64
from shardpoint.planning import Layout, MergedTable, WriteItem
from shardpoint.storage import Store, SyncPoint, Writer

STAGING_BYTES = 16 * 2**20


def stage_items(
    table: MergedTable,
    layout: Layout,
    items: Iterable[WriteItem],
    held: Mapping[tuple[str, str], Held],
    progress: Callable[[int], None],
    put: Callable[[int, memoryview, int], None],
) -> list[tuple[int, Partial]]:
    """Stage and checksum what this rank owns, chunk by chunk, and hand each chunk on.

    Args:
        table: the merged table.
        layout: where each tensor lies.
        items: what this rank owns; taken in the order of files and offsets.
        held: the live tensors.
        progress: told of each chunk's bytes.
        put: given the file's index, a chunk (valid until it returns) and its offset in the file.

    Returns:
        (entry, its partial checksum) for each item.
    """
    staging = np.empty(STAGING_BYTES, dtype=np.uint8)
    partials: list[tuple[int, Partial]] = []
    for item in sorted(items, key=lambda item: _place(layout, item)):
        entry, placed = table.entries[item.entry], layout.tensors[item.entry]
        partial = Partial()
        source = held[entry.part, entry.key].open()
        view = source.read_view()
        for byte_offset, local_offset, num_bytes in item.runs(table):
            crc = 0
            for done in range(0, num_bytes, STAGING_BYTES):
                chunk_bytes = min(STAGING_BYTES, num_bytes - done)
                staged = staging[:chunk_bytes]
                np.copyto(staged, view[local_offset + done : local_offset + done + chunk_bytes])
                crc = crc64(staged.data, crc)
                put(placed.file, staged.data, placed.byte_offset + byte_offset + done)
                progress(chunk_bytes)
            partial.add(crc, byte_offset, num_bytes, entry.num_bytes)
        source.release()
        partials.append((item.entry, partial))
    return partials


def _place(layout: Layout, item: WriteItem) -> tuple[int, int]:
    placed = layout.tensors[item.entry]
    return placed.file, placed.byte_offset


def write_items(
    store: Store,
    key: str,
    table: MergedTable,
    layout: Layout,
    items: list[WriteItem],
    held: Mapping[tuple[str, str], Held],
    progress: Callable[[int], None],
) -> list[tuple[int, Partial]]:
    """Write what this rank owns at its final place, and make it durable.

    Args:
        store: the root.
        key: the attempt.
        table: the merged table.
        layout: where each tensor lies.
        items: what this rank owns.
        held: the live tensors.
        progress: told of each chunk's bytes.

    Returns:
        (entry, its partial checksum) for each item.

    Raises:
        StorageError: a write, an fsync or a close failed; nothing was voted.

    Durability:
        On return every byte that was written survives power loss, once its file has a durable name.
    """
    with OpenFiles(store, key, layout) as files:
        partials = stage_items(table, layout, items, held, progress, files.write)
        files.sync(progress)
    return partials


class OpenFiles:
    """The files of an attempt that this rank writes, each opened once.

    Leaving the `with` block closes them; an error on closing is an error, unless another one is on its way up already.
    """

    def __init__(self, store: Store, key: str, layout: Layout) -> None:
        self._store = store
        self._key = key
        self._layout = layout
        self._writers: dict[int, Writer] = {}

    def write(self, file: int, data: memoryview, byte_offset: int) -> None:
        """Write a chunk of a file."""
        if file not in self._writers:
            self._writers[file] = self._store.open_writer(f"{self._key}/{self._layout.files[file].path}")
        self._writers[file].write_at(data, byte_offset)

    def sync(self, progress: Callable[[int], None]) -> None:
        """Make durable, by the descriptors that wrote, everything that was written."""
        for writer in self._writers.values():
            writer.sync(SyncPoint.TENSOR_FILE)
            progress(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed: Exception | None = None
        for writer in self._writers.values():
            try:
                writer.close()
            except Exception as second:  # noqa: BLE001 - every file is closed before the first error goes up
                failed = failed or second
        if failed is None:
            return
        if error is None:
            raise failed
        error.add_note(f"closing a file after that failed too: {failed}")
