"""How a rank fills its tensors: the bytes that it needs, read straight into their memory, checksummed as they are.

A rank reads everything that it holds, but counts towards a tensor's checksum only the bytes that are its share (the
same share that it would write), so that over all ranks each byte is counted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from shardpoint.adapters.collect import Held
from shardpoint.checksum import Partial, crc64
from shardpoint.engine.source import Source
from shardpoint.errors import NotFoundError, TruncatedError
from shardpoint.manifest import FileEntry
from shardpoint.planning import Match, MergedTable, held_runs, owned_items
from shardpoint.storage import Reader

CHUNK_BYTES = 64 * 2**20


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
        _check_size(source, entry, size_bytes)


def _check_size(source: Source, entry: FileEntry, size_bytes: int) -> None:
    if size_bytes != entry.size_bytes:
        text = f"{entry.path} of {source.manifest.name} has {size_bytes} bytes, {entry.size_bytes} were committed"
        raise TruncatedError(text, key=entry.path, expected=str(entry.size_bytes), actual=str(size_bytes))


def read_tensors(
    source: Source,
    target: MergedTable,
    match: Match,
    held: Mapping[tuple[str, str], Held],
    rank: int,
    progress: Callable[[int], None],
) -> tuple[list[tuple[int, Partial]], int]:
    """Fill this rank's tensors.

    Args:
        source: the checkpoint.
        target: the target's merged table.
        match: which stored tensor fills which entry.
        held: the live tensors, by (part, key).
        rank: this rank.
        progress: told of each chunk's bytes.

    Returns:
        (entry, partial checksum of this rank's share) for each tensor, and the bytes read.

    Raises:
        TruncatedError: a file is missing or short.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        StorageError: a read failed.
    """
    items = {item.entry: item for item in owned_items(target, rank)}
    order = sorted(
        (index for index, entry in enumerate(target.entries) if (entry.part, entry.key) in held),
        key=lambda index: _place(source, match, index),
    )
    readers: dict[int, Reader] = {}
    partials: list[tuple[int, Partial]] = []
    total_bytes = 0
    try:
        for index in order:
            stored_index = match.stored[index]
            if stored_index is None:
                continue
            stored = source.manifest.tensors[stored_index]
            reader = _reader(source, readers, stored.file)
            entry = target.entries[index]
            item = held[entry.part, entry.key]
            destination = item.open()
            view = destination.write_view()
            for byte_offset, local_offset, num_bytes in held_runs(entry, item.region):
                for done in range(0, num_bytes, CHUNK_BYTES):
                    chunk = min(CHUNK_BYTES, num_bytes - done)
                    start = local_offset + done
                    reader.read_into(view[start : start + chunk], stored.byte_offset + byte_offset + done)
                    progress(chunk)
                total_bytes += num_bytes
            if index in items:
                partial = Partial()
                for byte_offset, local_offset, num_bytes in items[index].runs(target):
                    crc = crc64(view[local_offset : local_offset + num_bytes])
                    partial.add(crc, byte_offset, num_bytes, entry.num_bytes)
                partials.append((index, partial))
            destination.finish()
    finally:
        for reader in readers.values():
            reader.close()
    return partials, total_bytes


def _place(source: Source, match: Match, index: int) -> tuple[int, int]:
    stored_index = match.stored[index]
    if stored_index is None:
        return (-1, 0)
    stored = source.manifest.tensors[stored_index]
    return (stored.file, stored.byte_offset)


def _reader(source: Source, readers: dict[int, Reader], file: int) -> Reader:
    if file in readers:
        return readers[file]
    entry = source.manifest.files[file]
    try:
        reader = source.store.open_reader(source.path(entry.path))
    except NotFoundError as error:
        raise source.gone(entry.path, error) from error
    readers[file] = reader
    _check_size(source, entry, reader.size_bytes)
    return reader
