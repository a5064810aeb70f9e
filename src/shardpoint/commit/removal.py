"""How a committed checkpoint goes away: out of sight first, durably, and only then deleted."""

from __future__ import annotations

import uuid
from contextlib import suppress

from shardpoint.commit.ownership import RootOwner
from shardpoint.commit.pins import is_pinned
from shardpoint.commit.visible import all_displaced, find_committed
from shardpoint.errors import NotFoundError, UsageError
from shardpoint.manifest import MANIFEST_NAME
from shardpoint.storage import Store, SyncPoint


def prune(store: Store, owner: RootOwner, name: str) -> bool:
    """Delete a committed checkpoint, unless it is pinned.

    Args:
        store: the root.
        owner: the hold on it.
        name: the checkpoint; nothing but a committed checkpoint is ever deleted.

    Returns:
        Whether it was deleted: False where it is pinned.

    Raises:
        NotFoundError: there is no committed checkpoint of that name.
        UsageError: it was committed under another name: somebody copied or renamed it.
        FencedError: another run took the root over; nothing was deleted.
        StorageError: the rename, the fsync or the deletion failed; what is left is swept by the next run.

    Durability:
        On return the checkpoint is gone, and a power loss does not bring back a part of it.
    """
    present = find_committed(store, name)
    if present is None or present.key != name or present.manifest is None:
        text = f"{name} in {store.location} is not a committed checkpoint: nothing was deleted"
        raise NotFoundError(text)
    if present.manifest.name != name:
        text = (
            f"{name} in {store.location} was committed as {present.manifest.name}: it is a copy or was renamed by "
            "somebody, who may want to keep it. Nothing was deleted"
        )
        raise UsageError(text)
    if is_pinned(store, name):
        return False
    # Order: before the name is free, or a reader would take what waits to be deleted for the checkpoint.
    for item in all_displaced(store):
        if item.manifest is not None and item.manifest.name == name:
            store.remove_tree(item.key, first=MANIFEST_NAME)
    trash = f"{owner.key}/trash-{present.manifest.checkpoint_id}-{uuid.uuid4().hex}"
    try:
        store.rename(name, trash)
    except NotFoundError:
        owner.check_alive(store)
        raise
    # Race: who pinned it since then was told that it stays, if it was still there.
    if is_pinned(store, name):
        store.rename(trash, name)
        return False
    store.sync_directory("", SyncPoint.ROOT)
    with suppress(NotFoundError):  # fenced in this moment: the new owner sweeps it
        store.remove_tree(trash, first=MANIFEST_NAME)
    return True
