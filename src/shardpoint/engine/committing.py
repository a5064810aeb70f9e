"""How votes become a committed checkpoint: every byte written exactly once, then the manifest, then the commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from shardpoint import __version__
from shardpoint.checksum import combine, crc64, merge_packed, to_hex, whole_tensors
from shardpoint.comm import Comm
from shardpoint.commit import Attempt, publish, publish_file
from shardpoint.engine.evidence import Evidence, merge_evidence
from shardpoint.engine.linking import unchanged_files
from shardpoint.engine.opening import CoordinatorState, SaveRequest
from shardpoint.errors import CommitUnknownError, DistributedError, TornSnapshotError
from shardpoint.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    FileEntry,
    Manifest,
    Suspect,
    TensorEntry,
    metric_value,
)
from shardpoint.planning import Layout, MergedTable


class Written(msgspec.Struct, frozen=True):
    """What some ranks voted: what they wrote is durable.

    Attributes:
        attempts: the attempts in which they wrote, each with its lowest rank.
        partials: packed, one for each tensor of which they wrote bytes.
        files: the documents that each rank wrote.
        notes: what a person should know of how they wrote.
        evidence: what they found in what they hold.
    """

    attempts: dict[str, int]
    partials: bytes
    files: dict[int, list[FileEntry]]
    notes: list[str]
    evidence: Evidence


def merge_written(ballots: Sequence[Written]) -> Written:
    """Make one vote of several."""
    attempts: dict[str, int] = {}
    for ballot in ballots:
        for attempt_id, rank in ballot.attempts.items():
            attempts[attempt_id] = min(rank, attempts.get(attempt_id, rank))
    files = {rank: entries for ballot in ballots for rank, entries in ballot.files.items()}
    notes = sorted({note for ballot in ballots for note in ballot.notes})
    partials = merge_packed([ballot.partials for ballot in ballots])
    return Written(attempts, partials, files, notes, merge_evidence([ballot.evidence for ballot in ballots]))


class Committed(msgspec.Struct, frozen=True):
    """What was committed."""

    name: str
    checkpoint_id: str
    sequence: int
    num_bytes: int
    linked_bytes: int
    num_tensors: int
    notes: list[str]
    suspect: Suspect | None


class Verdict(msgspec.Struct, frozen=True):
    """What the coordinator decided.

    Attributes:
        committed: what was committed; None where the ranks must tell first which tensors differ.
        differing: the groups of replicas of which they tell.
    """

    committed: Committed | None
    differing: list[int]


def commit_votes(
    comm: Comm, request: SaveRequest, written: Written, coordinator: CoordinatorState, suspect: Suspect | None
) -> Committed:
    """Commit what all ranks voted for; on the coordinator.

    Args:
        comm: the ranks.
        request: what was asked for.
        written: all votes.
        coordinator: the open attempt.
        suspect: what looked wrong.

    Raises:
        DistributedError: a byte was written by nobody, or twice; or ranks voted on another attempt.
        TornSnapshotError: what does not train changed between its checksum and its writing.
        CommitUnknownError: the rename may have happened.
        CheckpointError: as `publish`.
    """
    attempt, merged, layout = coordinator.attempt, coordinator.merged, coordinator.layout
    assert attempt is not None and merged is not None and layout is not None  # noqa: S101, PT018 - opened before
    strangers = {rank: other for other, rank in written.attempts.items() if other != attempt.attempt_id}
    if strangers:
        text = f"ranks voted on another attempt than {attempt.attempt_id}; the lowest of each: {strangers}"
        raise DistributedError(text)
    linked = coordinator.linked
    known = {
        index: crc for index, crc in coordinator.frozen_crcs.items() if layout.tensors[index].file in coordinator.linked
    }
    crcs = _whole_crcs(merged, written, known)
    torn = [merged.entries[index].label for index, crc in coordinator.frozen_crcs.items() if crcs[index] != crc]
    if torn:
        text = f"{len(torn)} tensors that do not train changed while they were saved (first {torn[0]})"
        raise TornSnapshotError(f"{text}: the snapshot is torn, nothing was committed")
    documents = coordinator.documents
    files, tensors = _entries(merged, layout, crcs, linked)
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
        suspect=suspect,
    )
    if request.as_file:
        commit_or_unknown(attempt, lambda: publish_file(attempt, layout.files[0].path))
    else:
        commit_or_unknown(attempt, lambda: publish(attempt, {}, manifest))
    coordinator.proven = unchanged_files(coordinator.last, layout, files)
    total = sum(entry.size_bytes for entry in files)
    linked_bytes = sum(entry.size_bytes for entry in files if entry.linked)
    notes = list(dict.fromkeys([*attempt.notes, *written.notes]))
    return Committed(
        attempt.name, attempt.attempt_id, attempt.sequence, total, linked_bytes, len(tensors), notes, suspect
    )


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


def _whole_crcs(merged: MergedTable, written: Written, known: Mapping[int, int]) -> list[int]:
    """Return the tensors' checksums; refuse a tensor of which a byte has no writer, or two.

    Args:
        merged: the table.
        written: all votes.
        known: entry -> checksum, for tensors that nobody was to write.
    """
    whole = whole_tensors([written.partials], [entry.num_bytes for entry in merged.entries])
    rows = enumerate(zip(merged.entries, whole.counted_bytes, whole.covered, strict=True))
    holes = [
        f"{entry.label}: {counted_bytes} of {0 if index in known else entry.num_bytes} bytes"
        for index, (entry, counted_bytes, covered) in rows
        if (counted_bytes if index in known else not covered)
    ]
    if holes:
        text = "the ranks together did not write every byte exactly once; nothing was committed:\n  " + "\n  ".join(
            holes
        )
        raise DistributedError(text)
    return [known.get(index, crc) for index, crc in enumerate(whole.crcs)]


def _entries(
    merged: MergedTable, layout: Layout, crcs: Sequence[int], linked: Mapping[int, int]
) -> tuple[list[FileEntry], list[TensorEntry]]:
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
        FileEntry(file.path, file.layout.num_bytes, to_hex(crc), linked.get(number, 0))
        for number, (file, crc) in enumerate(zip(layout.files, file_crcs, strict=True))
    ]
    return files, tensors
