"""How long does a synchronous save take until it is durable?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.cases.tables import table_of
from benchmarks.contenders import ENTRIES
from benchmarks.files import files_under, sync_directories, sync_files
from benchmarks.rank import Rank, timed
from benchmarks.report import Table
from benchmarks.stage import Options, Stage, delete, span_s

NAMES = (
    "raw_direct",
    "shardpoint",
    "torch_save",
    "safetensors",
    "dcp_1",
    "dcp_2",
    "dcp_hf",
    "torch_checkpointing",
    "accelerate",
    "colossalai_zero",
    "colossalai_ddp",
)


def run(options: Options) -> list[Table]:
    """Save the same bytes with every contender in turn."""
    with Stage(options, "save", "benchmarks.subject:build_llama", size_gb=options.size_gb) as stage:
        table = save_table(stage, "save", "Durable save", NAMES)
        table.reference = "raw_direct"
        table.remarks = [
            f"{stage.facts['num_tensors']} tensors, {stage.num_bytes / 1e9:.2f} GB; {stage.facts['shape']}."
        ]
        return [table]


def save_table(stage: Stage, case: str, title: str, names: Sequence[str]) -> Table:
    """Measure saves in turn."""
    rotation = stage.rotate(names, lambda name, _: save_once(stage, name))
    return table_of(case, title, rotation.measurements, rotation.failures, num_bytes=stage.num_bytes)


def save_once(stage: Stage, name: str) -> float:
    """Have a contender save, check how much it wrote, delete that, and return the seconds."""
    replies = stage.call(name, "benchmarks.cases.save:timed_save", index=stage.next_index())
    stage.check_size(Path(replies[0]["path"]))
    delete(replies)
    return span_s(replies)


def timed_save(rank: Rank, *, name: str, index: int) -> dict[str, Any]:
    """Save once, and sync what the contender does not sync itself, on one clock."""
    contender = rank.contenders[name]
    path = contender.home

    def save() -> None:
        nonlocal path
        path = contender.save(index)
        sync_rest(rank, name, path)

    settle(rank)
    start, end = timed(save)
    return {"start": start, "end": end, "path": str(path)}


def settle(rank: Rank) -> None:
    """Write out what others left behind, so that it is not written during the next measurement."""
    if rank.rank == 0:
        os.sync()
    dist.barrier()


def sync_rest(rank: Rank, name: str, path: Path) -> None:
    """Make durable what a contender has written and not synced itself."""
    if not ENTRIES[name].syncs_itself:
        dist.barrier()  # all files are there now
        sync_files(files_under(path)[rank.rank :: rank.world_size])
        dist.barrier()
        if rank.rank == 0:
            sync_directories(path)
