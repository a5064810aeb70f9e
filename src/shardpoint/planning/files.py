"""Which files a checkpoint has, and at which offset of which file every tensor lies.

Deterministic: every rank computes the same layout from the same merged table, so nothing but a digest has to travel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec

from shardpoint.container import FileLayout, layout_file
from shardpoint.dtypes import stored_form
from shardpoint.errors import UsageError
from shardpoint.planning.facts import Entry, MergedTable


@dataclass(frozen=True, slots=True)
class PartNaming:
    """How the tensor files of one part are called.

    Attributes:
        stem: `"model"` gives `model-00001-of-00002.safetensors`.
        single: give one file, `<stem>.safetensors`, however large, and no index (what `peft` opens).
        variant: transformers' `variant`: stands between stem and number, and before `.json` of the index.
        metadata: texts for the file's header; only with `single`.
    """

    stem: str
    single: bool = False
    variant: str | None = None
    metadata: Mapping[str, str] | None = None

    def file_name(self, number: int, total: int) -> str:
        """Return the name of file `number` (from 1) of `total`."""
        stem = self.stem if self.variant is None else f"{self.stem}.{self.variant}"
        return f"{stem}.safetensors" if self.single else f"{stem}-{number:05d}-of-{total:05d}.safetensors"

    @property
    def index_name(self) -> str:
        """The name of the index file."""
        suffix = "json" if self.variant is None else f"{self.variant}.json"
        return f"{self.stem}.safetensors.index.{suffix}"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One tensor file, relative to the checkpoint; still where every tensor in it is."""

    path: str
    part: str
    layout: FileLayout
    is_still: bool = False


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Where one entry of the merged table lies."""

    file: int
    byte_offset: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """All tensor files, and where each entry lies (in table order)."""

    files: tuple[PlannedFile, ...]
    tensors: tuple[PlacedTensor, ...]

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ when any file's name or header, or any tensor's place, differs."""
        named = [(file.path, file.part, len(file.layout.header)) for file in self.files]
        hashed = hashlib.sha256(msgspec.msgpack.encode((self.tensors, named)))
        for file in self.files:
            hashed.update(file.layout.header)
        return hashed.digest()


def plan_files(table: MergedTable, naming: Mapping[str, PartNaming], max_file_bytes: int) -> Layout:
    """Lay out every tensor.

    Tensors that are still share no file with others, and come first: a later checkpoint may have the same file. Only
    where a part has a single file do both share it.

    Args:
        table: the merged table.
        naming: part -> how its files are called.
        max_file_bytes: a file that would grow beyond this is closed first; a larger tensor has a file of its own.

    Raises:
        UsageError: `max_file_bytes` is not positive, a part has no naming, or a file cannot be laid out, as
            `layout_file` says.
    """
    if max_file_bytes <= 0:
        text = f"the largest file must have a positive size, got {max_file_bytes} bytes"
        raise UsageError(text)
    files: list[PlannedFile] = []
    placed: dict[int, PlacedTensor] = {}
    for part in sorted(naming, key=_first_seen(table)):
        names = naming[part]
        indices = [index for index, entry in enumerate(table.entries) if entry.part == part]
        shards = _split(indices, table, max_file_bytes, single=names.single)
        for number, shard in enumerate(shards, start=1):
            layout = layout_file(((table.entries[i].key, *_stored(table.entries[i])) for i in shard), names.metadata)
            by_key = {table.entries[i].key: i for i in shard}
            name = names.file_name(number, len(shards))
            path = f"{part}/{name}" if part else name
            for tensor in layout.tensors:
                placed[by_key[tensor.name]] = PlacedTensor(len(files), tensor.byte_offset, tensor.num_bytes)
            is_still = bool(shard) and all(table.entries[i].is_still for i in shard)
            files.append(PlannedFile(path, part, layout, is_still))
    unplaced = [entry.part for index, entry in enumerate(table.entries) if index not in placed]
    if unplaced:
        text = f"tensors belong to parts without a name for their files: {sorted(set(unplaced))}"
        raise UsageError(text)
    return Layout(tuple(files), tuple(placed[index] for index in range(len(table.entries))))


def _first_seen(table: MergedTable) -> Callable[[str], tuple[int, str]]:
    """Order parts as the table names them: ranks may have come upon them in another order."""
    place = {part: index for index, part in enumerate(dict.fromkeys(entry.part for entry in table.entries))}
    return lambda part: (place.get(part, len(place)), part)


def _stored(entry: Entry) -> tuple[str, tuple[int, ...]]:
    return stored_form(entry.dtype, entry.shape)


def _split(indices: list[int], table: MergedTable, max_file_bytes: int, *, single: bool) -> list[list[int]]:
    if single:
        return [indices]
    shards: list[list[int]] = []
    for is_still in (True, False):
        used: int | None = None  # a kind of tensors begins with a new file
        for index in indices:
            entry = table.entries[index]
            if entry.is_still != is_still:
                continue
            if used is None or (used and used + entry.num_bytes > max_file_bytes):
                shards.append([])
                used = 0
            shards[-1].append(index)
            used += entry.num_bytes
    return shards


def index_document(layout: Layout, part: str) -> bytes:
    """Return a part's index as transformers reads it: total size in bytes, and the file of each tensor."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in layout.files:
        if file.part == part:
            name = file.path.rsplit("/", 1)[-1]
            weight_map.update({tensor.name: name for tensor in file.layout.tensors})
            total += sum(tensor.num_bytes for tensor in file.layout.tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
