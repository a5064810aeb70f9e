"""What a trainer holds of a save that was asked for: when it may go on, how it ended, and how to give it up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shardpoint.engine.results import SaveResult


class PendingSave:
    """A save that was asked for; already done when it was synchronous.

    Its methods may be called from any thread; none is collective.

    Args:
        name: the checkpoint's name.
        began: when it was asked for, in seconds of the monotonic clock; None: now.

    Attributes:
        name: the checkpoint's name.
    """

    def __init__(self, name: str, began: float | None = None) -> None:
        self.name = name
        self._began = time.monotonic() if began is None else began
        self._ended: float | None = None
        self._staged = threading.Event()
        self._done = threading.Event()
        self._outcome: SaveResult | BaseException | None = None
        self._was_told = False
        self._is_cancelled = False
        self._is_voted = False
        self._mutex = threading.Lock()
        self._blocked_s = 0.0
        self._when_staged: Callable[[], None] = lambda: None

    @classmethod
    def completed(cls, outcome: SaveResult, began: float | None = None) -> PendingSave:
        """Return one that is done."""
        pending = cls(outcome.name, began)
        pending.finish(outcome)
        return pending

    @property
    def blocked_s(self) -> float:
        """Seconds for which this save has blocked the trainer so far: in `save`, in `staged` and before steps."""
        return self._blocked_s

    @property
    def span_s(self) -> tuple[float, float | None]:
        """When it was asked for, and when it ended (None: it has not), in seconds of the monotonic clock."""
        return self._began, self._ended

    @property
    def failure(self) -> BaseException | None:
        """How it failed; None while it runs and when it was committed."""
        return self._outcome if isinstance(self._outcome, BaseException) else None

    @property
    def was_told(self) -> bool:
        """Whether somebody asked for the result and got it."""
        return self._was_told

    def done(self) -> bool:
        """Return whether the save has ended, well or not."""
        return self._done.is_set()

    def staged(self, timeout_s: float | None = None) -> None:
        """Return once the trainer may change weights and states again, in whatever way.

        Steps of a `torch.optim.Optimizer` wait for this by themselves. Call it before anything else changes weights or
        optimizer states: an average of weights, merging an adapter, syncing a reference model, loading a state dict.
        A save that failed counts as staged: there is nothing left to protect.

        Args:
            timeout_s: how long to wait, in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it takes longer.
        """
        began = time.monotonic()
        try:
            if not self._staged.wait(timeout_s):
                raise TimeoutError(f"{self.name} was not staged within {timeout_s} s; it goes on")
            self._when_staged()
        finally:
            self.add_blocked(time.monotonic() - began)

    def result(self, timeout_s: float | None = None) -> SaveResult:
        """Return the evidence of the committed save, once it is.

        Args:
            timeout_s: how long to wait, in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it takes longer; the save goes on.
            TornSnapshotError: weights changed while they were staged; nothing was committed.
            SaveCancelledError: a rank cancelled it; nothing was committed.
            CheckpointError: as `Checkpointer.save` says, for what failed in the background.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"{self.name} was not committed within {timeout_s} s; it goes on")
        self._was_told = True
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None  # noqa: S101 - `finish` gave one
        return self._outcome

    def cancel(self) -> bool:
        """Ask for the save to be given up, on any rank: then nothing is committed, and every `result` says so.

        Returns:
            Whether this rank had not voted for it yet. False: it may still be committed.
        """
        with self._mutex:
            if self._is_voted or self._done.is_set():
                return False
            self._is_cancelled = True
            return True

    # What the engine tells.

    @property
    def is_cancelled(self) -> bool:
        """Whether this rank asked to give it up."""
        return self._is_cancelled

    def give_up(self) -> bool:
        """Cancel it, as somebody who tells why: nobody else need be told how it ends."""
        self._was_told = True
        return self.cancel()

    def vote(self) -> bool:
        """Close the door for `cancel`; return False where it was used before."""
        with self._mutex:
            self._is_voted = not self._is_cancelled
            return self._is_voted

    def add_blocked(self, seconds: float) -> None:
        """Count time for which the trainer was blocked."""
        with self._mutex:
            self._blocked_s += seconds

    def finish_staging(self, when_staged: Callable[[], None] = lambda: None) -> None:
        """Let the trainer go on.

        Args:
            when_staged: called by who waits, before it goes on (waits for copies that a GPU still makes).
        """
        self._when_staged = when_staged
        self._staged.set()

    def finish(self, outcome: SaveResult | BaseException) -> None:
        """Say how it ended."""
        self._outcome = outcome
        self._ended = time.monotonic()
        self._staged.set()
        self._done.set()
