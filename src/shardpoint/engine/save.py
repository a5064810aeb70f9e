"""In which order a save happens: collect, agree on the structure, open the attempt, write, vote, commit.

Three rounds. Whatever goes wrong before the third is decided, on any rank, fails all ranks, and the previous checkpoint
stands. A rank that voted in the third and heard no verdict does not know, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from shardpoint import __version__
from shardpoint.adapters.collect import GROUPS_NAME, Collected, join
from shardpoint.adapters.exchange import open_exchange
from shardpoint.adapters.state import RunState
from shardpoint.checksum import combine, crc64, merge_packed, pack_partials, to_hex, whole_tensors
from shardpoint.comm import Comm
from shardpoint.commit import Attempt, RootOwner, acquire_root, publish, publish_file
from shardpoint.engine.ballots import agree
from shardpoint.engine.gathering import write_gathered
from shardpoint.engine.results import SaveResult
from shardpoint.engine.structure import (
    StructureBallot,
    StructureCache,
    StructureVerdict,
    decide_structure,
    digest_of,
    merge_sent,
    settle,
)
from shardpoint.engine.writing import write_items
from shardpoint.errors import CollectiveTimeout, CommitUnknownError, DistributedError, UsageError
from shardpoint.events import Event, Listener, log_event
from shardpoint.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    decode_document,
    encode_document,
    metric_value,
)
from shardpoint.planning import (
    Layout,
    MergedTable,
    PartNaming,
    encode_table,
    index_document,
    merge_optimizer_documents,
)
from shardpoint.storage import Store, SyncPoint, kernel_id

MAX_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved.

    Attributes:
        name: the name to commit to, one path component.
        collect: makes this rank's items; its errors are those of this rank.
        run: position in training, or None for a directory that is not a training checkpoint.
        roles: the models' names.
        metrics: what the trainer passed along.
        documents: path -> contents, for documents that the caller gives, the same on all ranks.
        max_file_bytes: the largest tensor file.
        as_file: commit the only tensor file itself, not a directory.
    """

    name: str
    collect: Callable[[], Collected]
    run: RunState | None = None
    roles: Sequence[str] = ("",)
    metrics: Mapping[str, float] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    max_file_bytes: int = MAX_FILE_BYTES
    as_file: bool = False


class _Documents(msgspec.Struct, frozen=True):
    """A rank's documents: those that must be equal, and its optimizers' by part."""

    shared: dict[str, bytes]
    optimizers: dict[str, bytes]


class _Contribution(msgspec.Struct, frozen=True):
    table: bytes = b""
    documents: _Documents | None = None


class _Opened(msgspec.Struct, frozen=True):
    key: str
    attempt_id: str
    merged: bytes
    layout: bytes
    tables: list[tuple[list[int], bytes]]
    gather: bool


class _Written(msgspec.Struct, frozen=True):
    """What some ranks wrote: the attempts in which (each with its lowest rank), and each rank's own documents."""

    attempts: dict[str, int]
    partials: bytes
    files: dict[int, list[FileEntry]]


def _merge_written(ballots: Sequence[_Written]) -> _Written:
    attempts: dict[str, int] = {}
    for ballot in ballots:
        for attempt_id, rank in ballot.attempts.items():
            attempts[attempt_id] = min(rank, attempts.get(attempt_id, rank))
    files = {rank: entries for ballot in ballots for rank, entries in ballot.files.items()}
    return _Written(attempts, merge_packed([ballot.partials for ballot in ballots]), files)


class _Committed(msgspec.Struct, frozen=True):
    name: str
    checkpoint_id: str
    sequence: int
    num_bytes: int
    num_tensors: int
    notes: list[str]


@dataclass
class _Coordinator:
    """What only the coordinator has while a save is under way."""

    owner: RootOwner | None = None
    attempt: Attempt | None = None
    merged: MergedTable | None = None
    layout: Layout | None = None
    documents: dict[str, bytes] = field(default_factory=dict)


def save(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    cache: StructureCache,
    *,
    owner: RootOwner | None = None,
    listener: Listener = log_event,
) -> SaveResult:
    """Save, all or nothing.

    Args:
        store: the root.
        comm: the ranks.
        request: what to save.
        cache: this process's, kept between saves.
        owner: on the coordinator, the run's hold on the root: a save that finds it lost fails. Without one the root is
            owned for this save only.
        listener: told of what was committed.

    Returns:
        The evidence, on every rank.

    Raises:
        UsageError: the ranks asked for different saves, or something cannot be saved.
        RootBusyError: another living run owns the root.
        FencedError: `owner` was given, and another run took the root over since.
        AlreadyExistsError: something that is not a committed checkpoint has the name.
        StorageError: with one rank; with more it is in a `PeerError`.
        PeerError: at least one rank failed; nothing was committed.
        CollectiveTimeout: ranks fell silent; nothing was committed.
        CommitUnknownError: this rank voted and heard no verdict.

    Collective:
        All ranks: three rounds.

    Durability:
        On return the checkpoint is committed and survives power loss.

    Memory:
        16 MiB of staging per rank, and a whole shard at a time for tensors that are not contiguous in host memory.
    """
    began = time.monotonic()
    coordinator = _Coordinator(owner)
    try:
        committed = _rounds(store, comm, request, cache, coordinator, listener)
    except BaseException as error:
        # Order: an attempt whose verdict is unknown is left to the next owner of the root.
        if coordinator.attempt is not None and not isinstance(error, CommitUnknownError):
            coordinator.attempt.abandon(error)
        raise
    finally:
        if coordinator.owner is not None and owner is None:
            coordinator.owner.release()
    result = SaveResult(
        committed.name,
        join(store.location, committed.name),
        committed.checkpoint_id,
        committed.sequence,
        committed.num_bytes,
        committed.num_tensors,
        time.monotonic() - began,
        tuple(committed.notes),
    )
    if comm.is_coordinator:
        text = f"committed {result.path}: {result.num_bytes / 1e6:.1f} MB in {result.seconds:.2f} s"
        listener(Event("committed", text, result.name))
    return result


def _rounds(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    cache: StructureCache,
    coordinator: _Coordinator,
    listener: Listener,
) -> _Committed:
    collected: Collected | None = None

    def gather() -> StructureBallot:
        nonlocal collected
        collected = request.collect()
        table = digest_of(encode_table(collected.table))
        documents = digest_of(msgspec.msgpack.encode(_own_documents(request, collected), order="sorted"))
        return StructureBallot(table, cache.key_for(table), documents, _agreed_facts(request, collected), kernel_id())

    structure = agree(
        comm, "save: structure", gather, StructureBallot, lambda ballots: _structure(ballots, cache), StructureVerdict
    )
    assert collected is not None  # noqa: S101 - the round succeeded, so `gather` did
    own = collected

    opened = agree(
        comm,
        "save: open",
        lambda: _contribute(comm, request, own, structure),
        _Contribution,
        lambda ballots: _open(store, comm, request, own, structure, ballots, cache, coordinator, listener),
        _Opened,
    )
    try:
        return agree(
            comm,
            "save: commit",
            lambda: _write(store, comm, request, own, structure, opened, cache),
            _Written,
            lambda ballots: _commit(comm, request, _merge_written(ballots), coordinator),
            _Committed,
            _merge_written,
        )
    except CollectiveTimeout as error:
        if not comm.is_coordinator and 0 in error.waiting_for:
            text = (
                f"rank {comm.rank} wrote its part of {request.name} and heard no verdict ({error}). Whether it was "
                f"committed shows `shardpoint show {join(store.location, request.name)}`: it was if the checkpoint's "
                f"id is {opened.attempt_id}. The next run on this root settles it"
            )
            raise CommitUnknownError(text, attempt_id=opened.attempt_id) from error
        raise


def _own_documents(request: SaveRequest, collected: Collected) -> _Documents:
    optimizers = {part: encode_document(value) for part, value in collected.optimizer_documents.items()}
    return _Documents({**collected.documents, **request.documents}, optimizers)


def _agreed_facts(request: SaveRequest, collected: Collected) -> str:
    run = request.run
    headers = {
        part: digest_of(msgspec.json.encode(naming.metadata)).hex()
        for part, naming in collected.naming.items()
        if naming.metadata
    }
    position = f"epoch {run.epoch}, step {run.step}, sample {run.sample_start_index}" if run else "no position"
    # Metrics may legitimately differ (a rank's own loss): the coordinator's are stored.
    return f"{request.name}: {position}, roles {list(request.roles)}, headers {headers}"


def _structure(ballots: Sequence[StructureBallot], cache: StructureCache) -> StructureVerdict:
    positions = {ballot.facts: rank for rank, ballot in reversed(list(enumerate(ballots)))}
    if len(positions) > 1:
        text = "the ranks asked for different saves: " + "; ".join(
            f"rank {rank}: {facts}" for facts, rank in sorted(positions.items(), key=lambda item: item[1])
        )
        raise UsageError(text)
    return decide_structure(ballots, cache)


def _contribute(comm: Comm, request: SaveRequest, own: Collected, structure: StructureVerdict) -> _Contribution:
    sends_table = any(comm.rank == sender for sender, _ in structure.table_senders)
    sends_documents = comm.rank in structure.document_senders
    return _Contribution(
        encode_table(own.table) if sends_table else b"",
        _own_documents(request, own) if sends_documents else None,
    )


def _open(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    own: Collected,
    structure: StructureVerdict,
    ballots: Sequence[_Contribution],
    cache: StructureCache,
    coordinator: _Coordinator,
    listener: Listener,
) -> _Opened:
    tables = [(ranks, ballots[sender].table) for sender, ranks in structure.table_senders]
    merged = merge_sent(tables, comm.world_size) if tables else cache.get(structure.key)
    assert merged is not None  # noqa: S101 - `decide_structure` asks for tables unless they are cached
    layout = cache.plans.layout(merged, _naming(own, merged), request.max_file_bytes)
    sent = [ballots[rank].documents for rank in structure.document_senders]
    coordinator.documents = _merge_documents([documents for documents in sent if documents is not None])
    coordinator.documents |= own.coordinator_documents
    for part, naming in own.naming.items():
        if not naming.single and any(file.part == part for file in layout.files):
            coordinator.documents[join(part, naming.index_name)] = index_document(layout, part)
    if coordinator.owner is None:
        coordinator.owner = acquire_root(store, listener=listener)
    directories = {path.rpartition("/")[0] for path in (*coordinator.documents, *own.rank_documents)} - {""}
    coordinator.attempt = Attempt.open(
        store,
        coordinator.owner,
        request.name,
        files={file.path: file.layout for file in layout.files},
        directories=directories,
        replace_file=request.as_file,
    )
    coordinator.merged, coordinator.layout = merged, layout
    sharing = store.shared_files
    gather = comm.world_size > 1 and (sharing == "never" or (sharing == "one_host" and not structure.one_host))
    attempt = coordinator.attempt
    return _Opened(attempt.key, attempt.attempt_id, merged.digest, layout.digest, tables, gather)


def _naming(own: Collected, merged: MergedTable) -> dict[str, PartNaming]:
    filled = {entry.part for entry in merged.entries}
    return {part: naming for part, naming in own.naming.items() if naming.single or part in filled}


def _merge_documents(sent: Sequence[_Documents]) -> dict[str, bytes]:
    merged: dict[str, bytes] = {}
    for documents in sent:
        for path, data in documents.shared.items():
            if merged.setdefault(path, data) != data:
                text = f"{path} differs between ranks: it must be the same on all of them"
                raise UsageError(text)
    for part in sorted({part for documents in sent for part in documents.optimizers}):
        decoded = [decode_document(d.optimizers[part], part) for d in sent if part in d.optimizers]
        merged[join(part, GROUPS_NAME)] = encode_document(merge_optimizer_documents(decoded, part))
    return merged


def _write(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    own: Collected,
    structure: StructureVerdict,
    opened: _Opened,
    cache: StructureCache,
) -> _Written:
    merged = settle(cache, structure, own.table, opened.tables, opened.merged, comm.world_size)
    layout = cache.plans.layout(merged, _naming(own, merged), request.max_file_bytes)
    if layout.digest != opened.layout:
        raise UsageError(
            f"rank {comm.rank} lays out the files of {request.name} differently than the coordinator: give all ranks "
            "the same largest file size, variant and adapters"
        )
    if opened.gather:
        partials = write_gathered(
            store, opened.key, merged, layout, own.held, comm.rank, comm.world_size, open_exchange(), comm.progress
        )
    else:
        items = list(cache.plans.items(merged, comm.rank))
        partials = write_items(store, opened.key, merged, layout, items, own.held, comm.progress)
    entries: list[FileEntry] = []
    for path, data in own.rank_documents.items():
        store.write_document(f"{opened.key}/{path}", data, SyncPoint.DOCUMENT)
        entries.append(FileEntry(path, len(data), to_hex(crc64(data))))
    return _Written({opened.attempt_id: comm.rank}, pack_partials(partials), {comm.rank: entries} if entries else {})


def _commit(comm: Comm, request: SaveRequest, written: _Written, coordinator: _Coordinator) -> _Committed:
    attempt, merged, layout = coordinator.attempt, coordinator.merged, coordinator.layout
    assert attempt is not None and merged is not None and layout is not None  # noqa: S101, PT018 - opened before
    strangers = {rank: other for other, rank in written.attempts.items() if other != attempt.attempt_id}
    if strangers:
        text = f"ranks voted on another attempt than {attempt.attempt_id}; the lowest of each: {strangers}"
        raise DistributedError(text)
    crcs = _whole_crcs(merged, written)
    documents = coordinator.documents
    files, tensors = _entries(merged, layout, crcs)
    files += [FileEntry(path, len(data), to_hex(crc64(data))) for path, data in documents.items()]
    files += [entry for _, entries in sorted(written.files.items()) for entry in entries]
    manifest = Manifest(
        format=FORMAT_NAME,
        version=(FORMAT_MAJOR, FORMAT_MINOR),
        checkpoint_id=attempt.attempt_id,
        replaces=attempt.replaces,
        sequence=f"{attempt.sequence:012d}",
        name=attempt.name,
        epoch=request.run.epoch if request.run else None,
        step=request.run.step if request.run else None,
        sample_start_index=request.run.sample_start_index if request.run else None,
        created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        library=f"shardpoint {__version__}",
        world_size=comm.world_size,
        roles=list(request.roles),
        metrics={name: metric_value(value) for name, value in request.metrics.items()},
        files=files,
        tensors=tensors,
    )
    if request.as_file:
        commit_or_unknown(attempt, lambda: publish_file(attempt, layout.files[0].path))
    else:
        commit_or_unknown(attempt, lambda: publish(attempt, documents, manifest))
    total = sum(entry.size_bytes for entry in files)
    return _Committed(attempt.name, attempt.attempt_id, attempt.sequence, total, len(tensors), attempt.notes)


def commit_or_unknown(attempt: Attempt, work: Callable[[], None]) -> None:
    """Commit, and turn an interruption in the middle of it into an error that says what is not known.

    Raises:
        CommitUnknownError: the rename may have happened; peers must not hear "failed".
        CheckpointError: what `work` raised.
    """
    try:
        work()
    except Exception:
        raise
    except BaseException as error:
        text = (
            f"the commit of {attempt.name} was interrupted ({error!r}): look whether it has the id {attempt.attempt_id}"
        )
        raise CommitUnknownError(text, attempt_id=attempt.attempt_id) from error


def _whole_crcs(merged: MergedTable, written: _Written) -> list[int]:
    """Return the tensors' checksums; refuse a tensor of which a byte has no writer, or two."""
    whole = whole_tensors([written.partials], [entry.num_bytes for entry in merged.entries])
    holes = [
        f"{entry.label}: {counted_bytes} of {entry.num_bytes} bytes"
        for entry, counted_bytes, covered in zip(merged.entries, whole.counted_bytes, whole.covered, strict=True)
        if not covered
    ]
    if holes:
        text = "the ranks together did not write every byte exactly once; nothing was committed:\n  " + "\n  ".join(
            holes
        )
        raise DistributedError(text)
    return whole.crcs


def _entries(merged: MergedTable, layout: Layout, crcs: Sequence[int]) -> tuple[list[FileEntry], list[TensorEntry]]:
    tensors = [
        TensorEntry(
            entry.part,
            entry.fqn,
            entry.state,
            entry.key,
            entry.dtype,
            entry.shape,
            placed.file,
            placed.byte_offset,
            placed.num_bytes,
            to_hex(crc),
        )
        for entry, placed, crc in zip(merged.entries, layout.tensors, crcs, strict=True)
    ]
    tensors.sort(key=lambda tensor: (tensor.file, tensor.byte_offset, tensor.num_bytes))
    file_crcs = [crc64(file.layout.header) for file in layout.files]
    for tensor in tensors:
        file_crcs[tensor.file] = combine(file_crcs[tensor.file], int(tensor.crc64nvme, 16), tensor.num_bytes)
    files = [
        FileEntry(file.path, file.layout.num_bytes, to_hex(crc))
        for file, crc in zip(layout.files, file_crcs, strict=True)
    ]
    return files, tensors
