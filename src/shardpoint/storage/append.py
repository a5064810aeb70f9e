"""How one file grows by whole lines: one system call for each, so that a process that dies leaves whole lines."""

from __future__ import annotations

import os

from shardpoint.errors import StorageError
from shardpoint.storage.protocol import Store, SyncPoint
from shardpoint.storage.writer import translated


class AppendedFile:
    """A file that lines are appended to; made where it is not there.

    Args:
        store: where.
        key: the file; its directory must be there.

    Raises:
        NotFoundError: the directory is not there.
        StorageError: the file cannot be opened.

    Durability:
        What was appended survives the death of the process at once, and power loss once `close` has returned. Whatever
        a power loss, or a full disk, left of a last line is ended by a newline before the next one.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        path = store.local_path(key)
        with translated("append", key, store.location):
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size_bytes = os.fstat(self._descriptor).st_size
            self._ends_torn = size_bytes > 0 and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n"

    def append(self, line: bytes) -> None:
        r"""Append a line.

        Args:
            line: without a newline at its end, and without one in it.

        Raises:
            StorageError: the system refused it, or took a part of it (the disk is full). That part is a torn line.
        """
        data = (b"\n" if self._ends_torn else b"") + line + b"\n"
        with translated("append", self._key, self._store.location):
            written = os.write(self._descriptor, data)
        self._ends_torn = written != len(data)
        if self._ends_torn:
            text = (
                f"append: {self._key} in {self._store.location} took {written} of {len(data)} bytes: free space on the "
                "filesystem"
            )
            raise StorageError(text, key=self._key, op="append", retryable=True)

    def close(self) -> None:
        """Make everything durable, the file's name too, and close; a second call does nothing.

        Raises:
            StorageError: an fsync failed, and what was appended may not survive power loss.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        os.close(descriptor)
        self._store.sync_file(self._key, SyncPoint.DOCUMENT)
        self._store.sync_directory(self._key.rpartition("/")[0], SyncPoint.PARENT)
