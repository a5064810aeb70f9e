"""What a store must be able to do, and which syncs the commit protocol rests on.

A store holds files and directories under one root. A *key* is a relative path with forward slashes; `""` is the root.
Every method raises `NotFoundError` where the key is not there, `AlreadyExistsError` where it must not be there, and
`StorageError` for everything else that the system refuses; no other exception leaves a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


SharedFiles = Literal["any", "one_host", "never"]


class SyncPoint(StrEnum):
    """Why something is made durable: each is one step of the commit protocol, and can be broken by itself in a test."""

    TENSOR_FILE = "tensor_file"
    DOCUMENT = "document"
    MANIFEST = "manifest"
    SUBDIRECTORY = "subdirectory"
    ATTEMPT = "attempt"
    ROOT = "root"
    INCARNATION = "incarnation"
    PARENT = "parent"
    OWNERSHIP = "ownership"


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One name in a directory."""

    name: str
    is_directory: bool


class Writer(Protocol):
    """One open file that is written at chosen offsets; it was created and sized by the coordinator."""

    @property
    def note(self) -> str | None:
        """What a person should know of how it was written, or None."""
        ...

    def write_at(self, data: Buffer, byte_offset: int) -> None:
        """Write all of `data`; safe to call from several threads for disjoint ranges.

        Memory whose address is congruent to the offset modulo 4096 can be written without a copy.
        """
        ...

    def sync(self, point: SyncPoint) -> None:
        """Make what this writer wrote durable; never retried when it fails.

        Raises:
            StorageError: `retryable` is False: the data may be lost although a later sync would say otherwise.
        """
        ...

    def close(self) -> None:
        """Close; an error on closing is an error."""
        ...


class Reader(Protocol):
    """One open file that is read at chosen offsets."""

    @property
    def size_bytes(self) -> int:
        """The size when it was opened."""
        ...

    def read_into(self, target: memoryview, byte_offset: int) -> None:
        """Fill all of `target`; safe to call from several threads.

        Raises:
            TruncatedError: the file ends before.
        """
        ...

    def read_vectors(self, targets: Sequence[memoryview], byte_offset: int) -> None:
        """Fill all of each target in turn with consecutive bytes, in as few calls as there can be.

        Args:
            targets: writable, C-contiguous; any number of them, of any length; two may share memory.
            byte_offset: where the first target's bytes begin; each next one's follow those of the one before.

        Raises:
            TruncatedError: the file ends before.
        """
        ...

    def read_uncached(self, scratch: memoryview, byte_offset: int, num_bytes: int) -> memoryview | None:
        """Read a range past the page cache, where that holds less than half of it.

        Args:
            scratch: page-aligned private memory, two pages larger than the range, that no forked process shares.
            byte_offset: where the range begins.
            num_bytes: its length.

        Returns:
            The range, within `scratch`; None where the page cache has it, where the store cannot, and where the file is
            shorter: `read_vectors` is what to call then.

        Raises:
            StorageError: the device reports an error.
        """
        ...

    def close(self) -> None:
        """Close."""
        ...


class Lock(Protocol):
    """A lock that the kernel frees when the process dies."""

    def release(self) -> None:
        """Give the lock up."""
        ...


class Store(Protocol):
    """A root directory."""

    @property
    def location(self) -> str:
        """The root as a person would name it."""
        ...

    @property
    def shared_files(self) -> SharedFiles:
        """Whose writers may write disjoint bytes of one file at once: any, those of one host, or none."""
        ...

    def local_path(self, key: str) -> str:
        """Return the path of a key on a local filesystem, for libraries that write by path."""
        ...

    def make_root(self) -> None:
        """Make the root and its parents durable, if they are not there."""
        ...

    def make_directory(self, key: str) -> None:
        """Make one directory; its parent must be there and it must not."""
        ...

    def entries(self, key: str) -> list[DirectoryEntry]:
        """List a directory, sorted by name."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether anything is at the key."""
        ...

    def size_bytes(self, key: str) -> int:
        """Return a file's size."""
        ...

    def create_file(self, key: str, num_bytes: int) -> str | None:
        """Make a file of a size, its space reserved; it must not be there.

        Returns:
            A note where space could not be reserved, else None.
        """
        ...

    def link(self, source: str, target: str) -> bool:
        """Give a file a second name: both are the same bytes, and either may be deleted.

        Args:
            source: a file that nobody will write to any more.
            target: a key that is free.

        Returns:
            False where the filesystem cannot (another device, no links, too many of them); nothing was made then.

        Raises:
            NotFoundError: there is no such file, or no directory for the target.
            AlreadyExistsError: the target is there.

        Durability:
            The name is durable once its directory is fsynced; the bytes are as durable as they were.
        """
        ...

    def open_writer(self, key: str) -> Writer:
        """Open a file that is there, without creating or truncating it."""
        ...

    def open_reader(self, key: str) -> Reader:
        """Open a file for reading only."""
        ...

    def read_bytes(self, key: str) -> bytes:
        """Return a whole file."""
        ...

    def write_document(self, key: str, data: bytes, point: SyncPoint) -> None:
        """Make a file that is not there, holding `data`, and make its contents durable (not yet its name)."""
        ...

    def sync_file(self, key: str, point: SyncPoint) -> None:
        """Make durable a file that another library wrote in this process."""
        ...

    def sync_directory(self, key: str, point: SyncPoint) -> None:
        """Make the names in a directory durable."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a file or directory to a name that is free, atomically.

        Raises:
            AlreadyExistsError: something is at `target`; nothing was moved.
        """
        ...

    def exchange(self, first: str, second: str) -> bool:
        """Swap two names atomically; return False, with nothing done, where the filesystem cannot."""
        ...

    def replace_file(self, source: str, target: str) -> None:
        """Move a file over another, atomically."""
        ...

    def remove_tree(self, key: str, *, first: str | None = None) -> None:
        """Delete a file or directory with all that is in it, the entry `first` before anything else."""
        ...

    def remove_directory(self, key: str) -> None:
        """Delete an empty directory: once it is gone, no rename into it that was under way can still land.

        Raises:
            AlreadyExistsError: something is in it; nothing was deleted.
        """
        ...

    def lock(self, key: str) -> Lock | None:
        """Take the lock of a file (made if it is not there), or return None where somebody alive holds it."""
        ...
