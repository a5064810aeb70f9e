"""How a file is written at offsets: past the page cache where whole blocks allow it; OSError becomes our errors here.

A block of G bytes (4096, the page size, or what the filesystem asks for, whichever is greatest) that lies wholly inside
what one call writes goes out with `O_DIRECT`; the bytes before the first such block and after the last one are written
through a second, buffered descriptor. A block is never read, changed and written back: two writers that share a block
each write their own bytes of it, buffered, and neither touches the other's.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardpoint.errors import AlreadyExistsError, CheckpointError, NotFoundError, StorageError
from shardpoint.storage import syscalls
from shardpoint.storage.protocol import SyncPoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 4096
REFUSED_NOTE = "the filesystem refuses O_DIRECT: files were written through the page cache"

REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
_NOT_FOUND = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})
_EXISTS = frozenset({errno.EEXIST, errno.ENOTEMPTY})
_ADVICE = {
    errno.ENOSPC: "free space on the filesystem, or prune checkpoints",
    errno.EDQUOT: "the quota is used up: free space, or have it raised",
    errno.EROFS: "the filesystem is mounted read-only",
    errno.EACCES: "check the permissions of the directory",
    errno.EPERM: "check the permissions of the directory",
    errno.ENOLCK: "the filesystem has no locks: mount it with them (NFS: run the lock service)",
    errno.ENOSYS: "the filesystem lacks this call (locks on Lustre: mount with -o flock)",
    errno.ENOTEMPTY: "something else writes into it at the same time",
    errno.EIO: "the device or the file server reports an I/O error: check it before saving again",
}


@contextmanager
def translated(
    op: str,
    key: str,
    location: str,
    *,
    retryable: bool = True,
    missing: frozenset[int] = _NOT_FOUND,
    exists: frozenset[int] = _EXISTS,
) -> Iterator[None]:
    """Turn an OSError of the system into ours.

    Args:
        op: what is done, for the message.
        key: to what.
        location: in which root.
        retryable: whether trying again may help.
        missing: the errnos that mean that the key is not there.
        exists: the errnos that mean that something is there already.

    Raises:
        NotFoundError: the key is not there.
        AlreadyExistsError: something is there already.
        StorageError: anything else.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        where = f"{key or '.'} in {location}"
        if error.errno in missing:
            text = f"{op}: {where} does not exist"
            raise NotFoundError(text) from error
        if error.errno in exists:
            text = f"{op}: {where} is already there"
            raise AlreadyExistsError(text) from error
        advice = _ADVICE.get(error.errno or 0)
        text = f"{op} of {where} failed: {error.strerror}" + (f" ({advice})" if advice else "")
        raise StorageError(text, key=key, op=op, retryable=retryable, errno=error.errno) from error


def sync_descriptor(descriptor: int, key: str, location: str, point: SyncPoint) -> None:
    """Fsync one descriptor.

    Durability: the only fsync in the library; a failed one is final, since a second could report success for lost data.
    """
    with translated(f"fsync ({point})", key, location, retryable=False, missing=frozenset()):
        os.fsync(descriptor)


class LocalWriter:
    """One file open for writing at offsets.

    Args:
        path: the file.
        key: its key, for errors.
        location: its root, for errors.
        direct: whether whole blocks may bypass the page cache.
    """

    def __init__(self, path: str, key: str, location: str, *, direct: bool = True) -> None:
        self._path = path
        self._key = key
        self._location = location
        self._wants_direct = direct
        self._mutex = threading.Lock()
        self._direct_descriptor = -1
        self._block_bytes = 0
        self._memory_alignment = 0
        self._note: str | None = None
        with translated("open for writing", key, location):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    @property
    def note(self) -> str | None:
        """What a person should know of how it was written: that the filesystem refused `O_DIRECT`."""
        return self._note

    def write_at(self, data: Buffer, byte_offset: int) -> None:
        """Write all of `data`, going on after a short write.

        Whole blocks go past the page cache where the memory and the offset are aligned alike.
        """
        view = memoryview(data).cast("B")
        with translated("pwrite", self._key, self._location):
            low, high = self._direct_range(view, byte_offset)
            if low < high and not self._write_direct(view[low:high], byte_offset + low):
                low = high = 0
            self._write_buffered(view[:low], byte_offset)
            self._write_buffered(view[high:], byte_offset + high)

    def _direct_range(self, view: memoryview, byte_offset: int) -> tuple[int, int]:
        """Return which bytes of `view` are whole blocks that can bypass the page cache; an empty range at 0 if none."""
        if not self._wants_direct or view.readonly or len(view) < BLOCK_BYTES or not self._open_direct():
            return 0, 0
        low = -byte_offset % self._block_bytes
        high = len(view) - (byte_offset + len(view)) % self._block_bytes
        if low >= high:
            return 0, 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(view)) + low
        return (0, 0) if address % self._memory_alignment else (low, high)

    def _open_direct(self) -> bool:
        with self._mutex:
            if self._direct_descriptor < 0 and self._note is None:
                try:
                    self._direct_descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in REFUSALS:
                        raise
                    self._note = REFUSED_NOTE
                else:
                    memory, offset = _direct_alignment(self._direct_descriptor)
                    self._block_bytes = max(BLOCK_BYTES, mmap.PAGESIZE, offset)
                    self._memory_alignment = max(BLOCK_BYTES, memory)
            return self._note is None

    def _write_direct(self, view: memoryview, byte_offset: int) -> bool:
        """Write whole blocks; return False, where the system refuses, to have all of them written otherwise."""
        while view:
            try:
                written = os.pwrite(self._direct_descriptor, view, byte_offset)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                self._note = REFUSED_NOTE
                return False
            # After a short write the block that it ended in is written again, whole.
            written -= written % self._block_bytes
            if written == 0:
                raise OSError(errno.EIO, "the write made no progress")
            view = view[written:]
            byte_offset += written
        return True

    def _write_buffered(self, view: memoryview, byte_offset: int) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, byte_offset)
            if written == 0:
                raise OSError(errno.EIO, "the write made no progress")
            view = view[written:]
            byte_offset += written

    def sync(self, point: SyncPoint) -> None:
        """Make durable what was written through this writer, and check that the file still has a name."""
        sync_descriptor(self._descriptor, self._key, self._location, point)
        if self._direct_descriptor >= 0:
            # Durability: an error of writing back is reported once to each descriptor that was open, so to this too.
            sync_descriptor(self._direct_descriptor, self._key, self._location, point)
        with translated("fstat", self._key, self._location):
            num_names = os.fstat(self._descriptor).st_nlink
        if num_names == 0:
            text = f"{self._key} in {self._location} was deleted while it was written"
            raise StorageError(text, key=self._key, op="fsync", retryable=False)

    def close(self) -> None:
        """Close, reporting an error that only closing shows (NFS)."""
        descriptors = [self._descriptor, self._direct_descriptor]
        self._descriptor = self._direct_descriptor = -1
        failed: OSError | None = None
        for descriptor in descriptors:
            try:
                if descriptor >= 0:
                    os.close(descriptor)
            except OSError as error:
                failed = failed or error
        with translated("close", self._key, self._location, retryable=False):
            if failed is not None:
                raise failed


def _direct_alignment(descriptor: int) -> tuple[int, int]:
    """Return what the filesystem asks of memory and of offsets; 0 where it does not tell.

    A write that is not aligned enough is refused, and written through the page cache then.
    """
    try:
        return syscalls.direct_alignment(descriptor)
    except OSError:
        return 0, 0
