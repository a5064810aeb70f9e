"""How an attempt becomes a committed checkpoint: the only function of the library that does this.

Order: every rank has fsynced what it wrote before it voted, and every vote is in; then documents, then the manifest,
each fsynced; then the directories, bottom up; then the rename; then the root. Nothing is deleted before the root is
durable.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardpoint.commit.attempt import Attempt
from shardpoint.commit.visible import DISPLACED_PREFIX, find_committed
from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    CommitUnknownError,
    NotFoundError,
    StorageError,
)
from shardpoint.manifest import MANIFEST_NAME, Manifest, decode_manifest, encode_manifest
from shardpoint.storage import SyncPoint


def write_documents(attempt: Attempt, documents: Mapping[str, bytes]) -> None:
    """Write files that no rank writes, each fsynced.

    Args:
        attempt: the attempt.
        documents: path relative to the attempt -> contents.

    Raises:
        FencedError: another run took the root over.
        StorageError: a write or an fsync failed.
    """
    try:
        for path, data in documents.items():
            attempt.store.write_document(f"{attempt.key}/{path}", data, SyncPoint.DOCUMENT)
    except NotFoundError:
        attempt.owner.check_alive(attempt.store)
        raise


def publish(attempt: Attempt, documents: Mapping[str, bytes], manifest: Manifest) -> None:
    """Commit an attempt whose tensor files are written and durable.

    Args:
        attempt: the attempt; its root is owned by this process.
        documents: path relative to the attempt -> contents, for every file that no rank wrote and `write_documents` did
            not either.
        manifest: complete.

    Raises:
        ManifestError: the manifest contradicts itself; nothing was committed.
        FencedError: another run took the root over; nothing was committed.
        StorageError: a document, a sync or the rename failed; nothing was committed.
        CommitUnknownError: the rename may have happened, or it did and the root's fsync failed.

    Durability:
        On return the checkpoint is visible under its name and survives power loss; a checkpoint that it replaced is
        gone.
    """
    store, key = attempt.store, attempt.key
    sealed = encode_manifest(manifest)
    decode_manifest(sealed, MANIFEST_NAME)  # never commit what a reader would refuse
    write_documents(attempt, documents)
    try:
        store.write_document(f"{key}/{MANIFEST_NAME}", sealed, SyncPoint.MANIFEST)
        for directory in reversed(attempt.directories):
            store.sync_directory(f"{key}/{directory}", SyncPoint.SUBDIRECTORY)
        store.sync_directory(key, SyncPoint.ATTEMPT)
    except NotFoundError:
        attempt.owner.check_alive(store)
        raise
    leftover = _make_visible(attempt)
    _sync_root(attempt)
    if leftover is not None:
        _delete_replaced(attempt, leftover)


def _make_visible(attempt: Attempt) -> str | None:
    """Rename the attempt to its name; return what it displaced and is to be deleted once the root is durable."""
    store, key, name = attempt.store, attempt.key, attempt.name
    present = find_committed(store, name)
    if present is None or present.key != name:
        _rename(attempt, key, name)
        return present.key if present is not None else None
    try:
        exchanged = store.exchange(key, name)
    except CheckpointError as error:
        _settle(attempt, error)
        return key
    if exchanged:
        if _settled_id(attempt) == attempt.attempt_id:
            return key
        # A filesystem that ignored the flag (an old ceph-fuse) did something else: never guess what.
        text = f"exchanging {name} for its new version left neither in place in {store.location}"
        raise CommitUnknownError(_advise(attempt, text), attempt_id=attempt.attempt_id)
    # Two renames: between them the name is absent, and readers take the displaced checkpoint instead (see visible.py).
    old_id = attempt.replaces if attempt.replaces is not None else "0" * 32
    aside = f"{attempt.owner.key}/{DISPLACED_PREFIX}{old_id}-{attempt.attempt_id}"
    try:
        store.rename(name, aside)
    except CheckpointError:
        attempt.owner.check_alive(store)
        if store.exists(name) or not store.exists(aside):
            raise
    try:
        _rename(attempt, key, name)
    except CommitUnknownError:
        raise
    except CheckpointError as error:
        try:
            store.rename(aside, name)
        except CheckpointError as second:
            error.add_note(f"the old checkpoint waits at {aside} ({second}); readers and the next run find it there")
        raise
    return aside


def _rename(attempt: Attempt, source: str, target: str) -> None:
    try:
        attempt.store.rename(source, target)
    except CheckpointError as error:
        _settle(attempt, error)


def _settled_id(attempt: Attempt) -> str | None:
    """Return the id under the name after a rename that may have happened; not being able to read it is not knowing."""
    try:
        return attempt.id_in_place()
    except StorageError as error:
        text = f"{attempt.name} was renamed into place, or not: its manifest cannot be read ({error})"
        raise CommitUnknownError(_advise(attempt, text), attempt_id=attempt.attempt_id) from error


def _settle(attempt: Attempt, error: CheckpointError) -> None:
    """After a failed rename: return when it happened all the same, raise what is known otherwise.

    A rename that a file server retransmitted may report ENOENT or EIO although it was done.
    """
    if _settled_id(attempt) == attempt.attempt_id:
        return
    if isinstance(error, AlreadyExistsError):
        raise error
    attempt.owner.check_alive(attempt.store)
    if attempt.store.exists(attempt.key):
        raise error
    text = f"renaming the finished attempt to {attempt.name} failed ({error}), and it is at neither place"
    raise CommitUnknownError(_advise(attempt, text), attempt_id=attempt.attempt_id) from error


def _sync_root(attempt: Attempt) -> None:
    try:
        attempt.store.sync_directory("", SyncPoint.ROOT)
        attempt.store.sync_directory(attempt.owner.key, SyncPoint.INCARNATION)
    except StorageError as error:
        text = f"{attempt.name} is in place, but the fsync of {attempt.store.location} failed: {error}"
        raise CommitUnknownError(_advise(attempt, text), attempt_id=attempt.attempt_id) from error
    except NotFoundError as error:
        # The incarnation went away between rename and fsync: the name tells what happened.
        if _settled_id(attempt) != attempt.attempt_id:
            text = f"the root was taken over while {attempt.name} was committed"
            raise CommitUnknownError(_advise(attempt, text), attempt_id=attempt.attempt_id) from error


def _advise(attempt: Attempt, text: str) -> str:
    return (
        f"{text}. Whether it was committed shows `shardpoint show {attempt.store.location}/{attempt.name}`: it was if "
        f"the checkpoint's id is {attempt.attempt_id}. Nothing was pruned"
    )


def publish_file(attempt: Attempt, path: str) -> None:
    """Put an attempt's only file in place under the attempt's name, over a file that was there.

    Args:
        attempt: an attempt with one tensor file, written and durable.
        path: the file, relative to the attempt.

    Raises:
        FencedError: another run took the root over; the old file is untouched.
        StorageError: the rename failed; the old file is untouched.
        CommitUnknownError: the rename may have happened, or it did and the root's fsync failed.

    Durability:
        On return the file is visible under its name and survives power loss.
    """
    store, source = attempt.store, f"{attempt.key}/{path}"
    try:
        store.replace_file(source, attempt.name)
    except CheckpointError as error:
        attempt.owner.check_alive(store)
        if not store.exists(source):
            # A rename that a file server retransmitted reports an error although it was done.
            text = f"moving the finished file to {attempt.name} failed ({error}), and it is no longer where it was"
            raise CommitUnknownError(_advise_file(attempt, text), attempt_id=attempt.attempt_id) from error
        raise
    try:
        store.sync_directory("", SyncPoint.ROOT)
    except StorageError as error:
        text = f"{attempt.name} is in place, but the fsync of {store.location} failed: {error}"
        raise CommitUnknownError(_advise_file(attempt, text), attempt_id=attempt.attempt_id) from error
    _delete_replaced(attempt, attempt.key)


def _advise_file(attempt: Attempt, text: str) -> str:
    return f"{text}. Look whether {attempt.store.location}/{attempt.name} is the new file, and save again if it is not"


def _delete_replaced(attempt: Attempt, key: str) -> None:
    """Delete what a commit left over; the commit stands whether this succeeds or not, so a failure is only a note."""
    try:
        attempt.store.remove_tree(key, first=MANIFEST_NAME)
    except NotFoundError:
        return  # fenced in this moment: the new owner sweeps it
    except StorageError as error:
        attempt.notes.append(f"{key}, which was replaced, could not be deleted ({error}): the next run sweeps it")
