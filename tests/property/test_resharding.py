"""Does any parallelism read what any other wrote? Real saves and loads by virtual ranks, against plain numpy chunks."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.adapters.collect import Collected, Held
from shardpoint.comm import Comm, in_process_comms
from shardpoint.engine import StructureCache, Target, open_committed
from shardpoint.engine import load as load_target
from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import Table
from shardpoint.planning.ownership import held_region
from shardpoint.storage import LocalStore
from shardpoint.testing.simulator import Simulation, VirtualTensor
from tests.training import on_disk

Array = np.ndarray[Any, Any]
KINDS = ["fsdp", "columns", "hsdp", "fsdp x tp columns", "fsdp x tp rows", "hsdp x tp", "ddp"]
DTYPES = {"F32": "<f4", "U16": "<u2", "I64": "<i8", "BOOL": "|b1", "C64": "<c8", "F64": "<f8"}


def chunk(whole: Array, parts: int, part: int, dim: int) -> Array:
    """Cut as torch does: into parts of the rounded-up size, of which the last ones are short or empty."""
    size = -(-whole.shape[dim] // parts)
    taken = [slice(None)] * whole.ndim
    taken[dim] = slice(part * size, (part + 1) * size)
    return whole[tuple(taken)]


class Layout:
    """How a world of `r * d * t` ranks holds a tensor; `local` says it by numpy alone."""

    def __init__(self, kind: str, r: int, d: int, t: int) -> None:
        self.kind, self.r, self.d, self.t = kind, r, d, t
        self.world = r * d * t
        rows, cut, everywhere = Placement("shard", 0), Placement("strided_shard", 0, t), Placement("replicate")
        shape, self.placements = {
            "fsdp": ((self.world,), (rows,)),
            "columns": ((self.world,), (Placement("shard", 1),)),
            "ddp": ((self.world,), (everywhere,)),
            "hsdp": ((r, d * t), (everywhere, rows)),
            "fsdp x tp columns": ((r * d, t), (cut, rows)),
            "fsdp x tp rows": ((r * d, t), (rows, Placement("shard", 1))),
            "hsdp x tp": ((r, d, t), (everywhere, cut, rows)),
        }[kind]
        self.mesh = Mesh(shape, tuple(range(self.world)))

    def local(self, whole: Array, rank: int) -> Array:
        t, rest = rank % self.t, rank // self.t
        columns = chunk(whole, self.t, t, 0)
        rows = chunk(whole, self.r * self.d, rest, 0)
        return {
            "fsdp": chunk(whole, self.world, rank, 0),
            "columns": chunk(whole, self.world, rank, 1),
            "ddp": whole,
            "hsdp": chunk(whole, self.d * self.t, rank % (self.d * self.t), 0),
            "fsdp x tp columns": chunk(columns, self.r * self.d, rest, 0),
            "fsdp x tp rows": chunk(rows, self.t, t, 1),
            "hsdp x tp": chunk(columns, self.d, rest % self.d, 0),
        }[self.kind]

    def job(self, contents: dict[str, tuple[str, Array]]) -> Simulation:
        tensors = [
            VirtualTensor("modeling", name, dtype, whole.shape, (self.mesh,), self.placements)
            for name, (dtype, whole) in contents.items()
        ]
        return Simulation(tensors, self.world)


LAYOUTS = st.builds(Layout, st.sampled_from(KINDS), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, Array]]:
    found: dict[str, tuple[str, Array]] = {}
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        lengths = st.one_of(st.integers(0, 13), st.sampled_from([64, 251]))
        whole = np.arange(1, 1 + (shape := (draw(lengths), draw(lengths)))[0] * shape[1]).reshape(shape)
        found[f"t{number}"] = (dtype, (whole % 2 if dtype == "BOOL" else whole).astype(DTYPES[dtype]))
    return found


def read_by(job: Simulation, store: LocalStore, name: str) -> list[dict[str, Array]]:
    """Load with one thread for each virtual rank; return what each rank holds then."""
    found: list[dict[str, Array]] = [{} for _ in range(job.world_size)]
    failed: list[BaseException] = []

    def run(comm: Comm) -> None:
        (own,) = [table for ranks, table in job.tables if comm.rank in ranks]

        class Virtual(Collected):
            @property
            def table(self) -> Table:
                return own

        collected = Virtual(comm.rank)
        for entry in job.merged.entries:
            region: Region | None = held_region(entry, comm.rank)
            assert region is not None
            empty = np.zeros(region.lengths, DTYPES[entry.dtype])
            found[comm.rank][entry.key] = empty
            collected.held[entry.part, entry.key] = Held(torch.from_numpy(empty), region)
        target = Target(collected, frozenset({"modeling"}), lambda: None)
        try:
            load_target(comm, lambda: open_committed(store, name), lambda _: target, StructureCache())
        except BaseException as error:  # noqa: BLE001 - raised below, where the test sees it
            failed.append(error)

    threads = [threading.Thread(target=run, args=(comm,)) for comm in in_process_comms(job.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def check(contents: dict[str, tuple[str, Array]], writer: Layout, reader: Layout) -> None:
    job = writer.job(contents)
    job.check_coverage()
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        job.write(store, "step-1", {("modeling", name): whole for name, (_, whole) in contents.items()})
        stored = on_disk(Path(folder) / "step-1" / "modeling")
        assert stored.keys() == contents.keys()
        for name, (_, whole) in contents.items():
            assert stored[name].numpy().shape == whole.shape
            assert stored[name].numpy().tobytes() == whole.tobytes(), name
        for rank, held in enumerate(read_by(reader.job(contents), store, "step-1")):
            for name, (_, whole) in contents.items():
                expected = reader.local(whole, rank)
                assert held[name].shape == expected.shape, (name, rank)
                assert held[name].tobytes() == expected.tobytes(), (name, rank)


@settings(max_examples=30)
@given(tensors(), LAYOUTS, LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(
    contents: dict[str, tuple[str, Array]], writer: Layout, reader: Layout
) -> None:
    check(contents, writer, reader)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp x tp columns", "hsdp x tp"])
def test_a_vocabulary_that_does_not_divide_by_eight(kind: str) -> None:
    rows = np.arange(50257 * 3, dtype="<f4").reshape(50257, 3)
    check({"embed": ("F32", rows)}, Layout(kind, 2, 2, 2), Layout("fsdp", 1, 3, 1))
