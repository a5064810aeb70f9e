"""How one small file is replaced so that a reader, or a crash, sees the old contents or the new, never a part."""

from __future__ import annotations

import uuid

from shardpoint.errors import CheckpointError
from shardpoint.storage.protocol import Store, SyncPoint


def replace_document(store: Store, key: str, data: bytes) -> None:
    """Write a file over one that may be there.

    Args:
        store: where.
        key: the file; its directory must be there.
        data: the whole contents.

    Raises:
        NotFoundError: the directory is not there.
        StorageError: the write, the fsync or the rename failed, and the old file is untouched; or the fsync of the
            directory failed, and the new file is in place but may not survive power loss.

    Durability:
        On return contents and name survive power loss.
    """
    directory, _, name = key.rpartition("/")
    fresh = f".{name}.{uuid.uuid4().hex}.new"
    temporary = f"{directory}/{fresh}" if directory else fresh
    try:
        store.write_document(temporary, data, SyncPoint.DOCUMENT)
        store.replace_file(temporary, key)
    except CheckpointError as error:
        try:
            if store.exists(temporary):
                store.remove_tree(temporary)
        except CheckpointError as second:
            error.add_note(f"{temporary} could not be deleted: {second}")
        raise
    store.sync_directory(directory, SyncPoint.PARENT)
