"""How a file is read at offsets: through the page cache, or past it where that holds none of the bytes.

Bytes that only one rank wants gain nothing from the page cache: the kernel would make its pages and copy out of them on
the cores that check the bytes. Past it the device writes straight into the reader's memory. Whether bytes are cached is
asked by mincore(2) of a mapping that nothing ever touches, so that asking fetches nothing.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np

from shardpoint.errors import TruncatedError
from shardpoint.storage import syscalls
from shardpoint.storage.writer import BLOCK_BYTES, REFUSALS, translated

_MAX_VECTORS = 1024  # IOV_MAX on Linux


class LocalReader:
    """One file open for reading at offsets.

    Args:
        path: the file.
        key: its key, for errors.
        location: its root, for errors.
        direct: whether what is not cached may be read past the page cache.
    """

    def __init__(self, path: str, key: str, location: str, *, direct: bool = True) -> None:
        self._path = path
        self._key = key
        self._location = location
        self._may_direct = direct
        self._mutex = threading.Lock()
        self._direct_descriptor = -1
        self._block_bytes = 0
        self._pages: mmap.mmap | None = None
        with translated("open for reading", key, location):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._size_bytes = os.fstat(self._descriptor).st_size

    @property
    def size_bytes(self) -> int:
        """The size when it was opened."""
        return self._size_bytes

    def read_into(self, target: memoryview, byte_offset: int) -> None:
        """Fill all of `target`, going on after a short read."""
        self.read_vectors([target], byte_offset)

    def read_vectors(self, targets: Sequence[memoryview], byte_offset: int) -> None:
        """Fill all targets in turn, by as few preadv calls as there can be, going on after a short read."""
        views = [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in targets]
        first = 0
        with translated("preadv", self._key, self._location):
            while first < len(views):
                batch = views[first : first + _MAX_VECTORS]
                missing = sum(map(len, batch))
                got = os.preadv(self._descriptor, batch, byte_offset) if missing else 0
                byte_offset += got
                if got == missing:
                    first += len(batch)
                    continue
                if got == 0:
                    missing += sum(map(len, views[first + len(batch) :]))
                    text = f"{self._key} in {self._location} ends at byte {byte_offset}, {missing} bytes early"
                    raise TruncatedError(
                        text, key=self._key, expected=str(byte_offset + missing), actual=str(byte_offset)
                    )
                while got >= len(views[first]):
                    got -= len(views[first])
                    first += 1
                views[first] = views[first][got:]

    def read_uncached(self, scratch: memoryview, byte_offset: int, num_bytes: int) -> memoryview | None:
        """Read past the page cache what is mostly not in it; None where it is, or where that cannot be."""
        if not self._open_direct():
            return None
        low = byte_offset - byte_offset % self._block_bytes
        high = min(byte_offset + num_bytes, self._size_bytes)
        high += -high % self._block_bytes
        if not 0 < high - low <= len(scratch) or self._is_cached(low, high):
            return None
        wanted = scratch[byte_offset - low : byte_offset - low + num_bytes]
        position = low
        with translated("read past the page cache", self._key, self._location):
            while position < byte_offset + num_bytes:
                try:
                    got = os.preadv(self._direct_descriptor, [scratch[position - low : high - low]], position)
                except OSError as error:
                    if error.errno not in REFUSALS:
                        raise
                    self._may_direct = False
                    return None
                if position + got >= byte_offset + num_bytes:
                    break
                # After a short read the block that it ended in is read again, whole; at the end there is none.
                got -= got % self._block_bytes
                if got == 0:
                    return None  # the plain read says what is missing
                position += got
        return wanted

    def _open_direct(self) -> bool:
        """Open the file a second time, for reads past the page cache; return whether that could be."""
        with self._mutex:
            if self._may_direct and self._direct_descriptor < 0:
                self._may_direct = False
                try:
                    self._pages = mmap.mmap(self._descriptor, self._size_bytes, access=mmap.ACCESS_READ)
                    self._address = np.frombuffer(self._pages, dtype=np.uint8).ctypes.data
                    self._direct_descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                    # Race: the name may lead to another file by now.
                    if not os.path.sameopenfile(self._descriptor, self._direct_descriptor):
                        return False
                    memory, offset = syscalls.direct_alignment(self._direct_descriptor)
                except (OSError, ValueError):  # an empty file cannot be mapped
                    return False
                self._block_bytes = max(BLOCK_BYTES, mmap.PAGESIZE, offset)
                self._may_direct = memory <= mmap.PAGESIZE
            return self._may_direct

    def _is_cached(self, low: int, high: int) -> bool:
        """Say whether the page cache has at least half of a range."""
        resident = syscalls.resident_pages(self._address + low, min(high, self._size_bytes) - low)
        return resident is None or 2 * resident * mmap.PAGESIZE >= high - low

    def close(self) -> None:
        """Close."""
        descriptors = (self._descriptor, self._direct_descriptor)
        self._descriptor = self._direct_descriptor = -1
        self._may_direct = False
        self._pages = None
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)
