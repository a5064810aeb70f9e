"""Which directories of a root count as committed checkpoints, for a reader who owns nothing.

A checkpoint counts if its name is visible and its manifest valid. Where the filesystem cannot exchange two names, a
replaced checkpoint is, for a moment, only at `.shardpoint/<incarnation>/displaced-<id>...`: a reader takes it from
there as long as its name is absent from the root, so that no listing ever lacks the step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardpoint.errors import CorruptionError, NotFoundError, UnsupportedFormatError
from shardpoint.manifest import MANIFEST_NAME, Manifest, decode_manifest
from shardpoint.storage import Store

CONTROL_DIRECTORY = ".shardpoint"
DISPLACED_PREFIX = "displaced-"

# displaced-<its id>-<id of the attempt that takes its name>, and ".fenced" once its incarnation was fenced.
_DISPLACED = re.compile(r"displaced-[0-9a-f]{32}-([0-9a-f]{32})(?:\.fenced)?\Z")
# mkfs puts it into the top directory of every ext filesystem, and nobody but the superuser may look inside.
_NEVER_OURS = frozenset({CONTROL_DIRECTORY, "lost+found"})
_PASSES = 3


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


@dataclass(frozen=True, slots=True)
class Displaced:
    """A checkpoint that was moved aside to be replaced, and still waits below `.shardpoint/`.

    Attributes:
        key: where it is.
        manifest: its manifest, or None when that cannot be read.
        successor_id: the id of the attempt that was to take its name.
    """

    key: str
    manifest: Manifest | None
    successor_id: str


def all_displaced(store: Store) -> list[Displaced]:
    """Return every displaced checkpoint, of any incarnation."""
    found: list[Displaced] = []
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
            match = _DISPLACED.match(child.name)
            if match is not None and child.is_directory:
                key = f"{CONTROL_DIRECTORY}/{incarnation}/{child.name}"
                try:
                    found.append(Displaced(key, read_manifest(store, key), match.group(1)))
                except NotFoundError:
                    continue
                except (CorruptionError, UnsupportedFormatError):
                    found.append(Displaced(key, None, match.group(1)))
    return found


def displaced_by_name(store: Store) -> dict[str, Displaced]:
    """Return the displaced checkpoints that can be read, by name; of several of one name the one committed last."""
    found: dict[str, Displaced] = {}
    for item in all_displaced(store):
        if item.manifest is not None:
            other = found.get(item.manifest.name)
            if (
                other is None
                or other.manifest is None
                or other.manifest.commit_sequence < item.manifest.commit_sequence
            ):
                found[item.manifest.name] = item
    return found


def committed_checkpoints(store: Store) -> list[Committed]:
    """Return every committed checkpoint of a root, oldest commit first; damaged ones (no sequence known) come first.

    Raises:
        NotFoundError: the root does not exist.
        StorageError: a directory in it cannot be read: whether it is a checkpoint cannot be told.
    """
    # Race: a name that is absent now is below `.shardpoint/` now, but by the time that one looks there the
    # replacement may be over. So the root is listed again, and only names that were not there before are read. To be
    # missed, a step would have to be replaced as often as there are passes, each time between two looks and absent at
    # every look.
    found: dict[str, Committed] = {}
    waiting: dict[str, Committed] = {}
    for _ in range(_PASSES):
        for entry in store.entries(""):
            if entry.is_directory and entry.name not in _NEVER_OURS and entry.name not in found:
                committed = _committed_at(store, entry.name, entry.name)
                if committed is not None:
                    found[entry.name] = committed
        for name, item in displaced_by_name(store).items():
            waiting.setdefault(name, Committed(name, item.key, item.manifest))
    return sorted(
        {**waiting, **found}.values(),
        key=lambda item: (item.manifest.commit_sequence if item.manifest else -1, item.name),
    )


def newest_first(store: Store) -> list[str]:
    """Return the names of the training checkpoints: those whose manifest cannot be read, then the last committed first.

    One that cannot be read may be the newest, so it is tried first: it is passed over loudly, or (a newer format) it
    ends the resume instead of silently going back to an older one.

    Raises:
        NotFoundError: the root does not exist.
        StorageError: a directory in it cannot be read.
    """
    found = committed_checkpoints(store)
    intact = [item.name for item in found if item.manifest is not None and item.manifest.step is not None]
    unreadable = [item.name for item in found if item.manifest is None]
    return [*unreadable, *reversed(intact)]


def find_committed(store: Store, name: str) -> Committed | None:
    """Return the committed checkpoint of a name, or None."""
    # Race: as for the listing.
    for _ in range(_PASSES):
        committed = _committed_at(store, name, name)
        if committed is not None:
            return committed
        item = displaced_by_name(store).get(name)
        if item is not None:
            return Committed(name, item.key, item.manifest)
    return None
