"""Do chunks hold each owned byte once, where it belongs, in buffers that can be written past the page cache?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.planning import (
    Chunk,
    Layout,
    MergedTable,
    PartNaming,
    Table,
    TensorFact,
    merge_tables,
    owned_items,
    plan_chunks,
    plan_files,
)
from shardpoint.planning.chunks import BLOCK_BYTES
from tests.property.drawn import worlds

NOTHING = -1


def blank(layout: Layout) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return a number for each byte of each file: which byte of which shard stands there."""
    return [np.full((file.layout.num_bytes, 3), NOTHING, dtype=np.int64) for file in layout.files]


def check(table: MergedTable, layout: Layout, rank: int, buffer_bytes: int) -> list[Chunk]:
    """Compare chunks with the runs that they were made of, byte by byte."""
    items = owned_items(table, rank)
    chunks = plan_chunks(table, layout, items, buffer_bytes)
    expected, found = blank(layout), blank(layout)
    for item in items:
        placed = layout.tensors[item.entry]
        for byte_offset, local_offset, num_bytes in item.runs(table):
            start = placed.byte_offset + byte_offset
            count = np.arange(num_bytes)
            expected[placed.file][start : start + num_bytes] = np.stack(
                [np.full(num_bytes, item.entry), byte_offset + count, local_offset + count], axis=1
            )
    for chunk in chunks:
        memory = np.full((buffer_bytes, 3), NOTHING, dtype=np.int64)
        for piece in chunk.pieces:
            count = np.arange(piece.num_bytes)
            room = memory[piece.buffer_offset : piece.buffer_offset + piece.num_bytes]
            assert len(room) == piece.num_bytes > 0
            assert (room == NOTHING).all()
            room[:] = np.stack(
                [np.full(len(count), piece.entry), piece.byte_offset + count, piece.local_byte_offset + count], axis=1
            )
        for extent in chunk.extents:
            assert extent.num_bytes > 0
            assert extent.byte_offset % BLOCK_BYTES == extent.buffer_offset % BLOCK_BYTES
            target = found[chunk.file][extent.byte_offset : extent.byte_offset + extent.num_bytes]
            assert (target == NOTHING).all()
            target[:] = memory[extent.buffer_offset : extent.buffer_offset + extent.num_bytes]
        assert sum(piece.num_bytes for piece in chunk.pieces) == chunk.num_bytes
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one, other)
    places = [(chunk.file, extent.byte_offset) for chunk in chunks for extent in chunk.extents]
    assert places == sorted(places)
    return chunks


@given(table=worlds(), blocks=st.integers(1, 5), max_file=st.sampled_from([1, 700, 10**9]))
def test_every_owned_byte_is_staged_once_and_written_to_its_place(
    table: MergedTable, blocks: int, max_file: int
) -> None:
    layout = plan_files(table, {"modeling": PartNaming("model")}, max_file)
    for rank in range(table.world_size):
        check(table, layout, rank, blocks * BLOCK_BYTES)


@given(table=worlds())
def test_between_chunks_files_are_cut_at_blocks(table: MergedTable) -> None:
    layout = plan_files(table, {"modeling": PartNaming("model")}, 10**9)
    for rank in range(table.world_size):
        for before, after in pairwise(check(table, layout, rank, BLOCK_BYTES)):
            end = before.extents[-1].byte_offset + before.extents[-1].num_bytes
            if before.file == after.file and end == after.extents[0].byte_offset:
                assert end % BLOCK_BYTES == 0


def test_neighbours_in_the_file_are_one_write() -> None:
    facts = tuple(TensorFact("modeling", f"t{n}", None, f"t{n}", "F32", (256,)) for n in range(500))
    table = merge_tables([([0], Table((), facts))], 1)
    layout = plan_files(table, {"modeling": PartNaming("model")}, 10**9)
    chunks = plan_chunks(table, layout, owned_items(table, 0), 2**20)
    assert [len(chunk.extents) for chunk in chunks] == [1]
    assert chunks[0].num_bytes == 500 * 1024
