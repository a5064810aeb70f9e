"""Shardpoint: sync and async."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from benchmarks.contenders import AsyncContender, Contender
from benchmarks.rank import Rank
from shardpoint import Checkpointer, TrainState


def is_async_there() -> bool:
    """Return whether this version of Shardpoint saves asynchronously."""
    return "async_save" in inspect.signature(Checkpointer).parameters


class Sync(Contender):
    """`Checkpointer.save` and `Checkpointer.resume`."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        self._checkpointer = Checkpointer(home)
        self._state = TrainState(model=self.subject.model, optimizer=self.subject.optimizer)

    def save(self, index: int) -> Path:
        """Save, durably."""
        self._checkpointer.save(self._state, epoch=0, step=index, batch_size=1)
        return self.home / f"epoch-0_step-{index}"

    def load(self, path: Path) -> None:
        """Resume from the only checkpoint that there is."""
        run = self._checkpointer.resume(self._state)
        if run is None or path.name != f"epoch-{run.epoch}_step-{run.step}":
            text = f"resumed {run}, not {path}"
            raise RuntimeError(text)

    def close(self) -> None:
        """Give the root up."""
        self._checkpointer.close()


class Async(AsyncContender):
    """`Checkpointer(async_save=True)`."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        if not is_async_there():
            text = "this version of Shardpoint has no Checkpointer(async_save=True)"
            raise NotImplementedError(text)
        options: dict[str, Any] = {"async_save": True}
        self._checkpointer = Checkpointer(home, **options)
        self._state = TrainState(model=self.subject.model, optimizer=self.subject.optimizer)
        self._pending: Any = None

    def start(self, index: int) -> Path:
        """Begin a save; `optimizer.step` waits for what is not staged by then."""
        self._pending = self._checkpointer.save(self._state, epoch=0, step=index, batch_size=1)
        return self.home / f"epoch-0_step-{index}"

    def wait_staged(self) -> None:
        """Wait for the copies."""
        self._pending.staged()

    def wait_written(self) -> None:
        """Wait for the commit."""
        self._pending.result()

    def written(self) -> bool:
        """Ask whether it has committed."""
        return bool(self._pending.done())

    def blocked_s(self) -> float | None:
        """Return what Shardpoint counts: seconds inside `save` and inside the hook of `optimizer.step`."""
        seconds = getattr(self._pending, "blocked_s", None)
        return float(seconds) if isinstance(seconds, (int, float)) else None

    def close(self) -> None:
        """Give the root up."""
        self._checkpointer.close()
