"""Whatever the meshes and placements, what a rank reads is its part of the tensor by numpy, each byte once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.checksum import Partial, crc64
from shardpoint.dtypes import itemsize_bytes, stored_form
from shardpoint.planning import (
    MergedTable,
    PartNaming,
    Wanted,
    is_held_alone,
    owned_items,
    plan_files,
    plan_reads,
    wanted_runs,
)
from shardpoint.planning.ownership import held_region
from tests.property.drawn import elements, worlds


@given(worlds(), st.sampled_from([4096, 8192, 4 * 2**20]))
def test_a_rank_reads_its_part_of_every_tensor(table: MergedTable, piece_bytes: int) -> None:
    layout = plan_files(table, {"modeling": PartNaming("model")}, 30_000)
    random = np.random.default_rng(1)
    contents = [random.integers(0, 256, file.layout.num_bytes, dtype=np.uint8) for file in layout.files]
    totals = [Partial() for _ in table.entries]
    for rank in range(table.world_size):
        shares = {item.entry: (item.local_start, item.local_stop) for item in owned_items(table, rank)}
        regions = [held_region(entry, rank) for entry in table.entries]
        held = [index for index, region in enumerate(regions) if region is not None]
        wanted = [
            Wanted(layout.tensors[index].file, layout.tensors[index].byte_offset, runs, shares.get(index, (0, 0)))
            for index in held
            if (region := regions[index]) is not None
            for runs in [wanted_runs(table.entries[index], region)]
        ]
        plan = plan_reads(wanted, piece_bytes=piece_bytes)
        expected, memory, times = [], [], []
        for index in held:
            entry, place, region = table.entries[index], layout.tensors[index], regions[index]
            assert region is not None
            whole = contents[place.file][place.byte_offset : place.byte_offset + place.num_bytes]
            dtype, shape = stored_form(entry.dtype, entry.shape)
            element_bytes = itemsize_bytes(dtype) * (2 if len(shape) > len(entry.shape) else 1)
            rows = whole.reshape(-1, element_bytes)
            expected.append(rows[elements(region, entry.shape).reshape(-1)].tobytes())
            memory.append(np.zeros(len(expected[-1]), dtype=np.uint8))
            times.append(np.zeros(len(expected[-1]), dtype=np.int64))
        seen: set[int] = set()
        for read in plan.reads:
            assert read.num_bytes <= piece_bytes
            seen |= set(range(read.first, read.stop))
            data = contents[read.file][read.byte_offset : read.byte_offset + read.num_bytes]
            assert len(data) == read.num_bytes, "a read reaches beyond its file"
            for segment in range(read.first, read.stop):
                tensor, length = plan.tensors[segment], plan.num_bytes[segment]
                low = plan.file_offsets[segment] - read.byte_offset
                local = slice(plan.local_offsets[segment], plan.local_offsets[segment] + length)
                memory[tensor][local] = data[low : low + length]
                times[tensor][local] += 1
                if plan.counted[segment]:
                    index = held[tensor]
                    crc = crc64(data[low : low + length].tobytes())
                    totals[index].add(crc, plan.tensor_offsets[segment], length, table.entries[index].num_bytes)
        assert seen == set(range(len(plan.tensors)))
        assert all((count == 1).all() for count in times)
        assert [found.tobytes() for found in memory] == expected
        assert plan.wanted_bytes == sum(map(len, expected))
    for entry, place, total in zip(table.entries, layout.tensors, totals, strict=True):
        whole = contents[place.file][place.byte_offset : place.byte_offset + place.num_bytes]
        assert total.covers(entry.num_bytes), "the ranks together count each byte once"
        assert total.whole_crc(entry.num_bytes) == crc64(whole.tobytes())


@given(worlds())
def test_held_alone_means_that_no_other_rank_holds_a_byte_of_it(table: MergedTable) -> None:
    for entry in table.entries:
        held = [
            set()
            if (region := held_region(entry, rank)) is None
            else set(elements(region, entry.shape).ravel().tolist())
            for rank in range(table.world_size)
        ]
        for rank in range(table.world_size):
            others = set().union(*(held[other] for other in range(table.world_size) if other != rank))
            if is_held_alone(entry, rank):
                assert not held[rank] & others
            elif len(entry.holdings) == 1 and held[rank]:
                assert held[rank] & others
