"""Which directories of a root count as committed checkpoints, for a reader who owns nothing.

A checkpoint counts if its name is visible and its manifest valid. Where the filesystem cannot exchange two names, a replaced
checkpoint is, for a moment, only at `.shardpoint/<incarnation>/displaced-<id>...`: a reader takes it from there as long
as its name is absent from the root, so that no listing ever lacks the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardpoint.errors import CorruptionError, NotFoundError, UnsupportedFormatError
from shardpoint.manifest import MANIFEST_NAME, Manifest, decode_manifest
from shardpoint.storage import Store

CONTROL_DIRECTORY = ".shardpoint"
DISPLACED_PREFIX = "displaced-"


@dataclass(frozen=True, slots=True)
class Committed:
    """One committed checkpoint.

    Attributes:
        name: its name in the root.
        key: where it is: the name, or a place below `.shardpoint/` while it is being replaced.
        manifest: its manifest, or None when that is damaged.
        problem: why the manifest could not be read.
    """

    name: str
    key: str
    manifest: Manifest | None
    problem: CorruptionError | UnsupportedFormatError | None = None


def read_manifest(store: Store, key: str) -> Manifest:
    """Return the manifest of the checkpoint at a key.

    Raises:
        NotFoundError: there is none.
        CorruptionError: it is damaged.
        UnsupportedFormatError: a newer format.
    """
    path = f"{key}/{MANIFEST_NAME}" if key else MANIFEST_NAME
    return decode_manifest(store.read_bytes(path), path)


def _committed_at(store: Store, name: str, key: str) -> Committed | None:
    try:
        return Committed(name, key, read_manifest(store, key))
    except NotFoundError:
        return None
    except (CorruptionError, UnsupportedFormatError) as error:
        return Committed(name, key, None, error)


def displaced(store: Store) -> list[tuple[str, Manifest]]:
    """Return (key, manifest) of every replaced checkpoint that waits below `.shardpoint/`, of any incarnation."""
    found: list[tuple[str, Manifest]] = []
    try:
        incarnations = [entry.name for entry in store.entries(CONTROL_DIRECTORY) if entry.is_directory]
    except NotFoundError:
        return found
    for incarnation in incarnations:
        try:
            children = store.entries(f"{CONTROL_DIRECTORY}/{incarnation}")
        except NotFoundError:
            continue
        for child in children:
            if child.is_directory and child.name.startswith(DISPLACED_PREFIX):
                key = f"{CONTROL_DIRECTORY}/{incarnation}/{child.name}"
                committed = _committed_at(store, child.name, key)
                if committed is not None and committed.manifest is not None:
                    found.append((key, committed.manifest))
    return found


def committed_checkpoints(store: Store) -> list[Committed]:
    """Return every committed checkpoint of a root, oldest commit first; damaged ones (no sequence known) come first.

    Raises:
        NotFoundError: the root does not exist.
    """
    # Order: the displaced first. One that is read there and is back under its name by now is seen twice, never not at all.
    waiting = displaced(store)
    found: dict[str, Committed] = {}
    for entry in store.entries(""):
        if entry.is_directory and entry.name != CONTROL_DIRECTORY:
            committed = _committed_at(store, entry.name, entry.name)
            if committed is not None:
                found[entry.name] = committed
    for key, manifest in waiting:
        if manifest.name not in found:
            found[manifest.name] = Committed(manifest.name, key, manifest)
    return sorted(found.values(), key=lambda item: (item.manifest.commit_sequence if item.manifest else -1, item.name))


def find_committed(store: Store, name: str) -> Committed | None:
    """Return the committed checkpoint of a name, or None."""
    committed = _committed_at(store, name, name)
    if committed is not None:
        return committed
    for key, manifest in displaced(store):
        if manifest.name == name:
            return Committed(name, key, manifest)
    return _committed_at(store, name, name)
