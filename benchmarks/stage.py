"""Where a case is played: jobs of ranks with the training state built, and the contenders made ready in them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.contenders import ENTRIES
from benchmarks.files import total_bytes
from benchmarks.job import Job, RankFailureError
from benchmarks.rotation import Measurement, Rotation, rotate

_NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        size_gb: weights and moments together, over all ranks.
        num_rounds: measured rounds of each case.
        scratch: where the contenders write; emptied.
        pythons: the interpreter of each kind of job.
        say: prints a line of progress.
    """

    size_gb: float
    num_rounds: int
    scratch: Path
    pythons: dict[str, Path]
    say: Callable[[str], None]


class Stage:
    """The jobs of one case; started when first needed, started anew after a failure.

    Args:
        options: what the user asked for.
        name: of the case; its directory below the scratch directory.
        build: "module:function" that builds the training state in the main job.
        **arguments: of `build`.
    """

    def __init__(self, options: Options, name: str, build: str, **arguments: Any) -> None:
        self.options = options
        self.folder = options.scratch / name
        self._builds = {
            "main": (build, arguments),
            "colossalai": ("benchmarks.contenders.colossal:start", {"size_gb": options.size_gb}),
        }
        self._jobs: dict[str, Job] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._ready: dict[str, set[str]] = {}
        self._indices = itertools.count(1)

    def __enter__(self) -> Self:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def num_bytes(self) -> int:
        """The bytes of the training state over all ranks."""
        self._job("main")
        return int(self._facts["main"]["num_bytes"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the build function told of the training state."""
        self._job("main")
        return self._facts["main"]

    def next_index(self) -> int:
        """Return a number that no save has had."""
        return next(self._indices)

    def call(self, name: str, function: str, **arguments: Any) -> list[Any]:
        """Call a function with a contender's name on all ranks of the job that it belongs to.

        Raises:
            RankFailureError: the contender cannot do it.
        """
        kind = ENTRIES[name].job
        job = self._job(kind)
        if name not in self._ready[kind]:
            job.call("benchmarks.contenders:prepare", name=name, home=str(self.folder / name))
            self._ready[kind].add(name)
        return job.call(function, name=name, **arguments)

    def rotate(
        self, names: Sequence[str], measure: Callable[[str, int], Measurement], *, warm_up: bool = True
    ) -> Rotation[Measurement]:
        """Measure the contenders in turn; see `rotation.rotate`."""

        def measured(name: str, number: int) -> Measurement:
            result = measure(name, number)
            self.options.say(f"{self.folder.name}, round {number + 1}, {ENTRIES[name].label}: {result}")
            return result

        def recover(name: str) -> None:
            self.options.say(f"{self.folder.name}: {ENTRIES[name].label} is left out; its ranks are started again")
            self._stop(ENTRIES[name].job)
            shutil.rmtree(self.folder / name, ignore_errors=True)

        return rotate(
            names,
            self.options.num_rounds,
            measured,
            failure=RankFailureError,
            recover=recover,
            warm_up=warm_up,
        )

    def check_size(self, path: Path) -> None:
        """See that a contender has written what it was given.

        Raises:
            RankFailureError: it has written less.
        """
        size = total_bytes(path)
        if size < _NEARLY_ALL * self.num_bytes:
            text = f"wrote {size} bytes of {self.num_bytes}"
            raise RankFailureError(text)

    def stop(self) -> None:
        """End all jobs."""
        for kind in list(self._jobs):
            self._stop(kind)

    def _stop(self, kind: str) -> None:
        job = self._jobs.pop(kind, None)
        if job is not None:
            job.close()

    def _job(self, kind: str) -> Job:
        if kind not in self._jobs:
            python = self.options.pythons[kind]
            if not python.exists():
                text = f"{python} is not there: make bench-{kind} sets it up"
                raise RankFailureError(text)
            self._jobs[kind] = job = Job(python, self.options.scratch / "logs" / f"{self.folder.name}.{kind}")
            self._ready[kind] = set()
            function, arguments = self._builds[kind]
            self._facts[kind] = job.call(function, **arguments)[0]
        return self._jobs[kind]


def span_s(replies: Sequence[dict[str, Any]]) -> float:
    """Return the seconds from the barrier to the end of the slowest rank."""
    return float(max(reply["end"] for reply in replies) - min(reply["start"] for reply in replies))


def delete(replies: Sequence[dict[str, Any]]) -> None:
    """Delete what a save wrote, outside the measured time."""
    shutil.rmtree(replies[0]["path"], ignore_errors=True)
