"""Where bytes live: the `Store` protocol and the POSIX filesystem's implementation."""

from shardpoint.storage.local import LocalStore
from shardpoint.storage.protocol import DirectoryEntry, Lock, Reader, Store, SyncPoint, Writer

__all__ = ["DirectoryEntry", "LocalStore", "Lock", "Reader", "Store", "SyncPoint", "Writer"]
