"""How files that another library writes become a checkpoint of ours: all or nothing, checksummed, verified on load.

The other library (the real ColossalAI Booster) writes by path into the attempt's directory, on every rank as it
pleases. What it wrote is fsynced on every rank, hashed by the coordinator, and committed like any other attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePosixPath

import msgspec

from shardpoint import __version__
from shardpoint.adapters.state import RunState
from shardpoint.checksum import crc64, to_hex
from shardpoint.comm import Comm
from shardpoint.commit import Attempt, RootOwner, acquire_root, publish
from shardpoint.engine.ballots import agree
from shardpoint.engine.committing import commit_or_unknown
from shardpoint.engine.results import SaveResult
from shardpoint.engine.source import Source
from shardpoint.errors import (
    ChecksumError,
    CollectiveTimeout,
    CommitUnknownError,
    NotFoundError,
    TruncatedError,
    UsageError,
)
from shardpoint.events import Event, Listener, log_event
from shardpoint.manifest import FORMAT_MAJOR, FORMAT_MINOR, FORMAT_NAME, FileEntry, Manifest
from shardpoint.storage import Store, SyncPoint

CHUNK_BYTES = 16 * 2**20


class _Opened(msgspec.Struct, frozen=True):
    key: str
    attempt_id: str


class _Committed(msgspec.Struct, frozen=True):
    sequence: int
    num_bytes: int


def save_foreign(  # noqa: C901 - four rounds, each with its part of the work
    store: Store,
    comm: Comm,
    name: str,
    run: RunState,
    write: Callable[[str], None],
    documents: Mapping[str, bytes],
    *,
    owner: RootOwner | None = None,
    listener: Listener = log_event,
) -> SaveResult:
    """Commit what another library writes.

    Args:
        store: the root, on a local filesystem.
        comm: the ranks.
        name: the name to commit to.
        run: the position.
        write: called on every rank with the path of a directory that is there; may run collectives of its own.
        documents: path -> contents, written by the coordinator.
        owner: on the coordinator, the run's hold on the root; without one the root is owned for this save only.
        listener: told of the commit.

    Raises:
        UsageError: the ranks asked for different saves, or the library wrote a file that the coordinator was to write.
        RootBusyError: another living run owns the root.
        PeerError: a rank failed; nothing was committed.
        CommitUnknownError: this rank heard no verdict.

    Collective:
        All ranks: four rounds, and whatever `write` does.

    Durability:
        On return the checkpoint is committed and survives power loss.
    """
    began = time.monotonic()
    hold = owner
    attempt: Attempt | None = None

    def decide_open(ballots: Sequence[str]) -> _Opened:
        nonlocal hold, attempt
        if len(set(ballots)) > 1:
            raise UsageError(f"the ranks asked for different saves: {sorted(set(ballots))}")
        hold = hold or acquire_root(store, listener=listener)
        attempt = Attempt.open(store, hold, name, directories=["modeling"])
        return _Opened(attempt.key, attempt.attempt_id)

    def run_write(opened: _Opened) -> bool:
        write(store.local_path(opened.key))
        return True

    def sync_all(opened: _Opened) -> bool:
        for path in _files(store, opened.key):
            store.sync_file(f"{opened.key}/{path}", SyncPoint.TENSOR_FILE)
            comm.progress(1)
        return True

    def commit(_: Sequence[bool]) -> _Committed:
        assert attempt is not None  # noqa: S101 - opened in an earlier round
        paths = _files(store, attempt.key)
        taken = sorted(set(paths) & set(documents))
        if taken:
            raise UsageError(f"the Booster wrote {taken}, which Shardpoint writes")
        files = [_hash_file(store, attempt.key, path, comm.progress) for path in paths]
        files += [FileEntry(path, len(data), to_hex(crc64(data))) for path, data in documents.items()]
        # Durability: every directory on the way to a file, not only the one that holds it.
        above = {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}
        attempt.directories = sorted({*attempt.directories, *above}, key=lambda path: (path.count("/"), path))
        manifest = Manifest(
            format=FORMAT_NAME,
            version=(FORMAT_MAJOR, FORMAT_MINOR),
            checkpoint_id=attempt.attempt_id,
            replaces=attempt.replaces,
            sequence=f"{attempt.sequence:012d}",
            name=name,
            epoch=run.epoch,
            step=run.step,
            sample_start_index=run.sample_start_index,
            created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            library=f"shardpoint {__version__}",
            world_size=comm.world_size,
            roles=[""],
            metrics={},
            files=files,
            tensors=[],
        )
        commit_or_unknown(attempt, partial(publish, attempt, documents, manifest))
        return _Committed(attempt.sequence, manifest.total_bytes)

    try:
        facts = f"{name}: epoch {run.epoch}, step {run.step}, sample {run.sample_start_index}"
        opened = agree(comm, "save: open", lambda: facts, str, decide_open, _Opened)
        agree(comm, "save: write", lambda: run_write(opened), bool, lambda _: True, bool)
        agree(comm, "save: sync", lambda: sync_all(opened), bool, lambda _: True, bool)
        try:
            committed = agree(comm, "save: commit", lambda: True, bool, commit, _Committed)
        except CollectiveTimeout as error:
            if not comm.is_coordinator and 0 in error.waiting_for:
                text = f"rank {comm.rank} heard no verdict on {name} ({error}): it was committed if its id is "
                raise CommitUnknownError(text + opened.attempt_id, attempt_id=opened.attempt_id) from error
            raise
    except BaseException as error:
        if attempt is not None and not isinstance(error, CommitUnknownError):
            attempt.abandon(error)
        raise
    finally:
        if hold is not None and owner is None:
            hold.release()
    result = SaveResult(
        name,
        f"{store.location}/{name}",
        opened.attempt_id,
        committed.sequence,
        committed.num_bytes,
        0,
        0,
        time.monotonic() - began,
        ("written by another library: checksums are per file",),
    )
    if comm.is_coordinator:
        listener(Event("committed", f"committed {result.path}: {result.num_bytes / 1e6:.1f} MB", name))
    return result


def _files(store: Store, key: str) -> list[str]:
    found: list[str] = []
    pending = [""]
    while pending:
        directory = pending.pop()
        for entry in store.entries(f"{key}/{directory}" if directory else key):
            path = f"{directory}/{entry.name}" if directory else entry.name
            (pending if entry.is_directory else found).append(path)
    return sorted(found)


def _hash_file(store: Store, key: str, path: str, progress: Callable[[int], None]) -> FileEntry:
    reader = store.open_reader(f"{key}/{path}")
    try:
        crc, buffer = 0, memoryview(bytearray(min(CHUNK_BYTES, max(reader.size_bytes, 1))))
        for start in range(0, reader.size_bytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, reader.size_bytes - start)]
            reader.read_into(chunk, start)
            crc = crc64(chunk, crc)
            progress(len(chunk))
        return FileEntry(path, reader.size_bytes, to_hex(crc))
    finally:
        reader.close()


def load_foreign(comm: Comm, source: Source, check: Callable[[], None], read: Callable[[str], None]) -> None:
    """Verify a checkpoint that another library wrote, then let that library load it.

    Args:
        comm: the ranks; they share the verification.
        source: the checkpoint; files without a manifest are handed over unverified.
        check: called on every rank once the files are verified; raises alike on all where they must not be loaded.
        read: called on every rank with the checkpoint's path.

    Raises:
        CorruptionError: a file is not what was committed; nothing was loaded.
        PeerError: a rank failed.

    Collective:
        All ranks: two rounds, and whatever `check` and `read` do.
    """

    def verify() -> bool:
        verify_share(source, comm)
        return True

    agree(comm, "load: verify", verify, bool, lambda _: True, bool)
    check()

    def load_it() -> bool:
        read(source.store.local_path(source.key))
        return True

    agree(comm, "load: read", load_it, bool, lambda _: True, bool)


def verify_share(source: Source, comm: Comm) -> None:
    """Verify this rank's share of a checkpoint's files; without a manifest there is nothing to verify them by.

    Raises:
        CorruptionError: a file is not what was committed.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
    """
    if not source.sealed:
        return
    for entry in source.manifest.files[comm.rank :: comm.world_size]:
        try:
            found = _hash_file(source.store, source.key, entry.path, comm.progress)
        except NotFoundError as error:
            raise source.gone(entry.path, error) from error
        if found.size_bytes != entry.size_bytes:
            text = f"{entry.path} of {source.manifest.name} has {found.size_bytes} bytes, not {entry.size_bytes}"
            raise TruncatedError(text, key=entry.path, expected=str(entry.size_bytes), actual=str(found.size_bytes))
        if found.crc64nvme != entry.crc64nvme:
            text = f"{entry.path} of {source.manifest.name} does not have the checksum that was committed"
            raise ChecksumError(text, key=entry.path, expected=entry.crc64nvme, actual=found.crc64nvme)
