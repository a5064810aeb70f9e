"""How a store works on a POSIX filesystem: where OSError ends and our errors begin, and the only site of fsync."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UsageError,
)
from shardpoint.storage import syscalls
from shardpoint.storage.mounts import hosts_share_files
from shardpoint.storage.protocol import DirectoryEntry, SharedFiles, SyncPoint

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAX_VECTORS = 1024  # IOV_MAX on Linux
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
def _translated(
    op: str,
    key: str,
    location: str,
    *,
    retryable: bool = True,
    missing: frozenset[int] = _NOT_FOUND,
    exists: frozenset[int] = _EXISTS,
) -> Iterator[None]:
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


def _sync_descriptor(descriptor: int, key: str, location: str, point: SyncPoint) -> None:
    """Fsync one descriptor.

    Durability: the only fsync in the library; a failed one is final, since a second could report success for lost data.
    """
    with _translated(f"fsync ({point})", key, location, retryable=False, missing=frozenset()):
        os.fsync(descriptor)


class LocalWriter:
    """One file open for writing at offsets."""

    def __init__(self, path: str, key: str, location: str) -> None:
        self._key = key
        self._location = location
        with _translated("open for writing", key, location):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write_at(self, data: Buffer, byte_offset: int) -> None:
        """Write all of `data`, going on after a short write."""
        view = memoryview(data).cast("B")
        with _translated("pwrite", self._key, self._location):
            while view:
                written = os.pwrite(self._descriptor, view, byte_offset)
                if written == 0:
                    raise OSError(errno.EIO, "the write made no progress")
                view = view[written:]
                byte_offset += written

    def sync(self, point: SyncPoint) -> None:
        """Make durable what was written through this descriptor, and check that the file still has a name."""
        _sync_descriptor(self._descriptor, self._key, self._location, point)
        with _translated("fstat", self._key, self._location):
            num_names = os.fstat(self._descriptor).st_nlink
        if num_names == 0:
            text = f"{self._key} in {self._location} was deleted while it was written"
            raise StorageError(text, key=self._key, op="fsync", retryable=False)

    def close(self) -> None:
        """Close, reporting an error that only closing shows (NFS)."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with _translated("close", self._key, self._location, retryable=False):
                os.close(descriptor)


class LocalReader:
    """One file open for reading at offsets."""

    def __init__(self, path: str, key: str, location: str) -> None:
        self._key = key
        self._location = location
        with _translated("open for reading", key, location):
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
        with _translated("preadv", self._key, self._location):
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

    def close(self) -> None:
        """Close."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_held_locks: set[tuple[int, int, int]] = set()
_held_locks_mutex = threading.Lock()


class LocalLock:
    """A POSIX record lock (lockf): freed at once when the process dies, and, unlike flock, not inherited by fork."""

    def __init__(self, descriptor: int, identity: tuple[int, int, int]) -> None:
        self._descriptor = descriptor
        self._identity = identity

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        with _held_locks_mutex:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0 and self._identity in _held_locks:
                _held_locks.discard(self._identity)
                os.close(descriptor)


class LocalStore:
    """A directory on a POSIX filesystem.

    Args:
        root: the directory; it need not exist yet.
        shared_files: whether several writers may write one file at once; None finds out: on NFS, SMB and FUSE only
            those of one host may. False assigns each file to one rank, which costs time and gives the same bytes.

    Raises:
        UsageError: `root` is a file.
    """

    def __init__(self, root: str | os.PathLike[str], *, shared_files: bool | None = None) -> None:
        self._shared_files = shared_files
        self._root = os.path.abspath(os.fspath(root))
        if os.path.lexists(self._root) and not os.path.isdir(self._root):
            text = f"{self._root} is a file: give a directory to hold checkpoints"
            raise UsageError(text)

    @property
    def location(self) -> str:
        """The root's absolute path."""
        return self._root

    @property
    def shared_files(self) -> SharedFiles:
        """Whose writers may write one file at once."""
        if self._shared_files is None:
            return "any" if hosts_share_files(self._root) else "one_host"
        return "any" if self._shared_files else "never"

    def local_path(self, key: str) -> str:
        """Return the path of a key."""
        if key and ("\0" in key or any(part in ("", ".", "..") for part in key.split("/"))):
            text = f"the key {key!r} is not a plain relative path"
            raise UsageError(text)
        return f"{self._root}/{key}" if key else self._root

    def make_root(self) -> None:
        """Make the root with its parents, and fsync each directory that gained a name."""
        missing: list[Path] = []
        path = Path(self._root)
        while not os.path.lexists(path):
            missing.append(path)
            path = path.parent
        if not os.path.isdir(path):
            text = f"{path} is a file, so {self._root} cannot be a directory: give another"
            raise UsageError(text)
        for directory in reversed(missing):
            with _translated("mkdir", str(directory), self._root), suppress(FileExistsError):
                directory.mkdir()
            self._sync_path(str(directory.parent), str(directory.parent), SyncPoint.PARENT)

    def make_directory(self, key: str) -> None:
        """Make one directory."""
        with _translated("mkdir", key, self._root):
            Path(self.local_path(key)).mkdir()

    def entries(self, key: str) -> list[DirectoryEntry]:
        """List a directory, sorted by name."""
        with _translated("list", key, self._root), os.scandir(self.local_path(key)) as scan:
            return sorted((DirectoryEntry(item.name, item.is_dir()) for item in scan), key=lambda entry: entry.name)

    def exists(self, key: str) -> bool:
        """Return whether anything is at the key."""
        try:
            with _translated("stat", key, self._root):
                os.lstat(self.local_path(key))
        except NotFoundError:
            return False
        return True

    def size_bytes(self, key: str) -> int:
        """Return a file's size."""
        with _translated("stat", key, self._root):
            return Path(self.local_path(key)).stat().st_size

    def create_file(self, key: str, num_bytes: int) -> str | None:
        """Make a file with its space reserved, so that a full disk fails here and two writers do not serialize."""
        note = None
        with _translated("create", key, self._root):
            descriptor = os.open(self.local_path(key), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                if num_bytes:
                    try:
                        syscalls.fallocate(descriptor, num_bytes)
                    except OSError as error:
                        if error.errno not in syscalls.UNSUPPORTED:
                            raise
                        os.ftruncate(descriptor, num_bytes)
                        note = "the filesystem has no fallocate: files were sized, their space was not reserved"
            finally:
                os.close(descriptor)
        return note

    def open_writer(self, key: str) -> LocalWriter:
        """Open a file that is there."""
        return LocalWriter(self.local_path(key), key, self._root)

    def open_reader(self, key: str) -> LocalReader:
        """Open a file for reading only."""
        return LocalReader(self.local_path(key), key, self._root)

    def read_bytes(self, key: str) -> bytes:
        """Return a whole file."""
        with _translated("read", key, self._root):
            return Path(self.local_path(key)).read_bytes()

    def write_document(self, key: str, data: bytes, point: SyncPoint) -> None:
        """Make a file holding `data`, its contents durable."""
        with _translated("create", key, self._root):
            os.close(os.open(self.local_path(key), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        writer = self.open_writer(key)
        try:
            writer.write_at(data, 0)
            writer.sync(point)
        finally:
            writer.close()

    def sync_file(self, key: str, point: SyncPoint) -> None:
        """Make durable a file that another library wrote in this process."""
        self._sync_path(self.local_path(key), key, point)

    def sync_directory(self, key: str, point: SyncPoint) -> None:
        """Make the names in a directory durable."""
        self._sync_path(self.local_path(key), key, point)

    def _sync_path(self, path: str, key: str, point: SyncPoint) -> None:
        with _translated("open", key, self._root):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _sync_descriptor(descriptor, key, self._root, point)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Move to a free name, atomically."""
        with _translated(f"rename to {target}", source, self._root):
            try:
                syscalls.renameat2(self.local_path(source), self.local_path(target), syscalls.RENAME_NOREPLACE)
            except OSError as error:
                if error.errno not in syscalls.UNSUPPORTED:
                    raise
                # Race: none that matters. Only the root's owner renames into it, and every other rename is fenced.
                if os.path.lexists(self.local_path(target)):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
                os.rename(self.local_path(source), self.local_path(target))

    def exchange(self, first: str, second: str) -> bool:
        """Swap two names atomically, or return False where the filesystem cannot."""
        with _translated(f"exchange with {second}", first, self._root):
            try:
                syscalls.renameat2(self.local_path(first), self.local_path(second), syscalls.RENAME_EXCHANGE)
            except OSError as error:
                if error.errno in syscalls.UNSUPPORTED or error.errno == errno.EXDEV:
                    return False
                raise
        return True

    def replace_file(self, source: str, target: str) -> None:
        """Move a file over another, atomically."""
        with _translated(f"rename over {target}", source, self._root):
            Path(self.local_path(source)).replace(self.local_path(target))

    def remove_tree(self, key: str, *, first: str | None = None) -> None:
        """Delete a file or a directory with all that is in it."""
        path = Path(self.local_path(key))
        with _translated("delete", key, self._root, exists=frozenset()):
            if not path.is_dir() or path.is_symlink():
                path.unlink()
                return
            if first is not None:
                (path / first).unlink(missing_ok=True)
            shutil.rmtree(path)

    def remove_directory(self, key: str) -> None:
        """Delete an empty directory; one that is not empty stays."""
        with _translated("rmdir", key, self._root):
            os.rmdir(self.local_path(key))

    def lock(self, key: str) -> LocalLock | None:
        """Take a file's lock, or return None where a living process (this one included) holds it.

        Race: closing *any* descriptor of the file would free the lock, so a file that this process holds is never
        opened again: its identity is looked up first, under one mutex.
        """
        path = self.local_path(key)
        with _held_locks_mutex, _translated("lock", key, self._root):
            if os.path.lexists(path):
                status = os.stat(path)
                if (os.getpid(), status.st_dev, status.st_ino) in _held_locks:
                    return None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise
            status = os.fstat(descriptor)
            identity = (os.getpid(), status.st_dev, status.st_ino)
            _held_locks.add(identity)
            return LocalLock(descriptor, identity)
