"""In which pieces a rank stages and writes what it owns: buffers' worth of bytes, laid out as they lie in the file.

A rank's runs in one file are joined into maximal extents (across tensors and states), and extents are packed into
chunks that fill one staging buffer each. In the buffer, a byte stands where its offset in the file modulo 4096 says, so
that whole blocks can go past the page cache straight from the buffer. Extents are cut between chunks at multiples of
4096 of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shardpoint.planning.facts import MergedTable
from shardpoint.planning.files import Layout
from shardpoint.planning.ownership import WriteItem

BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one tensor in a chunk.

    Attributes:
        entry: index of the tensor in the merged table.
        byte_offset: where they start in the whole tensor.
        local_byte_offset: where they start in this rank's shard.
        buffer_offset: where they start in the buffer, in bytes.
        num_bytes: how many they are.
    """

    entry: int
    byte_offset: int
    local_byte_offset: int
    buffer_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes that one write puts into the file.

    Attributes:
        byte_offset: where they start in the file.
        buffer_offset: where they start in the buffer, in bytes; congruent to `byte_offset` modulo 4096.
        num_bytes: how many they are.
    """

    byte_offset: int
    buffer_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one staging buffer holds.

    Attributes:
        file: index of the file in the layout.
        pieces: what is copied into the buffer, in the order of the file.
        extents: what is written from it, in the order of the file.
    """

    file: int
    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes that are staged."""
        return sum(extent.num_bytes for extent in self.extents)


def plan_chunks(table: MergedTable, layout: Layout, items: Iterable[WriteItem], buffer_bytes: int) -> list[Chunk]:
    """Cut what a rank writes into chunks, in the order of files and offsets.

    Args:
        table: the merged table.
        layout: where each tensor lies.
        items: what the rank writes; no byte twice.
        buffer_bytes: the size of a staging buffer, a multiple of 4096.
    """
    by_file: dict[int, list[WriteItem]] = {}
    for item in items:
        by_file.setdefault(layout.tensors[item.entry].file, []).append(item)
    return [
        chunk for file in sorted(by_file) for chunk in _chunks_of_file(table, layout, file, by_file[file], buffer_bytes)
    ]


def _chunks_of_file(
    table: MergedTable, layout: Layout, file: int, items: list[WriteItem], buffer_bytes: int
) -> list[Chunk]:
    builder = _Builder(file, buffer_bytes)
    for item in sorted(items, key=lambda item: layout.tensors[item.entry].byte_offset):
        placed = layout.tensors[item.entry]
        runs = item.runs(table)
        order = np.argsort(runs.byte_offsets, kind="stable")
        for byte_offset, local_offset, num_bytes in zip(
            runs.byte_offsets[order].tolist(),
            runs.local_byte_offsets[order].tolist(),
            runs.num_bytes[order].tolist(),
            strict=True,
        ):
            builder.add(item.entry, placed.byte_offset, byte_offset, local_offset, num_bytes)
    return builder.finish()


class _Builder:
    """Packs the runs of one file, given in ascending order, into chunks."""

    def __init__(self, file: int, buffer_bytes: int) -> None:
        self._file = file
        self._buffer_bytes = buffer_bytes
        self._chunks: list[Chunk] = []
        self._pieces: list[Piece] = []
        self._extents: list[list[int]] = []
        self._cursor = 0  # the first free byte of the buffer

    def add(self, entry: int, tensor_offset: int, byte_offset: int, local_offset: int, num_bytes: int) -> None:
        """Add a run of a tensor that starts at `tensor_offset` of the file."""
        while num_bytes:
            place = tensor_offset + byte_offset
            taken = min(num_bytes, self._room(place))
            if not taken:
                self._close()
                continue
            self._pieces.append(Piece(entry, byte_offset, local_offset, self._cursor, taken))
            self._extents[-1][2] += taken
            self._cursor += taken
            byte_offset += taken
            local_offset += taken
            num_bytes -= taken

    def _room(self, place: int) -> int:
        """Return how many bytes from `place` of the file on this buffer still takes, after opening an extent there."""
        last = self._extents[-1] if self._extents else None
        if last is None or last[0] + last[2] != place:
            start = -(-self._cursor // BLOCK_BYTES) * BLOCK_BYTES + place % BLOCK_BYTES
            if start >= self._buffer_bytes:
                return 0
            self._cursor = start
            self._extents.append([place, start, 0])
        # The buffer's size is a multiple of the block, and so is what is left of the file's block at its end.
        return self._buffer_bytes - self._cursor

    def _close(self) -> None:
        if self._pieces:
            extents = tuple(Extent(*extent) for extent in self._extents if extent[2])
            self._chunks.append(Chunk(self._file, tuple(self._pieces), extents))
        self._pieces, self._extents, self._cursor = [], [], 0

    def finish(self) -> list[Chunk]:
        """Return the chunks."""
        self._close()
        return self._chunks
