"""What a new owner does about what its dead predecessors left: finish, undo, delete; and in that order.

Only directories of fenced incarnations are touched, and nothing is recognised by a name pattern in the root. The root is
fsynced before anything is deleted: an exchange that a power loss undoes must find its old directory whole.

Source: docs/spec/FORMAT.md, "Crash table".
"""

from __future__ import annotations

import re

from shardpoint.commit.visible import CONTROL_DIRECTORY, DISPLACED_PREFIX, displaced, find_committed, read_manifest
from shardpoint.errors import CorruptionError, NotFoundError, UnsupportedFormatError
from shardpoint.events import Event, Listener
from shardpoint.manifest import MANIFEST_NAME, Manifest
from shardpoint.storage import Store, SyncPoint

_FENCED = re.compile(r"fenced-(\d{6})\Z")
_FRESH = re.compile(r"new-[0-9a-f]{32}\Z")


def _fenced_children(store: Store) -> list[str]:
    keys: list[str] = []
    for entry in store.entries(CONTROL_DIRECTORY):
        if _FENCED.match(entry.name):
            parent = f"{CONTROL_DIRECTORY}/{entry.name}"
            keys += [f"{parent}/{child.name}" for child in store.entries(parent) if child.is_directory]
    return keys


def _successor(store: Store, replaced: Manifest) -> str | None:
    """Return the key of the finished attempt that was to replace a displaced checkpoint, if there is one."""
    for key in _fenced_children(store):
        if key.rsplit("/", 1)[-1].startswith(DISPLACED_PREFIX):
            continue
        try:
            manifest = read_manifest(store, key)
        except (NotFoundError, CorruptionError, UnsupportedFormatError):
            continue  # a torn attempt: never voted on, never committed
        if manifest.name == replaced.name and manifest.replaces == replaced.checkpoint_id:
            return key
    return None


def recover(store: Store, owner_key: str, listener: Listener) -> None:
    """Finish or undo every replacement that a crash interrupted between its two renames.

    For each displaced checkpoint whose name is absent from the root: forward to its successor when that is whole,
    otherwise back to the displaced one.

    Args:
        store: the root, owned by the caller.
        owner_key: the caller's incarnation; each rename has one end in it.
        listener: told of each.

    Durability:
        On return the root is fsynced: what is visible stays visible.
    """
    for key, manifest in displaced(store):
        present = find_committed(store, manifest.name)
        if present is not None and present.key == manifest.name:
            continue
        if store.exists(manifest.name):
            continue  # something that is not ours took the name; the displaced checkpoint stays readable where it is
        successor = _successor(store, manifest)
        source = successor if successor is not None else key
        # Order: a displaced one keeps its prefix on the way, so that readers and the next recovery still find it.
        prefix = "attempt-" if successor is not None else DISPLACED_PREFIX
        middle = f"{owner_key}/{prefix}{manifest.checkpoint_id}"
        if source != middle:
            store.rename(source, middle)
        store.rename(middle, manifest.name)
        way = "forward to the new" if successor is not None else "back to the old"
        listener(
            Event(
                "recovered", f"finished an interrupted replacement of {manifest.name}: {way} checkpoint", manifest.name
            )
        )
    store.sync_directory("", SyncPoint.ROOT)


def sweep(store: Store, owner_key: str, listener: Listener) -> None:
    """Delete what fenced incarnations left: torn attempts, trash, replaced checkpoints; keep what is still needed.

    A displaced checkpoint whose name in the root is not a valid checkpoint is kept: it may be the only copy.

    Args:
        store: the root, owned by the caller and recovered.
        owner_key: the caller's incarnation.
        listener: told of each torn attempt.
    """
    for entry in store.entries(CONTROL_DIRECTORY):
        key = f"{CONTROL_DIRECTORY}/{entry.name}"
        if _FENCED.match(entry.name):
            _sweep_fenced(store, key, owner_key, listener)
        elif _FRESH.match(entry.name):
            lock = store.lock(f"{key}/lock")
            if lock is not None:
                store.remove_tree(key)
                lock.release()


def _sweep_fenced(store: Store, key: str, owner_key: str, listener: Listener) -> None:
    for child in store.entries(key):
        path = f"{key}/{child.name}"
        if child.name.startswith(DISPLACED_PREFIX) and _only_copy(store, path):
            # Order: into our own incarnation first, so that it stays findable when this directory goes.
            store.rename(path, f"{owner_key}/{child.name.removesuffix('.fenced')}")
            continue
        store.remove_tree(path, first=MANIFEST_NAME)
        if child.name.startswith("attempt-"):
            listener(Event("swept", f"deleted {child.name}, which an earlier run left", path))
    store.remove_tree(key)


def _only_copy(store: Store, key: str) -> bool:
    try:
        manifest = read_manifest(store, key)
    except (NotFoundError, CorruptionError, UnsupportedFormatError):
        return False
    present = find_committed(store, manifest.name)
    return present is None or present.key != manifest.name or present.manifest is None
