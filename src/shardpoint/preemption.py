"""Did a signal come that says that this process will be killed soon, and when?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from shardpoint.errors import UsageError


class SignalWatch:
    """Notes the first of some signals, instead of dying of it. Several may watch for one signal, and end in any order.

    Args:
        signals: which.
        clock: the time in seconds, monotonic.
    """

    def __init__(self, signals: Iterable[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._signals = tuple(signals)
        self._clock = clock
        self._first: tuple[int, float] | None = None

    @property
    def first(self) -> tuple[int, float] | None:
        """The first signal that came, and when; None while none came."""
        return self._first

    def open(self) -> None:
        """Begin: from here on the signals do not end the process.

        A handler in Python that was there before is called too, after the signal was noted, but for Python's own of
        SIGINT.

        Raises:
            UsageError: this is not the main thread, or a handler is there that is not Python's.
        """
        if threading.current_thread() is not threading.main_thread():
            text = (
                "OnPreemption needs handlers of signals, and Python installs those in the main thread only: make the "
                "Checkpointer there, or leave OnPreemption out"
            )
            raise UsageError(text)
        foreign = [signal.Signals(number).name for number in self._signals if signal.getsignal(number) is None]
        if foreign:
            text = f"{', '.join(foreign)} has a handler that is not Python's, and could not be put back: leave it out"
            raise UsageError(f"OnPreemption(signals=...): {text}")
        for number in self._signals:
            _handled.watch(number, self)

    def close(self) -> None:
        """End: the last watch for a signal puts back the handler that was there before. A second call does nothing.

        A handler that was installed since stays. Elsewhere than in the main thread none can be put back: then the
        signal does from now on what it would have done.
        """
        for number in self._signals:
            _handled.forget(number, self)

    def note(self, number: int) -> None:
        """Remember a signal, if it is the first."""
        if self._first is None:
            self._first = number, self._clock()


class _Handled:
    """The signals of this process that are watched for.

    Order: one handler for all watches. Of handlers that call one another, one that is closed could not tell whether to
    do what the signal does by default.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._watches: dict[int, list[SignalWatch]] = {}
        self._process_id = os.getpid()
        self._running: set[int] = set()

    def watch(self, number: int, watch: SignalWatch) -> None:
        if os.getpid() != self._process_id:
            # A forked process inherits the handler, but what the other process watches for is not its business.
            self._process_id = os.getpid()
            self._watches.clear()
        self._watches.setdefault(number, []).append(watch)
        if signal.getsignal(number) != self._handle:
            self._previous[number] = signal.signal(number, self._handle)

    def forget(self, number: int, watch: SignalWatch) -> None:
        watches = self._watches.get(number, [])
        if watch in watches:
            watches.remove(watch)
        is_main = threading.current_thread() is threading.main_thread()
        if not watches and is_main and signal.getsignal(number) == self._handle:
            signal.signal(number, self._previous.pop(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._running:  # called by a handler that was put over this one, and that this one calls
            return
        previous = self._previous.get(number)
        watches = self._watches.get(number, [])
        # Race: who forked a process waits for it to die of a SIGTERM, so there the handler must not count.
        if not watches or os.getpid() != self._process_id:
            _do(number, frame, previous)
            return
        for watch in watches:
            watch.note(number)
        if callable(previous) and previous is not signal.default_int_handler:
            self._running.add(number)
            try:
                previous(number, frame)
            finally:
                self._running.discard(number)


_handled = _Handled()


def _do(number: int, frame: FrameType | None, handler: Any) -> None:
    """Do what a signal would have done if nobody had watched for it."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
