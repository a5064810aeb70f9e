"""Where staging memory comes from, and how much of it there is.

Buffers are private anonymous memory in huge pages where the kernel gives them, faulted in once, and used again by every
save: memory that is touched for the first time takes many times longer to fill. They start on a page, so that what is
staged at the right place in them can be written past the page cache. A forked child (a DataLoader's worker) does not
get them: `O_DIRECT` from private memory that a fork is just sharing is not allowed (open(2)).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from shardpoint.errors import UsageError
from shardpoint.storage import syscalls

HUGE_PAGE_BYTES = 2 * 2**20
MIN_BUFFER_BYTES = 2**20

OnAllocate = Callable[[int, int], Callable[[], None] | None]
"""Called with the address and size of a new buffer; what it returns is called before the buffer is unmapped."""


class Buffer:
    """Page-aligned memory of a fixed size.

    Args:
        num_bytes: its size.
        on_allocate: prepares it for a device (pins it).

    Attributes:
        address: where it starts.
        array: uint8 `[num_bytes]`.

    Raises:
        OSError: there is no memory.
    """

    def __init__(self, num_bytes: int, on_allocate: OnAllocate | None = None) -> None:
        self._mapped_bytes = num_bytes + HUGE_PAGE_BYTES
        self._mapped = syscalls.map_pages(self._mapped_bytes)
        self._process_id = os.getpid()
        self.address = -(-self._mapped // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        for advice in (syscalls.MADV_HUGEPAGE, syscalls.MADV_DONTFORK, syscalls.MADV_POPULATE_WRITE):
            with suppress(OSError):  # advice: an older kernel refuses some of it, and the memory works all the same
                syscalls.advise_pages(self.address, num_bytes, advice)
        memory = (ctypes.c_char * num_bytes).from_address(self.address)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memoryview(memory).cast("B"), dtype=np.uint8)
        self._undo = on_allocate(self.address, num_bytes) if on_allocate is not None else None

    def close(self) -> None:
        """Give the memory back; nothing may use it any more. A second call does nothing."""
        mapped, self._mapped = self._mapped, 0
        if not mapped or os.getpid() != self._process_id:  # a forked child never had it
            return
        if self._undo is not None:
            self._undo()
        syscalls.unmap_pages(mapped, self._mapped_bytes)


class BufferPool:
    """At most so many bytes of buffers, made when they are first needed, and used again.

    Args:
        budget_bytes: how much memory the buffers may take together; None sets no bound.
        buffer_bytes: the size of each buffer; made smaller where the budget would not hold four.
        on_allocate: prepares a new buffer for a device.

    Raises:
        UsageError: the budget does not hold two buffers of 1 MiB.
    """

    def __init__(
        self, budget_bytes: int | None, buffer_bytes: int = 16 * 2**20, on_allocate: OnAllocate | None = None
    ) -> None:
        if budget_bytes is not None:
            buffer_bytes = (
                min(buffer_bytes, budget_bytes // 4 // MIN_BUFFER_BYTES * MIN_BUFFER_BYTES) or MIN_BUFFER_BYTES
            )
            if budget_bytes < 2 * buffer_bytes:
                text = f"budget_bytes must hold two buffers of 1 MiB at least, got {budget_bytes}"
                raise UsageError(text)
        self.buffer_bytes = buffer_bytes
        self._max_buffers = None if budget_bytes is None else budget_bytes // buffer_bytes
        self._on_allocate = on_allocate
        self._free: list[Buffer] = []
        self._num_buffers = 0
        self._num_waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """The memory that the pool holds now."""
        return self._num_buffers * self.buffer_bytes

    def acquire(self, *, give_up: Callable[[], bool] = lambda: False, beyond_budget: bool = False) -> Buffer | None:
        """Return a buffer that nobody else uses, once there is one.

        Args:
            give_up: asked before waiting, whenever something changes, and each 0.2 s; True has None returned.
            beyond_budget: do not wait: for who may hold up those that would give buffers back.

        Raises:
            OSError: there is no memory for a new one.
        """
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                while not self._free:
                    if self._closed:
                        return None
                    if beyond_budget or self._max_buffers is None or self._num_buffers < self._max_buffers:
                        self._num_buffers += 1
                        break
                    if give_up():
                        return None
                    self._changed.wait(0.2)
                else:
                    return self._free.pop()
            finally:
                self._num_waiting -= 1
        try:
            return Buffer(self.buffer_bytes, self._on_allocate)
        except BaseException:
            with self._changed:
                self._num_buffers -= 1
                self._changed.notify_all()
            raise

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back."""
        with self._changed:
            if self._closed or (self._max_buffers is not None and self._num_buffers > self._max_buffers):
                buffer.close()
                self._num_buffers -= 1
            else:
                self._free.append(buffer)
            self._changed.notify_all()

    def wake(self) -> None:
        """Have everybody who waits look again whether to give up."""
        with self._changed:
            self._changed.notify_all()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready`, or once somebody waits for a buffer: then buffers must be emptied."""
        with self._changed:
            while not ready() and not self._num_waiting and not self._closed:
                self._changed.wait(0.2)

    def close(self) -> None:
        """Give all memory back; buffers that are in use go when they are released."""
        with self._changed:
            self._closed = True
            for buffer in self._free:
                buffer.close()
            self._num_buffers -= len(self._free)
            self._free.clear()
            self._changed.notify_all()
