"""Do files with one writer each come out the same as files that all ranks write; does a failing rank block nobody?"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardpoint.adapters.collect import Held
from shardpoint.checksum import Partial, crc64
from shardpoint.engine.gathering import write_gathered, writer_of
from shardpoint.engine.writing import OpenFiles, PieceSums, stage_chunks, write_staged
from shardpoint.errors import DistributedError, StorageError
from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement, owned_region
from shardpoint.planning import (
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
from shardpoint.storage import BufferPool, LocalStore, Store
from shardpoint.testing import Fault, FaultyStore

WORLD_SIZE = 3
BUFFER_BYTES = 2**20
JOIN_S = 60.0


class QueueExchange:
    """Messages between threads; a message that does not come within JOIN_S fails the test instead of hanging it."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], queue.SimpleQueue[bytes | None]]) -> None:
        self._rank, self._queues = rank, queues

    def send(self, data: memoryview | None, to_rank: int) -> None:
        self._queues[self._rank, to_rank].put(None if data is None else bytes(data))

    def receive(self, room: memoryview, from_rank: int) -> int | None:
        data = self._queues[from_rank, self._rank].get(timeout=JOIN_S)
        if data is None:
            return None
        room[: len(data)] = data
        return len(data)


def sharded(shape: tuple[int, ...], dim: int, rank: int) -> Region:
    return owned_region(shape, (WORLD_SIZE,), (rank,), (Placement("shard", dim),))


def the_table() -> tuple[MergedTable, dict[str, torch.Tensor], Layout]:
    mesh = Mesh((WORLD_SIZE,), tuple(range(WORLD_SIZE)))
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (7, 50), "columns": (6, 31), "everywhere": (5, 1000), "few": (2, 3), "plain": (11,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    placements = {
        "rows": (Placement("shard", 0),),
        "columns": (Placement("shard", 1),),
        "few": (Placement("shard", 0),),
        "everywhere": (Placement("replicate"),),
    }
    facts = tuple(
        TensorFact("m", name, None, name, "F32", shape, 0 if name in placements else None, placements.get(name, ()))
        for name, shape in shapes.items()
    )
    table = merge_tables([(range(WORLD_SIZE), Table((mesh,), facts))], WORLD_SIZE)
    return table, tensors, plan_files(table, {"m": PartNaming("model")}, 1500)


def held_by(rank: int, tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str], Held]:
    held = {}
    for name, tensor in tensors.items():
        dims = {"rows": 0, "columns": 1, "few": 0}
        region = sharded(tuple(tensor.shape), dims[name], rank) if name in dims else Region.whole(tuple(tensor.shape))
        index = tensor
        for dim, spans in enumerate(region.spans):
            positions = [p for start, length in spans for p in range(start, start + length)]
            index = index.index_select(dim, torch.tensor(positions, dtype=torch.int64))
        held["m", name] = Held(index.contiguous(), region)
    return held


def make_files(store: LocalStore, layout: Layout) -> None:
    store.make_root()
    store.make_directory("a")
    store.make_directory("a/m")
    for file in layout.files:
        store.create_file(f"a/{file.path}", file.layout.num_bytes)


def in_threads(work: Callable[[int], object]) -> dict[int, object]:
    outcomes: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(WORLD_SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert sorted(outcomes) == list(range(WORLD_SIZE)), "a rank hangs"
    return outcomes


def gather_into(
    store: Store,
    table: MergedTable,
    layout: Layout,
    held: dict[tuple[str, str], Held],
    rank: int,
    exchange: QueueExchange,
) -> list[tuple[int, Partial]]:
    chunks = [plan_chunks(table, layout, owned_items(table, r), BUFFER_BYTES) for r in range(WORLD_SIZE)]
    sums, pool = PieceSums(), BufferPool(2 * BUFFER_BYTES)
    with OpenFiles(store, "a", layout) as files:
        write_gathered(
            files,
            stage_chunks(table, chunks[rank], held, pool),
            sums,
            BUFFER_BYTES,
            lambda _: None,
            chunks_of=chunks,
            num_files=len(layout.files),
            rank=rank,
            exchange=exchange,
        )
    return sums.partials(table)


def write_directly(
    store: Store, table: MergedTable, layout: Layout, held: dict[tuple[str, str], Held], rank: int
) -> list[tuple[int, Partial]]:
    sums, pool = PieceSums(), BufferPool(2 * BUFFER_BYTES)
    chunks = plan_chunks(table, layout, owned_items(table, rank), BUFFER_BYTES)
    with OpenFiles(store, "a", layout) as files:
        write_staged(files, stage_chunks(table, chunks, held, pool), sums, lambda _: None)
    return sums.partials(table)


def queues() -> dict[tuple[int, int], queue.SimpleQueue[bytes | None]]:
    return {(a, b): queue.SimpleQueue() for a in range(WORLD_SIZE) for b in range(WORLD_SIZE)}


def test_the_files_and_checksums_are_those_of_shared_files(tmp_path: Path) -> None:
    table, tensors, layout = the_table()
    assert len({writer_of(file, WORLD_SIZE) for file in range(len(layout.files))}) == WORLD_SIZE
    apart, together, lines = LocalStore(tmp_path / "apart"), LocalStore(tmp_path / "together"), queues()
    for store in (apart, together):
        make_files(store, layout)

    def gather(rank: int) -> list[tuple[int, Partial]]:
        exchange = QueueExchange(rank, lines)
        held = held_by(rank, tensors)
        return gather_into(apart, table, layout, held, rank, exchange)

    gathered = in_threads(gather)
    for rank in range(WORLD_SIZE):
        direct = write_directly(together, table, layout, held_by(rank, tensors), rank)
        outcome = gathered[rank]
        assert isinstance(outcome, list), outcome
        assert sorted((index, repr(partial)) for index, partial in outcome) == [(i, repr(p)) for i, p in direct]
    for file in layout.files:
        assert apart.read_bytes(f"a/{file.path}") == together.read_bytes(f"a/{file.path}")
    for index, (entry, placed) in enumerate(zip(table.entries, layout.tensors, strict=True)):
        whole = tensors[entry.key].numpy().tobytes()
        data = apart.read_bytes(f"a/{layout.files[placed.file].path}")
        assert data[placed.byte_offset : placed.byte_offset + placed.num_bytes] == whole
        total = Partial()
        for outcome in gathered.values():
            assert isinstance(outcome, list)
            for number, partial in outcome:
                if number == index:
                    total.merge(partial)
        assert total.covers(placed.num_bytes)
        assert total.whole_crc(placed.num_bytes) == crc64(whole)


@pytest.mark.parametrize("failing", range(WORLD_SIZE))
def test_a_rank_that_cannot_write_blocks_nobody(failing: int, tmp_path: Path) -> None:
    table, tensors, layout = the_table()
    store, lines = LocalStore(tmp_path / "root"), queues()
    make_files(store, layout)

    def gather(rank: int) -> object:
        own = FaultyStore(store, [Fault("write", nth=1)] if rank == failing else [])
        exchange = QueueExchange(rank, lines)
        return gather_into(own, table, layout, held_by(rank, tensors), rank, exchange)

    outcomes = in_threads(gather)
    assert isinstance(outcomes[failing], StorageError)


@pytest.mark.parametrize("failing", range(WORLD_SIZE))
def test_a_rank_that_cannot_stage_is_named_by_those_who_wait_for_it(failing: int, tmp_path: Path) -> None:
    table, tensors, layout = the_table()
    store, lines = LocalStore(tmp_path / "root"), queues()
    make_files(store, layout)

    def gather(rank: int) -> object:
        held = held_by(rank, tensors) if rank != failing else {}
        exchange = QueueExchange(rank, lines)
        return gather_into(store, table, layout, held, rank, exchange)

    outcomes = in_threads(gather)
    assert isinstance(outcomes[failing], KeyError)
    others = [outcomes[rank] for rank in range(WORLD_SIZE) if rank != failing]
    assert any(isinstance(error, DistributedError) and f"rank {failing} failed" in str(error) for error in others)
