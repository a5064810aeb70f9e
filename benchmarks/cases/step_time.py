"""How much longer does a training step take while a save is being written?

Groups of steps with and without a save alternate. Two trainers: one that keeps every core busy with torch, one bound by
the interpreter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from benchmarks.cases.async_save import NUM_TOKENS
from benchmarks.cases.save import settle
from benchmarks.cases.tables import table_of
from benchmarks.contenders import ENTRIES, AsyncContender
from benchmarks.files import files_under, sync_directories, sync_files
from benchmarks.rank import Rank
from benchmarks.report import Table
from benchmarks.rotation import WARM_UP
from benchmarks.stage import Options, Stage, delete

NAMES = ("shardpoint_async", "dcp_async_background", "dcp_async_process", "torch_checkpointing_async")
_POLL_S = 0.005
_NUM_STEPS = {"torch": 3, "python": 20}
_REMARK = (
    "The mean wall time of the steps from the call of save to the end of the step in which it became durable, the call "
    "included, divided by that of steps without a save in the same round."
)
_TITLES = {
    "torch": "A training step while a save is written, both cores busy with torch",
    "python": "A training step while a save is written, trainer bound by Python",
}


def run(options: Options) -> list[Table]:
    """Measure both trainers."""
    tables = []
    for trainer, title in _TITLES.items():
        case = f"step_{trainer}"
        with Stage(options, case, "benchmarks.subject:build_llama", size_gb=options.size_gb) as stage:
            tables.append(_table(stage, case, title, trainer))
    return tables


def _table(stage: Stage, case: str, title: str, trainer: str) -> Table:
    columns: dict[str, dict[str, list[float]]] = {
        "seconds of a step without": {},
        "with": {},
        "steps until durable": {},
        "seconds until durable": {},
    }

    def measure(name: str, number: int) -> float:
        replies = stage.call(name, "benchmarks.cases.step_time:timed_steps", index=stage.next_index(), trainer=trainer)
        delete(replies)
        slowest = {key: max(reply[key] for reply in replies) for key in ("alone_s", "with_s", "num_steps", "durable_s")}
        if number != WARM_UP:
            for column, value in zip(columns.values(), slowest.values(), strict=True):
                column.setdefault(name, []).append(float(value))
        return float(slowest["with_s"] / slowest["alone_s"])

    rotation = stage.rotate(NAMES, measure)
    return table_of(
        case,
        title,
        rotation.measurements,
        rotation.failures,
        unit="x",
        columns=columns,
        remarks=[_REMARK],
    )


def timed_steps(rank: Rank, *, name: str, index: int, trainer: str) -> dict[str, Any]:
    """Take steps without a save, then with one until it is durable."""
    contender = cast("AsyncContender", rank.contenders[name])
    step = _trainer(rank, trainer)
    settle(rank)
    start = time.monotonic()
    for _ in range(_NUM_STEPS[trainer]):
        step()
    dist.barrier()
    alone_s = (time.monotonic() - start) / _NUM_STEPS[trainer]

    settle(rank)
    start = time.monotonic()
    path = contender.start(index)
    watcher = _Watcher(contender, path, syncs_itself=ENTRIES[name].syncs_itself, first=rank.rank == 0)
    num_steps, done = 0, False
    while not done:
        step()
        num_steps += 1
        flag = torch.tensor(int(watcher.done.is_set()))
        dist.all_reduce(flag, dist.ReduceOp.MIN)  # all ranks take the same number of steps
        done = bool(flag.item())
    with_s = (time.monotonic() - start) / num_steps
    contender.wait_written()
    watcher.join()
    return {
        "alone_s": alone_s,
        "with_s": with_s,
        "num_steps": num_steps,
        "durable_s": watcher.durable_at - start,
        "path": str(path),
    }


class _Watcher(threading.Thread):
    """Notices when a save has been written, and syncs what the contender left unsynced."""

    def __init__(self, contender: AsyncContender, path: Path, *, syncs_itself: bool, first: bool) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.durable_at = 0.0
        self._contender, self._path = contender, path
        self._syncs = not syncs_itself and first
        self.start()

    def run(self) -> None:
        """Poll, sync, and say so; what went wrong is raised where the save is waited for."""
        while not self._contender.written():
            time.sleep(_POLL_S)
        if self._syncs:
            sync_files(files_under(self._path))
            sync_directories(self._path)
        self.durable_at = time.monotonic()
        self.done.set()


def _trainer(rank: Rank, trainer: str) -> Callable[[], None]:
    optimizer = rank.subject.optimizer
    assert optimizer is not None  # the Llama has one
    parameters = list(rank.subject.model.parameters())

    def torch_step() -> None:
        rank.subject.forward_backward(NUM_TOKENS)
        optimizer.step()
        optimizer.zero_grad()

    def python_step() -> None:
        small, counts = torch.zeros(4), dict.fromkeys(range(100), 0)
        for number in range(3000):
            small = small * 0.5 + 1.0
            for key in range(20):
                counts[(number + key) % 100] += 1
        # A step of the real optimizer that changes little: its hooks run as in any other.
        for parameter in parameters:
            if parameter.ndim == 1:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    return {"torch": torch_step, "python": python_step}[trainer]
