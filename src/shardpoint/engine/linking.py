"""Which files of the last checkpoint have the very bytes that this one would get, so that they need not be written?

A file that is linked is one more name of the same inode: each checkpoint stays complete, and deleting one harms no
other. One inode is one copy on the device, though: after `MAX_LINKED` checkpoints in a row the file is written afresh.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shardpoint.checksum import combine, crc64, to_hex
from shardpoint.commit import Committed, committed_checkpoints
from shardpoint.events import Event, Listener
from shardpoint.manifest import FileEntry, Manifest
from shardpoint.planning import Layout, MergedTable
from shardpoint.storage import Store

MAX_LINKED = 20
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Linkable:
    """A committed file.

    Attributes:
        key: where it is, relative to the root.
        linked: how many checkpoints in a row will have had it before the one that links it.
    """

    key: str
    linked: int


def last_checkpoint(store: Store) -> Committed | None:
    """Return the checkpoint that was committed last, of those whose manifest can be read."""
    return next((item for item in reversed(committed_checkpoints(store)) if item.manifest is not None), None)


def find_linkable(
    last: Committed | None,
    table: MergedTable,
    layout: Layout,
    files: Collection[int],
    crcs: Mapping[int, int],
    name: str,
    listener: Listener,
) -> dict[int, Linkable]:
    """Return the files of the last committed checkpoint that have the wanted bytes, by the number of the file.

    Args:
        last: the last committed checkpoint.
        table: the merged table.
        layout: where everything lies.
        files: which files are looked for.
        crcs: entry -> checksum of the tensor as it is now, for all tensors of those files.
        name: of the checkpoint that is being saved, for the listener.
        listener: told of files whose tensors are no longer what the last checkpoint has.
    """
    if last is None or last.manifest is None:
        return {}
    found: dict[int, Linkable] = {}
    for number in sorted(files):
        planned = layout.files[number]
        entry = last.manifest.file(planned.path)
        if entry is None:
            continue
        indices = [index for index, placed in enumerate(layout.tensors) if placed.file == number]
        indices.sort(key=lambda index: (layout.tensors[index].byte_offset, layout.tensors[index].num_bytes))
        wanted = crc64(planned.layout.header)
        for index in indices:
            wanted = combine(wanted, crcs[index], layout.tensors[index].num_bytes)
        if entry.size_bytes != planned.layout.num_bytes or entry.crc64nvme != to_hex(wanted):
            # What is still only for now may have been trained until the last save: then it lay with other tensors.
            if not planned.is_still or _holds(last.manifest, planned.path, {table.entries[i].key for i in indices}):
                what = f"{planned.path} has tensors that do not train, and is not what {last.name} has"
                text = f"{what} ({_changed(last.manifest, table, indices, crcs)}): it is written again in {name}"
                listener(Event("frozen_changed", text, name, logging.WARNING))
        elif entry.linked < MAX_LINKED:
            found[number] = Linkable(f"{last.key}/{planned.path}", entry.linked + 1)
    return found


def unchanged_files(last: Committed | None, layout: Layout, files: Sequence[FileEntry]) -> frozenset[str]:
    """Return the files of still tensors that have the same bytes as in the last checkpoint.

    Args:
        last: the checkpoint before this one.
        layout: of this one.
        files: of this one; those of the layout in its order, perhaps others behind them.
    """
    if last is None or last.manifest is None:
        return frozenset()
    before = {entry.path: (entry.size_bytes, entry.crc64nvme) for entry in last.manifest.files}
    return frozenset(
        entry.path
        for planned, entry in zip(layout.files, files, strict=False)
        if planned.is_still and before.get(entry.path) == (entry.size_bytes, entry.crc64nvme)
    )


def _holds(manifest: Manifest, path: str, keys: set[str]) -> bool:
    return {tensor.key for tensor in manifest.tensors if manifest.files[tensor.file].path == path} == keys


def _changed(manifest: Manifest, table: MergedTable, indices: Sequence[int], crcs: Mapping[int, int]) -> str:
    """Say which tensors are not what a checkpoint has."""
    stored = {(tensor.part, tensor.key): tensor.crc64nvme for tensor in manifest.tensors}
    names = [table.entries[index] for index in indices]
    differ = [
        entry.label
        for entry, index in zip(names, indices, strict=True)
        if stored.get((entry.part, entry.key)) != to_hex(crcs[index])
    ]
    if not differ:
        return "its tensors are laid out otherwise"
    more = f" and {len(differ) - _MAX_NAMED} more" if len(differ) > _MAX_NAMED else ""
    return ", ".join(differ[:_MAX_NAMED]) + more
