"""What a new owner does about what its dead predecessors left: finish, undo, delete; and in that order.

Only directories of fenced incarnations are touched, and nothing is recognised by a name pattern in the root. The root
is fsynced before anything is deleted: an exchange that a power loss undoes must find its old directory whole.

Source: docs/spec/FORMAT.md, "Crash table".
"""

from __future__ import annotations

import errno
import re
from contextlib import suppress

from shardpoint.commit.visible import (
    CONTROL_DIRECTORY,
    Displaced,
    all_displaced,
    committed_checkpoints,
    displaced_by_name,
    read_manifest,
)
from shardpoint.errors import AlreadyExistsError, CorruptionError, NotFoundError, StorageError, UnsupportedFormatError
from shardpoint.events import Event, Listener
from shardpoint.manifest import MANIFEST_NAME, Manifest
from shardpoint.storage import Store, SyncPoint

FENCED = re.compile(r"fenced-(\d{6})(?:-[0-9a-f]{32})?\Z")
FENCED_SUFFIX = ".fenced"
_FRESH = re.compile(r"new-[0-9a-f]{32}\Z")


def _successors(store: Store) -> dict[str, tuple[str, Manifest]]:
    """Return id -> (key, manifest) of every finished attempt that a fenced incarnation left."""
    found: dict[str, tuple[str, Manifest]] = {}
    for entry in store.entries(CONTROL_DIRECTORY):
        if not FENCED.match(entry.name):
            continue
        for child in store.entries(f"{CONTROL_DIRECTORY}/{entry.name}"):
            if child.is_directory and child.name.startswith("attempt-"):
                key = f"{CONTROL_DIRECTORY}/{entry.name}/{child.name}"
                try:
                    manifest = read_manifest(store, key)
                except (NotFoundError, CorruptionError, UnsupportedFormatError):
                    continue  # a torn attempt: never voted on, never committed
                found[manifest.checkpoint_id] = key, manifest
    return found


def recover(store: Store, owner_key: str, listener: Listener) -> None:
    """Finish or undo every replacement that a crash interrupted between its two renames.

    For each displaced checkpoint whose name is absent from the root: forward to its successor when that is whole,
    otherwise back to the displaced one. A name that something else has taken meanwhile stays as it is, and the
    displaced checkpoint readable where it is.

    Args:
        store: the root, owned by the caller.
        owner_key: the caller's incarnation; each rename has one end in it.
        listener: told of each.

    Durability:
        On return the root is fsynced: what is visible stays visible.
    """
    successors = _successors(store)
    unreadable = [item for item in all_displaced(store) if item.manifest is None]
    for item in [*displaced_by_name(store).values(), *unreadable]:
        successor = successors.get(item.successor_id)
        manifest = item.manifest if item.manifest is not None else successor[1] if successor is not None else None
        if manifest is None or store.exists(manifest.name):
            continue
        if successor is not None:
            _bring(store, successor[0], f"{owner_key}/attempt-{item.successor_id}", manifest.name)
        else:
            # Order: it keeps its name's form on the way, so that readers and the next recovery still find it.
            _bring(store, item.key, _own_key(owner_key, item), manifest.name)
        way = "forward to the new" if successor is not None else "back to the old"
        text = f"finished an interrupted replacement of {manifest.name}: {way} checkpoint"
        listener(Event("recovered", text, manifest.name))
    store.sync_directory("", SyncPoint.ROOT)


def _bring(store: Store, source: str, middle: str, name: str) -> None:
    if source != middle:
        store.rename(source, middle)
    store.rename(middle, name)


def _own_key(owner_key: str, item: Displaced) -> str:
    return f"{owner_key}/{item.key.rpartition('/')[2].removesuffix(FENCED_SUFFIX)}"


def sweep(store: Store, owner_key: str, listener: Listener) -> None:
    """Delete what fenced incarnations left: torn attempts, trash, replaced checkpoints; keep what is still needed.

    A displaced checkpoint is deleted only when a valid checkpoint has its name; one whose own name cannot be read, only
    when the one that was to replace it is in place. Otherwise it may be the only copy.

    Args:
        store: the root, owned by the caller and recovered.
        owner_key: the caller's incarnation.
        listener: told of each torn attempt.
    """
    for entry in store.entries(CONTROL_DIRECTORY):
        key = f"{CONTROL_DIRECTORY}/{entry.name}"
        if FENCED.match(entry.name):
            _sweep_fenced(store, key, owner_key, listener)
        elif _FRESH.match(entry.name):
            # Race: its maker may have renamed it by now.
            with suppress(NotFoundError):
                _sweep_fresh(store, key)


def _sweep_fresh(store: Store, key: str) -> None:
    """Delete an incarnation that never came to life, unless its maker is about to finish it."""
    lock = store.lock(f"{key}/lock")
    if lock is not None:
        try:
            discard_fresh(store, key)
        finally:
            lock.release()


def discard_fresh(store: Store, key: str) -> None:
    """Delete an incarnation that is not to come to life.

    Race: its maker and a sweeper may delete it at once. When the maker has deleted the lock, the sweeper makes it
    again, and one of them finds the directory gone, or not empty: the other finishes, or else the next sweep.
    """
    try:
        store.remove_tree(key)
    except NotFoundError:
        return
    except StorageError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


def _sweep_fenced(store: Store, key: str, owner_key: str, listener: Listener) -> None:
    while True:
        children = store.entries(key)
        needed = _still_needed(store)  # Order: after the listing, so that whatever is listed was looked at
        for child in children:
            path = f"{key}/{child.name}"
            if path in needed:
                # Order: into our own incarnation first, so that it stays findable when this directory goes.
                store.rename(path, f"{owner_key}/{child.name.removesuffix(FENCED_SUFFIX)}")
                continue
            store.remove_tree(path, first=MANIFEST_NAME)
            if child.name.startswith("attempt-"):
                listener(Event("swept", f"deleted {child.name}, which an earlier run left", path))
        try:
            # Race: a rename of the fenced run that was under way may still have put something in; after this none can.
            store.remove_directory(key)
        except AlreadyExistsError:
            continue
        return


def _still_needed(store: Store) -> set[str]:
    """Return the keys of the displaced checkpoints that may be the only copy."""
    committed = {item.name: item for item in committed_checkpoints(store) if item.manifest is not None}
    in_place = {name for name, item in committed.items() if item.key == name}
    ids = {item.manifest.checkpoint_id for item in committed.values() if item.manifest is not None}
    return {
        item.key
        for item in all_displaced(store)
        if (item.manifest.name not in in_place if item.manifest is not None else item.successor_id not in ids)
    }
