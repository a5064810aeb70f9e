"""Where bytes live: the `Store` protocol and the POSIX filesystem's implementation."""

from shardpoint.storage.local import LocalStore
from shardpoint.storage.protocol import DirectoryEntry, Lock, Reader, Store, SyncPoint, Writer
from shardpoint.storage.replace import replace_document

__all__ = ["DirectoryEntry", "LocalStore", "Lock", "Reader", "Store", "SyncPoint", "Writer", "replace_document"]
