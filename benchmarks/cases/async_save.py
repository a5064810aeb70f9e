"""For how long does an asynchronous save block the training?

Blocked is: the call that begins a save, and the wait before the weights may change. Two schedules are measured: the
trainer waits at once; and it computes a forward and a backward first, which is what a training loop does.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch.distributed as dist

from benchmarks.cases.save import settle, sync_rest
from benchmarks.cases.tables import table_of
from benchmarks.contenders import AsyncContender
from benchmarks.rank import Rank, timed
from benchmarks.report import Table
from benchmarks.rotation import WARM_UP
from benchmarks.stage import Options, Stage, delete

NAMES = (
    "memcpy",
    "shardpoint_async",
    "dcp_async_cached",
    "dcp_async_background",
    "dcp_async_shared",
    "torch_checkpointing_async",
)
NUM_TOKENS = 64


def run(options: Options) -> list[Table]:
    """Measure both schedules."""
    tables = []
    for name, title, overlapped in (
        ("async_at_once", "Blocked by an async save that is waited for at once", False),
        ("async_overlapped", "Blocked by an async save, up to the optimizer step after a forward and a backward", True),
    ):
        with Stage(options, name, "benchmarks.subject:build_llama", size_gb=options.size_gb) as stage:
            tables.append(_table(stage, name, title, overlapped=overlapped))
    return tables


def _table(stage: Stage, case: str, title: str, *, overlapped: bool) -> Table:
    until_durable, meanwhile = "seconds until durable", "forward and backward meanwhile"
    columns: dict[str, dict[str, list[float]]] = {until_durable: {}}
    if overlapped:
        columns[meanwhile] = {}

    def measure(name: str, number: int) -> float:
        function = "timed_copy" if name == "memcpy" else "timed_async"
        replies = stage.call(
            name, f"benchmarks.cases.async_save:{function}", index=stage.next_index(), overlapped=overlapped
        )
        delete(replies)
        if number != WARM_UP:
            if name != "memcpy":
                durable = max(reply["durable_s"] for reply in replies)
                columns[until_durable].setdefault(name, []).append(durable)
            if overlapped:
                computing = max(reply["computing_s"] for reply in replies)
                columns[meanwhile].setdefault(name, []).append(computing)
        return float(max(reply["blocked_s"] for reply in replies))

    rotation = stage.rotate(NAMES, measure)
    return table_of(
        case,
        title,
        rotation.measurements,
        rotation.failures,
        reference="memcpy",
        num_bytes=None if overlapped else stage.num_bytes,
        columns=columns,
        remarks=[f"{stage.num_bytes / 1e9:.2f} GB, copied on 2 ranks at once."],
    )


def timed_copy(rank: Rank, *, name: str, index: int, overlapped: bool) -> dict[str, Any]:
    """Copy everything once into warm memory; then compute alone, for comparison."""
    settle(rank)
    start, end = timed(lambda: rank.contenders[name].save(index))
    computing_s = _compute(rank) if overlapped else 0.0
    _step(rank)
    return {"blocked_s": end - start, "computing_s": computing_s, "path": str(rank.contenders[name].home / str(index))}


def timed_async(rank: Rank, *, name: str, index: int, overlapped: bool) -> dict[str, Any]:
    """Begin a save, wait until the weights may change, step, and wait until it is durable."""
    contender = cast("AsyncContender", rank.contenders[name])
    path = contender.home

    def start_save() -> None:
        nonlocal path
        path = contender.start(index)

    settle(rank)
    start, called = timed(start_save)
    computing_s = _compute(rank) if overlapped else 0.0
    counted = contender.blocked_s()
    if overlapped and counted is not None:
        # The hook of the optimizer step waits, and counts for how long.
        _step(rank)
        after = contender.blocked_s()
        blocked_s = called - start + (after if after is not None else counted) - counted
    else:
        before = time.monotonic()
        contender.wait_staged()
        blocked_s = called - start + time.monotonic() - before
        _step(rank)
    contender.wait_written()
    sync_rest(rank, name, path)
    return {
        "blocked_s": blocked_s,
        "computing_s": computing_s,
        "durable_s": time.monotonic() - start,
        "path": str(path),
    }


def _compute(rank: Rank) -> float:
    start = time.monotonic()
    rank.subject.forward_backward(NUM_TOKENS)
    return time.monotonic() - start


def _step(rank: Rank) -> None:
    optimizer = rank.subject.optimizer
    assert optimizer is not None  # the Llama has one
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()
