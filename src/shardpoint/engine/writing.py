"""How a rank writes the bytes that it owns: staged, checksummed, put at their final place, fsynced by the same descriptors.

Memory: one staging buffer of 16 MiB, reused for every chunk. The checksum is taken over the staged bytes, so a fault
anywhere after staging is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from shardpoint.adapters.collect import Held
from shardpoint.checksum import Partial, crc64
from shardpoint.planning import Layout, MergedTable, WriteItem
from shardpoint.storage import Store, SyncPoint, Writer

STAGING_BYTES = 16 * 2**20


def write_items(
    store: Store,
    key: str,
    table: MergedTable,
    layout: Layout,
    items: list[WriteItem],
    held: Mapping[tuple[str, str], Held],
    progress: Callable[[int], None],
) -> list[tuple[int, Partial]]:
    """Write what this rank owns, and make it durable.

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
    writers: dict[int, Writer] = {}
    staging = np.empty(STAGING_BYTES, dtype=np.uint8)
    partials: list[tuple[int, Partial]] = []
    try:
        for item in sorted(
            items, key=lambda item: (layout.tensors[item.entry].file, layout.tensors[item.entry].byte_offset)
        ):
            placed = layout.tensors[item.entry]
            if placed.file not in writers:
                writers[placed.file] = store.open_writer(f"{key}/{layout.files[placed.file].path}")
            partial = _write_item(writers[placed.file], table, item, placed.byte_offset, held, staging, progress)
            partials.append((item.entry, partial))
        for writer in writers.values():
            writer.sync(SyncPoint.TENSOR_FILE)
            progress(1)
    except BaseException as error:
        for writer in writers.values():
            try:
                writer.close()
            except Exception as second:  # noqa: BLE001 - the first error is on its way up; this one goes with it
                error.add_note(f"closing a file after that failed too: {second}")
        raise
    for writer in writers.values():
        writer.close()
    return partials


def _write_item(
    writer: Writer,
    table: MergedTable,
    item: WriteItem,
    tensor_offset: int,
    held: Mapping[tuple[str, str], Held],
    staging: np.ndarray[tuple[int], np.dtype[np.uint8]],
    progress: Callable[[int], None],
) -> Partial:
    entry = table.entries[item.entry]
    partial = Partial()
    source = held[entry.part, entry.key].open()
    view = source.read_view()
    total = entry.num_bytes
    for byte_offset, local_offset, num_bytes in item.runs(table):
        crc = 0
        for done in range(0, num_bytes, STAGING_BYTES):
            chunk_bytes = min(STAGING_BYTES, num_bytes - done)
            staged = staging[:chunk_bytes]
            np.copyto(staged, view[local_offset + done : local_offset + done + chunk_bytes])
            crc = crc64(staged.data, crc)
            writer.write_at(staged.data, tensor_offset + byte_offset + done)
            progress(chunk_bytes)
        partial.add(crc, byte_offset, num_bytes, total)
    source.release()
    return partial
