"""How does a test start ranks that are real processes, and see how each of them ended?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How one rank ended.

    Attributes:
        returncode: its exit status; negative for a signal. Under torchrun, torchrun's own, on every rank.
        stdout: what it printed.
        stderr: what it complained about.
    """

    returncode: int
    stdout: str
    stderr: str

    def report(self) -> Any:
        """Return what the rank printed as its last line, which must be JSON."""
        lines = self.stdout.strip().splitlines()
        assert lines, f"the rank printed nothing (exit {self.returncode}); its stderr:\n{self.stderr}"
        return json.loads(lines[-1])


def run_ranks(
    program: str | Path,
    world_size: int,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    torchrun: bool = False,
    args: Sequence[str] = (),
) -> list[RankOutcome]:
    """Run a program once per rank, each in a process of its own, and wait for all of them.

    Every rank has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, a free MASTER_PORT and OMP_NUM_THREADS=1
    in its environment, and `src` and the repository in its PYTHONPATH. A rank that dies takes no other with it, unless
    under torchrun.

    Args:
        program: the text of a Python program, or the path of one.
        world_size: how many ranks.
        timeout_s: seconds until the ranks that still run are killed, and the test fails.
        env: what to set besides, in every rank's environment.
        torchrun: let torchrun start the ranks; it hosts the store then, and kills all ranks when one fails.
        args: the program's arguments.

    Returns:
        One outcome per rank, in the order of the ranks.

    Raises:
        AssertionError: a rank was still running after `timeout_s`; the message holds what every rank had printed.
    """
    folder = Path(tempfile.mkdtemp(prefix="shardpoint-ranks-"))
    try:
        return _run(folder, program, world_size, timeout_s=timeout_s, env=env, torchrun=torchrun, args=args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    folder: Path,
    program: str | Path,
    world_size: int,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None,
    torchrun: bool,
    args: Sequence[str],
) -> list[RankOutcome]:
    path = program if isinstance(program, Path) else folder / "program.py"
    if isinstance(program, str):
        path.write_text(program, encoding="utf-8")
    port = str(free_port())
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO / "src"), str(REPO), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    shared |= dict(env or {})
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
        launcher += [
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            "--redirects=3",
            f"--log-dir={folder / 'logs'}",
        ]
        started = [_Started(folder / "torchrun", [*launcher, str(path), *args], shared)]
    else:
        started = [
            _Started(folder / f"rank{rank}", [sys.executable, str(path), *args], shared | _rank_env(rank, world_size))
            for rank in range(world_size)
        ]
    give_up_at = time.monotonic() + timeout_s
    late = [one.process.args for one in started if not one.ended(give_up_at)]
    for one in started:
        one.kill()
    outcomes = [one.outcome() for one in started]
    if torchrun:
        outcomes = _torchrun_outcomes(folder / "logs", world_size, outcomes[0])
    if late:
        told = "\n".join(f"--- rank {rank}: {one}" for rank, one in enumerate(outcomes))
        text = f"{len(late)} of {len(started)} processes still ran after {timeout_s} s\n{told}"
        raise AssertionError(text)
    return outcomes


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank_env(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


class _Started:
    """A process, in a session of its own, whose output goes to files (a full pipe would stop it)."""

    def __init__(self, stem: Path, command: list[str], env: Mapping[str, str]) -> None:
        self._stdout = stem.with_suffix(".stdout")
        self._stderr = stem.with_suffix(".stderr")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, start_new_session=True)

    def ended(self, give_up_at: float) -> bool:
        try:
            self.process.wait(max(0.0, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the process if it still runs, and what it started (torchrun gives each rank a session of its own)."""
        if self.process.poll() is None:
            for process_id in [*_descendants(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            self.process.wait()

    def outcome(self) -> RankOutcome:
        return RankOutcome(
            returncode=self.process.returncode,
            stdout=self._stdout.read_text(encoding="utf-8", errors="replace"),
            stderr=self._stderr.read_text(encoding="utf-8", errors="replace"),
        )


def _descendants(process_id: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{process_id}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [*_descendants(child), child]
    return found


def _torchrun_outcomes(logs: Path, world_size: int, launcher: RankOutcome) -> list[RankOutcome]:
    outcomes = []
    for rank in range(world_size):
        texts = []
        for stream in ("stdout", "stderr"):
            found = sorted(logs.glob(f"*/attempt_0/{rank}/{stream}.log"))
            texts.append(found[-1].read_text(encoding="utf-8", errors="replace") if found else "")
        outcomes.append(RankOutcome(launcher.returncode, texts[0], texts[1] or launcher.stderr))
    return outcomes
