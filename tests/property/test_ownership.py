from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.checksum import Partial, crc64
from shardpoint.dtypes import stored_form, tensor_bytes
from shardpoint.planning import MergedTable, PartNaming, owned_items, plan_files
from shardpoint.planning.ownership import held_region, held_runs
from tests.property.drawn import worlds


@given(worlds())
def test_every_byte_is_written_by_exactly_one_rank_that_holds_it(table: MergedTable) -> None:
    counts = [np.zeros(entry.num_bytes, dtype=int) for entry in table.entries]
    for rank in range(table.world_size):
        items = owned_items(table, rank)
        assert [item.entry for item in items] == sorted({item.entry for item in items})
        for item in items:
            entry = table.entries[item.entry]
            assert item.region == held_region(entry, rank)
            held = held_runs(entry, item.region)
            # Both the place in the tensor and the place in the shard are those of the held runs.
            byte_at = np.concatenate([np.arange(b, b + n) for b, _, n in held])
            for byte_offset, local, n in item.runs(table):
                counts[item.entry][byte_offset : byte_offset + n] += 1
                assert byte_at[local : local + n].tolist() == list(range(byte_offset, byte_offset + n))
    for entry, count in zip(table.entries, counts, strict=True):
        assert (count == 1).all(), entry


@given(worlds())
def test_the_ranks_partials_are_the_whole_checksum(table: MergedTable) -> None:
    random = np.random.default_rng(1)
    contents = [random.integers(0, 256, entry.num_bytes, dtype=np.uint8).tobytes() for entry in table.entries]
    totals = [Partial() for _ in table.entries]
    for rank in range(table.world_size):
        for item in owned_items(table, rank):
            data = contents[item.entry]
            for byte_offset, _, n in item.runs(table):
                totals[item.entry].add(crc64(data[byte_offset : byte_offset + n]), byte_offset, n, len(data))
    for total, data in zip(totals, contents, strict=True):
        assert total.covers(len(data))
        assert total.whole_crc(len(data)) == crc64(data)


@given(worlds(), st.integers(1, 40_000))
def test_files_hold_every_tensor_once_at_an_aligned_place(table: MergedTable, max_file_bytes: int) -> None:
    layout = plan_files(table, {"modeling": PartNaming("model")}, max_file_bytes)
    taken: list[list[tuple[int, int]]] = [[] for _ in layout.files]
    for entry, placed in zip(table.entries, layout.tensors, strict=True):
        dtype, shape = stored_form(entry.dtype, entry.shape)
        assert placed.num_bytes == tensor_bytes(dtype, shape)
        assert placed.byte_offset % tensor_bytes(dtype, ()) == 0
        taken[placed.file].append((placed.byte_offset, placed.num_bytes))
        stored = {tensor.name: tensor for tensor in layout.files[placed.file].layout.tensors}[entry.key]
        assert (stored.dtype, stored.shape, stored.byte_offset) == (dtype, shape, placed.byte_offset)
    for file, ranges in zip(layout.files, taken, strict=True):
        position = len(file.layout.header)
        for start, num_bytes in sorted(ranges):
            assert start == position
            position += num_bytes
        assert position == file.layout.num_bytes
        assert position - len(file.layout.header) <= max_file_bytes or len([n for _, n in ranges if n]) == 1
