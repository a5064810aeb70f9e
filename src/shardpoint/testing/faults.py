"""How a store fails, or its process dies, at a chosen operation."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from shardpoint.errors import StorageError
from shardpoint.storage import DirectoryEntry, Lock, Reader, SharedFiles, Store, SyncPoint, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

Action = Literal["kill", "raise", "call"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        op: `"make_directory"`, `"create_file"`, `"open_writer"`, `"open_reader"`, `"write"`, `"read"`, `"sync"`,
            `"close"`, `"write_document"`, `"sync_directory"`, `"sync_file"`, `"rename"`, `"exchange"`,
            `"replace_file"`, `"remove_tree"`, `"remove_directory"`, `"lock"`, or `"*"` for any of them.
        path: a pattern (as `fnmatch`) of the key; of a rename's source.
        nth: which of the matching operations, from 1. It does not happen: the fault comes first.
        action: `"kill"` ends the process with SIGKILL; `"raise"` raises a `StorageError`; `"call"` runs `then` and
            goes on.
        errno: of the error that is raised.
        then: for `"call"`.
    """

    op: str
    path: str = "*"
    nth: int = 1
    action: Action = "raise"
    errno: int = errno.EIO
    then: Callable[[], object] | None = None


class FaultyStore:
    """A store that works like another, but for its faults.

    Args:
        inner: the store that does the work.
        faults: each fires once.

    Attributes:
        log: every operation so far, as (op, key).
    """

    def __init__(self, inner: Store, faults: Sequence[Fault] = ()) -> None:
        self._inner = inner
        self._faults = list(faults)
        self._seen = [0] * len(self._faults)
        self._mutex = threading.Lock()
        self.log: list[tuple[str, str]] = []

    def _before(self, op: str, key: str) -> None:
        with self._mutex:
            self.log.append((op, key))
            firing: list[Fault] = []
            for index, fault in enumerate(self._faults):
                if fault.op in (op, "*") and fnmatchcase(key, fault.path):
                    self._seen[index] += 1
                    if self._seen[index] == fault.nth:
                        firing.append(fault)
        for fault in firing:
            if fault.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.action == "call" and fault.then is not None:
                fault.then()
            if fault.action == "raise":
                text = f"{op} of {key} in {self.location} failed: {os.strerror(fault.errno)} (injected)"
                raise StorageError(text, key=key, op=op, retryable=False, errno=fault.errno)

    @property
    def location(self) -> str:
        """The inner store's root."""
        return self._inner.location

    @property
    def shared_files(self) -> SharedFiles:
        """As the inner store."""
        return self._inner.shared_files

    def local_path(self, key: str) -> str:
        """As the inner store."""
        return self._inner.local_path(key)

    def make_root(self) -> None:
        """As the inner store."""
        self._inner.make_root()

    def make_directory(self, key: str) -> None:
        """As the inner store."""
        self._before("make_directory", key)
        self._inner.make_directory(key)

    def entries(self, key: str) -> list[DirectoryEntry]:
        """As the inner store."""
        return self._inner.entries(key)

    def exists(self, key: str) -> bool:
        """As the inner store."""
        return self._inner.exists(key)

    def size_bytes(self, key: str) -> int:
        """As the inner store."""
        return self._inner.size_bytes(key)

    def create_file(self, key: str, num_bytes: int) -> str | None:
        """As the inner store."""
        self._before("create_file", key)
        return self._inner.create_file(key, num_bytes)

    def open_writer(self, key: str) -> Writer:
        """As the inner store."""
        self._before("open_writer", key)
        return _FaultyWriter(self._inner.open_writer(key), key, self._before)

    def open_reader(self, key: str) -> Reader:
        """As the inner store."""
        self._before("open_reader", key)
        return _FaultyReader(self._inner.open_reader(key), key, self._before)

    def read_bytes(self, key: str) -> bytes:
        """As the inner store."""
        self._before("read", key)
        return self._inner.read_bytes(key)

    def write_document(self, key: str, data: bytes, point: SyncPoint) -> None:
        """As the inner store."""
        self._before("write_document", key)
        self._inner.write_document(key, data, point)

    def sync_file(self, key: str, point: SyncPoint) -> None:
        """As the inner store."""
        self._before("sync_file", key)
        self._inner.sync_file(key, point)

    def sync_directory(self, key: str, point: SyncPoint) -> None:
        """As the inner store."""
        self._before("sync_directory", key)
        self._inner.sync_directory(key, point)

    def rename(self, source: str, target: str) -> None:
        """As the inner store."""
        self._before("rename", source)
        self._inner.rename(source, target)

    def exchange(self, first: str, second: str) -> bool:
        """As the inner store."""
        self._before("exchange", first)
        return self._inner.exchange(first, second)

    def replace_file(self, source: str, target: str) -> None:
        """As the inner store."""
        self._before("replace_file", source)
        self._inner.replace_file(source, target)

    def remove_tree(self, key: str, *, first: str | None = None) -> None:
        """As the inner store."""
        self._before("remove_tree", key)
        self._inner.remove_tree(key, first=first)

    def remove_directory(self, key: str) -> None:
        """As the inner store."""
        self._before("remove_directory", key)
        self._inner.remove_directory(key)

    def lock(self, key: str) -> Lock | None:
        """As the inner store."""
        self._before("lock", key)
        return self._inner.lock(key)


class _FaultyWriter:
    def __init__(self, inner: Writer, key: str, before: Callable[[str, str], None]) -> None:
        self._inner, self._key, self._before = inner, key, before

    @property
    def note(self) -> str | None:
        return self._inner.note

    def write_at(self, data: Buffer, byte_offset: int) -> None:
        self._before("write", self._key)
        self._inner.write_at(data, byte_offset)

    def sync(self, point: SyncPoint) -> None:
        self._before("sync", self._key)
        self._inner.sync(point)

    def close(self) -> None:
        self._before("close", self._key)
        self._inner.close()


class _FaultyReader:
    def __init__(self, inner: Reader, key: str, before: Callable[[str, str], None]) -> None:
        self._inner, self._key, self._before = inner, key, before

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def read_into(self, target: memoryview, byte_offset: int) -> None:
        self._before("read", self._key)
        self._inner.read_into(target, byte_offset)

    def read_vectors(self, targets: Sequence[memoryview], byte_offset: int) -> None:
        self._before("read", self._key)
        self._inner.read_vectors(targets, byte_offset)

    def read_uncached(self, scratch: memoryview, byte_offset: int, num_bytes: int) -> memoryview | None:
        self._before("read", self._key)
        return self._inner.read_uncached(scratch, byte_offset, num_bytes)

    def close(self) -> None:
        self._inner.close()
