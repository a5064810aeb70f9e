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
    """Notes the first of some signals, instead of dying of it.

    Args:
        signals: which.
        clock: the time in seconds, monotonic.
    """

    def __init__(self, signals: Iterable[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._signals = tuple(signals)
        self._clock = clock
        self._previous: dict[int, Any] = {}
        self._first: tuple[int, float] | None = None
        self._process_id = os.getpid()
        self._closed = False

    @property
    def first(self) -> tuple[int, float] | None:
        """The first signal that came, and when; None while none came."""
        return self._first

    def open(self) -> None:
        """Install the handlers.

        Raises:
            UsageError: this is not the main thread, or a handler is there that is not Python's.
        """
        if threading.current_thread() is not threading.main_thread():
            text = (
                "OnPreemption needs handlers of signals, and Python installs those in the main thread only: make the "
                "Checkpointer there, or leave OnPreemption out"
            )
            raise UsageError(text)
        handlers = {number: signal.getsignal(number) for number in self._signals}
        foreign = [signal.Signals(number).name for number, handler in handlers.items() if handler is None]
        if foreign:
            text = f"{', '.join(foreign)} has a handler that is not Python's, and could not be put back: leave it out"
            raise UsageError(f"OnPreemption(signals=...): {text}")
        for number, handler in handlers.items():
            self._previous[number] = handler
            signal.signal(number, self._handle)

    def close(self) -> None:
        """Put back the handlers that were there before; a second call does nothing.

        One that was installed since stays. Elsewhere than in the main thread nothing can be put back: then a signal
        does from now on what it would have done.
        """
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        # Race: forked processes inherit handlers, and who forked them waits for them to die of a SIGTERM.
        if self._closed or os.getpid() != self._process_id:
            _do(number, frame, previous)
            return
        if self._first is None:
            self._first = number, self._clock()
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)


def _do(number: int, frame: FrameType | None, handler: Any) -> None:
    """Do what a signal would have done without the watch."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
