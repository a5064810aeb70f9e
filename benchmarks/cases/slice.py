"""How many bytes are read to get 16 of the 1024 rows of every tensor?"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.cases.tables import table_of
from benchmarks.files import io_counters
from benchmarks.job import Job, RankFailureError
from benchmarks.rank import Rank
from benchmarks.report import Table
from benchmarks.rotation import WARM_UP
from benchmarks.stage import Options, Stage

NUM_TENSORS, NUM_ROWS, NUM_COLUMNS = 64, 1024, 768
ROWS = (256, 272)  # within what one of the two ranks saved
NAMES = ("shardpoint", "dcp_1")


def run(options: Options) -> list[Table]:
    """Save once with two ranks, then read the rows with one process."""
    wanted_mb = NUM_TENSORS * (ROWS[1] - ROWS[0]) * NUM_COLUMNS * 4 / 1e6
    shape = {"num_tensors": NUM_TENSORS, "num_rows": NUM_ROWS, "num_columns": NUM_COLUMNS}
    paths: dict[str, Path] = {}
    seconds: dict[str, list[float]] = {}
    with Stage(options, "slice", "benchmarks.subject:build_rows", **shape) as stage:
        readers: dict[str, Job] = {}

        def measure(name: str, number: int) -> float:
            if number == WARM_UP:
                replies = stage.call(name, "benchmarks.cases.save:timed_save", index=stage.next_index())
                paths[name] = Path(replies[0]["path"])
                log = options.scratch / "logs" / f"slice.{name}.reader"
                readers[name] = Job(options.pythons["main"], log, world_size=1)
            (reply,) = readers[name].call(f"benchmarks.cases.slice:read_{name}", path=str(paths[name]))
            if reply["num_values"] * 4 / 1e6 != wanted_mb:
                text = f"{reply['num_values']} values read, not {wanted_mb * 1e6 / 4}"
                raise RankFailureError(text)
            if number != WARM_UP:
                seconds.setdefault(name, []).append(reply["seconds"])
            return float(reply["rchar"] / 1e6)

        try:
            rotation = stage.rotate(NAMES, measure)
        finally:
            for reader in readers.values():
                reader.close()
    shutil.rmtree(options.scratch / "slice", ignore_errors=True)
    remark = (
        f"{NUM_TENSORS} tensors [{NUM_ROWS}, {NUM_COLUMNS}] of float32, saved by 2 ranks; rows {ROWS[0]} to {ROWS[1]} "
        "read by one process, metadata included. Counted by the kernel: `rchar` of /proc/self/io, the bytes of all "
        "read calls. DCP reads as rank 16 of 64."
    )
    table = table_of(
        "slice",
        "Bytes read for 16 of the 1024 rows of every tensor",
        {"wanted": [wanted_mb] * options.num_rounds, **rotation.measurements},
        rotation.failures,
        unit="MB",
        durable=False,
        reference="wanted",
        columns={"seconds": seconds},
        remarks=[remark],
    )
    return [table]


def read_shardpoint(_: Rank, *, path: str) -> dict[str, Any]:
    """Read the rows with `open_checkpoint`.

    Raises:
        NotImplementedError: this version of Shardpoint does not have it.
    """
    import shardpoint

    opener = getattr(shardpoint, "open_checkpoint", None)
    if opener is None:
        text = "this version of Shardpoint has no open_checkpoint"
        raise NotImplementedError(text)
    with _Counted() as counted:
        checkpoint = opener(path)
        for number in range(NUM_TENSORS):
            counted.add(checkpoint.read(f"{number}.weight", part="modeling", rows=ROWS).tensor)
    return counted.facts()


def read_dcp_1(_: Rank, *, path: str) -> dict[str, Any]:
    """Load the rows as the rank of a larger job would that holds them."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    num_rows = ROWS[1] - ROWS[0]
    if not dist.is_initialized():
        world_size = NUM_ROWS // num_rows
        dist.init_process_group("fake", rank=ROWS[0] // num_rows, world_size=world_size, store=FakeStore())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    locals_ = {f"{number}.weight": torch.zeros(num_rows, NUM_COLUMNS) for number in range(NUM_TENSORS)}
    state = {"model": {key: DTensor.from_local(value, mesh, [Shard(0)]) for key, value in locals_.items()}}
    with _Counted() as counted:
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
        for value in locals_.values():
            counted.add(value)
    return counted.facts()


class _Counted:
    """Counts what is read in the context."""

    def __enter__(self) -> Self:
        self._num_values, self._num_zeros = 0, 0
        self._start, self._rchar = time.monotonic(), io_counters()["rchar"]
        return self

    def __exit__(self, *_: object) -> None:
        self._rchar = io_counters()["rchar"] - self._rchar
        self._seconds = time.monotonic() - self._start

    def add(self, tensor: torch.Tensor) -> None:
        self._num_values += int((tensor != 0).sum())  # random values are not zero: an unread one would be

    def facts(self) -> dict[str, Any]:
        return {"num_values": self._num_values, "rchar": self._rchar, "seconds": self._seconds}
