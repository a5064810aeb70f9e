"""Who talks to a c10d store: one daemon thread for each comm, so that no caller hangs in the store with it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from shardpoint.errors import DistributedError

_SLICE_S = 0.5
_JOIN_S = 1.0

T = TypeVar("T")


class StoreClient(Protocol):
    """What is asked of a c10d store (its own annotations say `str` where it takes bytes)."""

    def set(self, key: str, value: bytes) -> None:
        """Put a value under a key."""
        ...

    def get(self, key: str) -> bytes:
        """Return the value under a key, once there is one."""
        ...

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values under keys, once all are there."""
        ...

    def add(self, key: str, value: int) -> int:
        """Add to a number, and return the sum."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        ...

    def delete_key(self, key: str) -> bool:
        """Remove a key; return whether it was there."""
        ...


class _Call:
    """One operation on the store, for the thread that owns the connection."""

    def __init__(self, operation: Callable[[StoreClient], Any]) -> None:
        self.operation = operation
        self.done = threading.Event()
        self.value: Any = None
        self.error: Exception | None = None


class Line:
    """A connection to a store, owned by one daemon thread that also sends the beats.

    Args:
        connect: makes the connection; runs in the thread.
        beat: sends one beat; runs in the thread, and takes microseconds of it.
        heartbeat_s: seconds between two beats.
        silence_s: seconds after which a call that has not returned is given up, and the line with it.
        name: the thread's name.
    """

    def __init__(
        self,
        connect: Callable[[], StoreClient],
        beat: Callable[[StoreClient], None],
        *,
        heartbeat_s: float,
        silence_s: float,
        name: str,
    ) -> None:
        self._connect = connect
        self._beat = beat
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lost: str | None = None
        self._cause: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        try:
            self.call(lambda _client: None)
        except BaseException:
            self.stop()
            raise

    def call(self, operation: Callable[[StoreClient], T]) -> T:
        """Run an operation and return its result.

        Raises:
            DistributedError: the store is gone, or does not answer; so it will be for every later call.
        """
        call = _Call(operation)
        self._refuse_if_lost()
        self._calls.put(call)
        give_up_at = time.monotonic() + self._silence_s
        while not call.done.wait(min(_SLICE_S, self._silence_s)):
            if time.monotonic() >= give_up_at:
                self._lost = f"the store that carries the votes has not answered for {self._silence_s:.0f} s"
            self._refuse_if_lost()
        if call.error is not None:
            self._refuse_if_lost()
        return cast("T", call.value)

    def post(self, operation: Callable[[StoreClient], Any]) -> None:
        """Have an operation run, without waiting; if it fails the line is lost, as the next call will say."""
        if self._lost is None:
            self._calls.put(_Call(operation))

    def stop(self) -> None:
        """End the thread, after what it was given before; wait for one that hangs in the store a moment only.

        Race: a thread that returns from a native call while the interpreter ends aborts the process ("terminate called
        without an active exception"). It takes a store that hung until then, and answers or dies at just that time.
        """
        self._calls.put(None)
        self._thread.join(_JOIN_S)
        self._lost = self._lost or "the comm was closed"

    def _refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise DistributedError(self._lost) from self._cause

    def _run(self) -> None:
        client: StoreClient | None = None
        beat_at = time.monotonic()
        while True:
            call = self._next_call(beat_at)
            if call is None:
                return
            if call.operation is self._beat:
                beat_at = time.monotonic() + self._heartbeat_s
            try:
                if client is None:
                    client = self._connect()
                    del self._connect  # it may hold the group's own store, which must end when the group does
                call.value = call.operation(client)
            except Exception as error:  # noqa: BLE001 - stores raise RuntimeError, its subclasses, and what they like
                call.error = self._cause = error
                reason = str(error).partition("\n")[0]
                self._lost = self._lost or f"the store that carries the votes is gone: {type(error).__name__}: {reason}"
            call.done.set()

    def _next_call(self, beat_at: float) -> _Call | None:
        """Return the next operation: a beat whenever one is due, however much else is asked for; None to end."""
        if self._lost is not None:
            return self._calls.get()
        wait_s = beat_at - time.monotonic()
        if wait_s <= 0:
            return _Call(self._beat)
        try:
            return self._calls.get(timeout=wait_s)
        except queue.Empty:
            return _Call(self._beat)
