"""How a store works on a POSIX filesystem."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from shardpoint.errors import NotFoundError, UsageError
from shardpoint.storage import syscalls
from shardpoint.storage.mounts import hosts_share_files
from shardpoint.storage.protocol import DirectoryEntry, SharedFiles, SyncPoint
from shardpoint.storage.reader import LocalReader
from shardpoint.storage.writer import LocalWriter, sync_descriptor, translated

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


_NO_LINKS = syscalls.UNSUPPORTED | {errno.EPERM, errno.EXDEV, errno.EMLINK}


class LocalStore:
    """A directory on a POSIX filesystem.

    Args:
        root: the directory; it need not exist yet.
        shared_files: whether several writers may write one file at once; None finds out: on NFS, SMB and FUSE only
            those of one host may. False assigns each file to one rank, which costs time and gives the same bytes.
        direct_io: whether tensor files are written, and read where they are not cached, past the page cache
            (`O_DIRECT`) where the filesystem allows it.

    Raises:
        UsageError: `root` is a file.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, shared_files: bool | None = None, direct_io: bool = True
    ) -> None:
        self._shared_files = shared_files
        self._direct_io = direct_io
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
            with translated("mkdir", str(directory), self._root), suppress(FileExistsError):
                directory.mkdir()
            self._sync_path(str(directory.parent), str(directory.parent), SyncPoint.PARENT)

    def make_directory(self, key: str) -> None:
        """Make one directory."""
        with translated("mkdir", key, self._root):
            Path(self.local_path(key)).mkdir()

    def entries(self, key: str) -> list[DirectoryEntry]:
        """List a directory, sorted by name."""
        with translated("list", key, self._root), os.scandir(self.local_path(key)) as scan:
            return sorted((DirectoryEntry(item.name, item.is_dir()) for item in scan), key=lambda entry: entry.name)

    def exists(self, key: str) -> bool:
        """Return whether anything is at the key."""
        try:
            with translated("stat", key, self._root):
                os.lstat(self.local_path(key))
        except NotFoundError:
            return False
        return True

    def size_bytes(self, key: str) -> int:
        """Return a file's size."""
        with translated("stat", key, self._root):
            return Path(self.local_path(key)).stat().st_size

    def create_file(self, key: str, num_bytes: int) -> str | None:
        """Make a file with its space reserved, so that a full disk fails here and two writers do not serialize."""
        note = None
        with translated("create", key, self._root):
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

    def link(self, source: str, target: str) -> bool:
        """Give a file a second name, or return False where the filesystem cannot."""
        with translated(f"link to {target}", source, self._root):
            try:
                os.link(self.local_path(source), self.local_path(target), follow_symlinks=False)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return False
                raise
        return True

    def open_writer(self, key: str) -> LocalWriter:
        """Open a file that is there."""
        return LocalWriter(self.local_path(key), key, self._root, direct=self._direct_io)

    def open_reader(self, key: str) -> LocalReader:
        """Open a file for reading only."""
        return LocalReader(self.local_path(key), key, self._root, direct=self._direct_io)

    def read_bytes(self, key: str) -> bytes:
        """Return a whole file."""
        with translated("read", key, self._root):
            return Path(self.local_path(key)).read_bytes()

    def write_document(self, key: str, data: bytes, point: SyncPoint) -> None:
        """Make a file holding `data`, its contents durable."""
        with translated("create", key, self._root):
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
        with translated("open", key, self._root):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sync_descriptor(descriptor, key, self._root, point)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Move to a free name, atomically."""
        with translated(f"rename to {target}", source, self._root):
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
        with translated(f"exchange with {second}", first, self._root):
            try:
                syscalls.renameat2(self.local_path(first), self.local_path(second), syscalls.RENAME_EXCHANGE)
            except OSError as error:
                if error.errno in syscalls.UNSUPPORTED or error.errno == errno.EXDEV:
                    return False
                raise
        return True

    def replace_file(self, source: str, target: str) -> None:
        """Move a file over another, atomically."""
        with translated(f"rename over {target}", source, self._root):
            Path(self.local_path(source)).replace(self.local_path(target))

    def remove_tree(self, key: str, *, first: str | None = None) -> None:
        """Delete a file or a directory with all that is in it."""
        path = Path(self.local_path(key))
        with translated("delete", key, self._root, exists=frozenset()):
            if not path.is_dir() or path.is_symlink():
                path.unlink()
                return
            if first is not None:
                (path / first).unlink(missing_ok=True)
            shutil.rmtree(path)

    def remove_directory(self, key: str) -> None:
        """Delete an empty directory; one that is not empty stays."""
        with translated("rmdir", key, self._root):
            os.rmdir(self.local_path(key))

    def lock(self, key: str) -> LocalLock | None:
        """Take a file's lock, or return None where a living process (this one included) holds it.

        Race: closing *any* descriptor of the file would free the lock, so a file that this process holds is never
        opened again: its identity is looked up first, under one mutex.
        """
        path = self.local_path(key)
        with _held_locks_mutex, translated("lock", key, self._root):
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
