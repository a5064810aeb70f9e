"""On what, with what, and when was it measured?"""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from benchmarks.job import REPO

_PACKAGES = (
    "torch", "safetensors", "numpy", "awscrt", "msgspec", "transformers", "accelerate", "torch_checkpointing",
)  # fmt: skip


def machine(scratch: Path) -> dict[str, str]:
    """Describe cores, memory, kernel, and the filesystem that is written to."""
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    one, five, fifteen = os.getloadavg()
    return {
        "cores": f"{len(os.sched_getaffinity(0))} ({model[1] if model else platform.machine()})",
        "memory": f"{int(memory[1]) / 1e6:.1f} GB" if memory else "unknown",
        "kernel": platform.release(),
        "filesystem": _filesystem(scratch),
        "load before": f"{one:.1f}, {five:.1f}, {fifteen:.1f} in the last 1, 5 and 15 minutes",
    }


def versions(pythons: dict[str, Path]) -> dict[str, str]:
    """Return the version of everything that is compared."""
    found = {"python": platform.python_version(), "shardpoint": metadata.version("shardpoint")}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    other = pythons["colossalai"]
    if other.exists():
        program = "from importlib.metadata import version as v; print(v('colossalai'), v('transformers'), v('torch'))"
        output = subprocess.run([other, "-c", program], capture_output=True, text=True, check=False).stdout.split()
        found |= dict(zip(("colossalai", "its transformers", "its torch"), output, strict=False))
    return found


def commit() -> str:
    """Return the commit of this repository, and whether anything differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPO), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return name + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def today() -> str:
    """Return date and time, in UTC."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _filesystem(path: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        device, mount, kind, options, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, f"{kind} on {device} ({options})")
    return best[1]
