"""What is aimed at, and whether it was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.report import Summary, Table, best, ratios, short

Tables = Mapping[str, Table]


@dataclass(frozen=True)
class Target:
    """One aim.

    Attributes:
        what: in words.
        bound: the number that is aimed at.
        side: on which side of the bound the measured number should be.
        unit: written behind the numbers.
        measure: finds the measured number; None when it was not measured.
    """

    what: str
    bound: float
    side: Literal["at least", "at most"]
    unit: str
    measure: Callable[[Tables], Summary | None]


def _faster(case: str, by: str, *others: str) -> Callable[[Tables], Summary | None]:
    """How many times faster one contender is than the fastest of the others."""
    return _compare(case, by, others, lambda table, fastest: ratios(table, fastest, by))


def _times(case: str, by: str, *others: str) -> Callable[[Tables], Summary | None]:
    """How many times as much one contender takes as the best of the others."""
    return _compare(case, by, others, lambda table, lowest: ratios(table, by, lowest))


def _compare(
    case: str, by: str, others: Sequence[str], divide: Callable[[Table, str], list[float]]
) -> Callable[[Tables], Summary | None]:
    def measure(tables: Tables) -> Summary | None:
        table = tables.get(case)
        other = best(table, others) if table is not None else None
        if table is None or other is None or not table.measurements.get(by):
            return None
        return Summary.of(divide(table, other))

    return measure


def _plain(case: str, name: str) -> Callable[[Tables], Summary | None]:
    """The measurements themselves."""

    def measure(tables: Tables) -> Summary | None:
        numbers = tables[case].measurements.get(name) if case in tables else None
        return Summary.of(numbers) if numbers else None

    return measure


_DCP, _DCP_ASYNC = ("dcp_1", "dcp_2"), ("dcp_async_cached", "dcp_async_background", "dcp_async_shared")
_ME, _ME_ASYNC = "shardpoint", "shardpoint_async"
SPARE_MB = 64.0
# What a save may hold beside its spare memory: the buffers that it stages through.
BUDGET_MB = 64 * 2**20 / 1e6

TARGETS = (
    Target("speed of a durable save, against raw O_DIRECT", 0.9, "at least", "x", _faster("save", _ME, "raw_direct")),
    Target("... against DCP with its best number of threads", 2.0, "at least", "x", _faster("save", _ME, *_DCP)),
    Target("... against safetensors and fsync", 1.3, "at least", "x", _faster("save", _ME, "safetensors")),
    Target("... against DCP consolidated for Hugging Face", 6.0, "at least", "x", _faster("save", _ME, "dcp_hf")),
    Target("... against ColossalAI, sharded (ZeRO-2)", 2.5, "at least", "x", _faster("save", _ME, "colossalai_zero")),
    Target(
        "... against ColossalAI, whole on rank 0 (DDP)", 2.5, "at least", "x", _faster("save", _ME, "colossalai_ddp")
    ),
    Target(
        "time blocked by an async save, staged at once, against memcpy",
        1.1,
        "at most",
        "x",
        _times("async_at_once", _ME_ASYNC, "memcpy"),
    ),
    Target(
        "... copied before the next optimizer step, against memcpy",
        0.1,
        "at most",
        "x",
        _times("async_overlapped", _ME_ASYNC, "memcpy"),
    ),
    Target(
        "... against DCP with its best stager",
        1 / 3,
        "at most",
        "x",
        _times("async_overlapped", _ME_ASYNC, *_DCP_ASYNC),
    ),
    Target(
        "... against torch-checkpointing",
        1 / 3,
        "at most",
        "x",
        _times("async_overlapped", _ME_ASYNC, "torch_checkpointing_async"),
    ),
    Target(
        "... staged at once, against DCP with its best stager",
        1 / 3,
        "at most",
        "x",
        _times("async_at_once", _ME_ASYNC, *_DCP_ASYNC),
    ),
    Target(
        "... staged at once, against torch-checkpointing",
        1 / 3,
        "at most",
        "x",
        _times("async_at_once", _ME_ASYNC, "torch_checkpointing_async"),
    ),
    Target(
        "a step while a save is written, trainer bound by torch", 1.15, "at most", "x", _plain("step_torch", _ME_ASYNC)
    ),
    Target(
        "a step while a save is written, trainer bound by Python",
        1.15,
        "at most",
        "x",
        _plain("step_python", _ME_ASYNC),
    ),
    Target("speed of a warm load, against raw preadv", 0.8, "at least", "x", _faster("load_warm", _ME, "raw_preadv")),
    Target("... against dcp.load", 4.0, "at least", "x", _faster("load_warm", _ME, "dcp_1")),
    Target(
        "speed of a cold load, against raw O_DIRECT", 0.85, "at least", "x", _faster("load_cold", _ME, "raw_direct")
    ),
    Target("bytes read for a slice, against bytes wanted", 1.1, "at most", "x", _times("slice", _ME, "wanted")),
    Target("extra memory of a save: buffers and 64 MB", BUDGET_MB + SPARE_MB, "at most", " MB", _plain("memory", _ME)),
    Target("seconds of a cold plan, one rank of 16,384", 0.3, "at most", " s", _plain("planning", "cold_plan_s")),
    Target("... warm", 0.005, "at most", " s", _plain("planning", "warm_plan_s")),
    Target("... the coordinator's merge", 2.0, "at most", " s", _plain("planning", "coordinator_merge_s")),
    Target(
        "speed of saving 10,000 tensors, FSDP2, against DCP",
        4.0,
        "at least",
        "x",
        _faster("many_fsdp_save", _ME, *_DCP),
    ),
    Target("... DDP", 4.0, "at least", "x", _faster("many_ddp_save", _ME, *_DCP)),
    Target(
        "speed of loading 10,000 tensors, FSDP2, against DCP",
        4.0,
        "at least",
        "x",
        _faster("many_fsdp_load", _ME, *_DCP),
    ),
    Target("... DDP", 4.0, "at least", "x", _faster("many_ddp_load", _ME, *_DCP)),
)


def judge(tables: Tables, targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Say of each target what was measured, and whether that reaches it."""
    rows = []
    for target in targets:
        found = target.measure(tables)
        measured, verdict = "not measured", ""
        if found is not None:
            reached = found.median >= target.bound if target.side == "at least" else found.median <= target.bound
            measured, verdict = f"{found}{target.unit}", "reached" if reached else "missed"
        rows.append(
            {
                "what": target.what,
                "target": f"{target.side} {short(target.bound)}{target.unit}",
                "measured": measured,
                "verdict": verdict,
                "median": found.median if found is not None else None,
            }
        )
    return rows
