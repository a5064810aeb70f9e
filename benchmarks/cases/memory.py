"""How much host memory does a synchronous save take besides the training state?"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch.distributed as dist

from benchmarks.cases.save import sync_rest
from benchmarks.cases.tables import table_of
from benchmarks.rank import Rank
from benchmarks.report import Table
from benchmarks.stage import Options, Stage

NAMES = ("shardpoint", "torch_save", "safetensors", "dcp_1", "dcp_2", "dcp_hf", "torch_checkpointing")
_NUM_SAVES = 2


def run(options: Options) -> list[Table]:
    """Save with processes that have not saved before: buffers that a contender keeps would not be seen again."""
    with Stage(options, "memory", "benchmarks.subject:build_llama", size_gb=options.size_gb) as stage:
        num_bytes = stage.num_bytes

        def measure(name: str, _: int) -> float:
            stage.stop()
            peaks = []
            for _save in range(_NUM_SAVES):
                replies = stage.call(name, "benchmarks.cases.memory:peak", index=stage.next_index())
                shutil.rmtree(str(replies[0]["path"]), ignore_errors=True)
                peaks.append([float(reply["peak_mb"]) for reply in replies])
            return max(map(max, peaks))

        rotation = stage.rotate(NAMES, measure, warm_up=False)
    remark = (
        f"Each rank holds half of {num_bytes / 1e6:.0f} MB. The highest resident set (VmHWM, reset before) in the "
        f"first {_NUM_SAVES} saves of fresh processes, less the resident set before the first."
    )
    return [
        table_of(
            "memory",
            "Extra host memory of a save, on the rank that takes most",
            rotation.measurements,
            rotation.failures,
            unit="MB",
            remarks=[remark],
        )
    ]


def peak(rank: Rank, *, name: str, index: int) -> dict[str, object]:
    """Save once, and return the peak of the resident set above what it was before the first save."""
    dist.barrier()
    if "resident_mb" not in rank.kept:
        rank.kept["resident_mb"] = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    path = rank.contenders[name].save(index)
    sync_rest(rank, name, path)
    dist.barrier()
    return {"peak_mb": _status_mb("VmHWM") - rank.kept["resident_mb"], "path": str(path)}


def _status_mb(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        message = f"/proc/self/status has no {field}"
        raise RuntimeError(message)
    return int(found[1]) * 1024 / 1e6
