"""How long does a load into the live training state take, from the page cache and from the device?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import files
from benchmarks.cases.tables import table_of
from benchmarks.rank import Rank, timed
from benchmarks.report import Table
from benchmarks.rotation import WARM_UP
from benchmarks.stage import Options, Stage, span_s

WARM_NAMES = ("raw_preadv", "shardpoint", "dcp_1", "torch_save", "safetensors")
COLD_NAMES = ("raw_direct", "shardpoint", "dcp_1")
RAW_NAMES = ("raw_preadv", "raw_direct")
_MOST_RESIDENT = 0.01
_REMARK = (
    "Each load fills the live weights and moments in place; before the first one they are set to zero, and after it "
    "compared with what was saved."
)


def run(options: Options) -> list[Table]:
    """Load the same bytes with every contender in turn, warm, then cold."""
    tables = []
    for name, title, names, cold in (
        ("load_warm", "Load, everything in the page cache", WARM_NAMES, False),
        ("load_cold", "Load, nothing in the page cache", COLD_NAMES, True),
    ):
        with Stage(options, name, "benchmarks.subject:build_llama", size_gb=options.size_gb) as stage:
            tables.append(load_table(stage, name, title, names, cold=cold))
    return tables


def load_table(stage: Stage, case: str, title: str, names: tuple[str, ...], *, cold: bool) -> Table:
    """Save once with every contender, see that its load gives the bytes back, then measure loads."""
    paths: dict[str, Path] = {}
    device: dict[str, list[float]] = {}

    def measure(name: str, number: int) -> float:
        if number == WARM_UP:
            replies = stage.call(name, "benchmarks.cases.save:timed_save", index=stage.next_index())
            paths[name] = Path(replies[0]["path"])
            stage.check_size(paths[name])
            if name not in RAW_NAMES:
                stage.call(name, "benchmarks.cases.load:check_load", path=str(paths[name]))
        replies = stage.call(name, "benchmarks.cases.load:timed_load", path=str(paths[name]), cold=cold)
        if number != WARM_UP:
            device.setdefault(name, []).append(sum(reply["read_bytes"] for reply in replies) / 1e9)
        return span_s(replies)

    rotation = stage.rotate(names, measure)
    return table_of(
        case,
        title,
        rotation.measurements,
        rotation.failures,
        durable=False,
        reference=names[0],
        num_bytes=stage.num_bytes,
        columns={"GB read from the device": device} if cold else {},
        remarks=[_REMARK],
    )


def check_load(rank: Rank, *, name: str, path: str) -> None:
    """Clear the training state, load, and see that everything is as it was.

    Raises:
        RuntimeError: it is not.
    """
    before = rank.subject.checksums()
    rank.subject.clear()
    dist.barrier()
    rank.contenders[name].load(Path(path))
    after = rank.subject.checksums()
    different = [key for key, value in before.items() if after[key] != value]
    if different:
        text = f"the load gave back other bytes in {len(different)} of {len(before)} tensors: {different[:3]}"
        raise RuntimeError(text)


def timed_load(rank: Rank, *, name: str, path: str, cold: bool) -> dict[str, Any]:
    """Bring the page cache into the wanted state, and load once.

    Raises:
        RuntimeError: the page cache does not do as it is told.
    """
    folder = Path(path)
    if rank.rank == 0:
        resident = files.drop(folder) if cold else files.warm(folder)
        if (cold and resident > _MOST_RESIDENT) or (not cold and resident < 1 - _MOST_RESIDENT):
            text = f"{resident:.1%} of the files' pages are in the page cache"
            raise RuntimeError(text)
    before = files.io_counters()["read_bytes"]
    start, end = timed(lambda: rank.contenders[name].load(folder))
    return {"start": start, "end": end, "read_bytes": files.io_counters()["read_bytes"] - before}
