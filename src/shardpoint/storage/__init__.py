"""Where bytes live: the `Store` protocol and the POSIX filesystem's implementation."""

from shardpoint.storage.append import AppendedFile
from shardpoint.storage.local import LocalStore
from shardpoint.storage.memory import Buffer, BufferPool, OnAllocate
from shardpoint.storage.mounts import kernel_id
from shardpoint.storage.protocol import DirectoryEntry, Lock, Reader, SharedFiles, Store, SyncPoint, Writer
from shardpoint.storage.replace import replace_document
from shardpoint.storage.syscalls import is_fresh, populate

__all__ = [
    "AppendedFile",
    "Buffer",
    "BufferPool",
    "DirectoryEntry",
    "LocalStore",
    "Lock",
    "OnAllocate",
    "Reader",
    "SharedFiles",
    "Store",
    "SyncPoint",
    "Writer",
    "is_fresh",
    "kernel_id",
    "populate",
    "replace_document",
]
