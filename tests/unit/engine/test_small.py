"""Do small tensors that ranks hold parts of become whole on the coordinator, in few writes, or not at all?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardpoint.adapters.collect import Collected, Held
from shardpoint.adapters.state import RunState
from shardpoint.checksum import crc64
from shardpoint.comm import Comm, in_process_comms
from shardpoint.engine import SaveRequest, SaveResult, StructureCache, save
from shardpoint.engine import small as engine_small
from shardpoint.errors import DistributedError
from shardpoint.layout import Mesh, Placement, owned_region
from shardpoint.planning import PartNaming, TensorFact, gathered_entries, merge_tables
from shardpoint.planning import small as planning_small
from shardpoint.storage import BufferPool, LocalStore
from shardpoint.testing import FaultyStore
from tests.training import on_disk, same_bits
from tests.unit.comm.threads import run_threads

WORLD_SIZE = 3
MESH = Mesh((WORLD_SIZE,), tuple(range(WORLD_SIZE)))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"t{n:04}": (5 + n % 7, 3) for n in range(300)} | {"empty": (0, 3), "large": (300, 100)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def collected(rank: int) -> Collected:
    """Return one rank's shards: rows of most tensors, columns of every third."""
    found = Collected(rank)
    found.naming["modeling"] = PartNaming("model")
    found._meshes[MESH] = 0
    for number, (name, tensor) in enumerate(tensors().items()):
        how = (Placement("shard", 1 if number % 3 == 0 else 0),)
        region = owned_region(tuple(tensor.shape), MESH.shape, (rank,), how)
        part = tensor
        for dim, spans in enumerate(region.spans):
            rows = [row for start, length in spans for row in range(start, start + length)]
            part = part.index_select(dim, torch.tensor(rows, dtype=torch.int64))
        found._facts.append(TensorFact("modeling", name, None, name, "F32", tuple(tensor.shape), 0, how))
        found.held["modeling", name] = Held(part.contiguous(), region)
    return found


def save_all(root: Path, change: Callable[[Collected], None] = lambda _: None) -> tuple[list[Any], list[FaultyStore]]:
    stores = [FaultyStore(LocalStore(root)) for _ in range(WORLD_SIZE)]

    def rank_main(comm: Comm) -> SaveResult:
        def collect() -> Collected:
            own = collected(comm.rank)
            change(own)
            return own

        request = SaveRequest("step-1", collect, RunState(0, 1, 1))
        return save(stores[comm.rank], comm, request, StructureCache(), pool=BufferPool(2**23))

    return run_threads(in_process_comms(WORLD_SIZE), rank_main), stores


def test_they_are_written_whole_by_the_coordinator(tmp_path: Path) -> None:
    outcomes, stores = save_all(tmp_path)
    assert all(isinstance(outcome, SaveResult) for outcome in outcomes), outcomes
    assert same_bits(on_disk(tmp_path / "step-1" / "modeling"), tensors())
    writes = [[key for op, key in store.log if op == "write" and "model-" in key] for store in stores]
    # The header, and the coordinator's share of the large tensor and the small ones together; the others' large shares.
    assert [len(found) for found in writes] == [3, 1, 1]


def test_what_is_gathered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    table = merge_tables([(range(WORLD_SIZE), collected(0).table)], WORLD_SIZE)
    names = [table.entries[index].key for index in gathered_entries(table)]
    assert names == [name for name in tensors() if name.startswith("t")]
    monkeypatch.setattr(planning_small, "MAX_TOTAL_BYTES", 1000)
    some = gathered_entries(table)
    assert 0 < sum(table.entries[index].num_bytes for index in some) <= 1000
    assert [table.entries[index].key for index in some] == names[: len(some)]


@pytest.mark.parametrize("fault", ["changed", "missing", "doubled"])
def test_bytes_that_change_on_the_way_or_do_not_come_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = engine_small._own_parts

    def spoilt(comm: Comm, *args: Any) -> Any:
        parts = real(comm, *args)
        if comm.rank != 1:
            return parts
        data, runs = bytearray(parts.data), parts.runs
        row = planning_small.RUN_FIELDS.itemsize
        if fault == "changed":
            data[7] ^= 1
            return engine_small._Parts(runs, bytes(data), parts.crc)
        if fault == "missing":
            length = int.from_bytes(runs[8:12], "little")
            data, runs = data[length:], runs[row:]
        else:  # the first run comes twice, the second not at all
            first, second = (int.from_bytes(runs[row * n + 8 : row * n + 12], "little") for n in (0, 1))
            data = data[:first] + data[:first] + data[first + second :]
            runs = runs[:row] + runs[:row] + runs[2 * row :]
        return engine_small._Parts(runs, bytes(data), crc64(data))

    monkeypatch.setattr(engine_small, "_own_parts", spoilt)
    outcomes, _ = save_all(tmp_path)
    assert [type(outcome) for outcome in outcomes] == [DistributedError] * WORLD_SIZE, outcomes
    assert ("on their way" in str(outcomes[0])) == (fault == "changed")
    assert not list(tmp_path.glob("step-*"))
