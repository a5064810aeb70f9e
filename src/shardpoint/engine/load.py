"""In which order a load happens: resolve, collect the target, match, read, verify, install.

Until the match is made nothing of the target changes. What is found afterwards is a `CorruptionError` with
`target_modified=True`. Documents (groups, scheduler, sampler, random state) are read and checked before any tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.optimizer import unplaced_members
from shardpoint.checksum import merge_packed, pack_partials, to_hex, whole_tensors
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree, with_modified_target
from shardpoint.engine.reading import check_files, read_tensors
from shardpoint.engine.results import LoadResult
from shardpoint.engine.source import Source
from shardpoint.engine.structure import (
    StructureBallot,
    StructureCache,
    StructureVerdict,
    decide_structure,
    digest_of,
    merge_sent,
    settle,
)
from shardpoint.errors import CheckpointError, ChecksumError, DistributedError, NotFoundError
from shardpoint.planning import Match, MergedTable, encode_table, match_target


@dataclass(frozen=True)
class Target:
    """What a load fills.

    Attributes:
        collected: this rank's tensors and optimizers, with what does not fit.
        parts: the parts of the checkpoint that are loaded.
        install: puts optimizer states, schedulers, samplers and random state in place, once every tensor is verified.
    """

    collected: Collected
    parts: frozenset[str]
    install: Callable[[], None]


class _Resolved(msgspec.Struct, frozen=True):
    checkpoint_id: str
    sealed: bool


class _Contribution(msgspec.Struct, frozen=True):
    table: bytes
    problems: list[str]
    missing: list[str]
    unexpected: list[str]


class _Matched(msgspec.Struct, frozen=True):
    merged: bytes
    tables: list[tuple[list[int], bytes]]


class _Read(msgspec.Struct, frozen=True):
    partials: bytes
    num_bytes: int


def _merge_read(ballots: Sequence[_Read]) -> _Read:
    return _Read(merge_packed([ballot.partials for ballot in ballots]), sum(ballot.num_bytes for ballot in ballots))


class _Done(msgspec.Struct, frozen=True):
    ok: bool = True


def load(
    comm: Comm,
    open_source: Callable[[], Source],
    prepare: Callable[[Source], Target],
    cache: StructureCache,
    *,
    strict: bool = True,
) -> LoadResult:
    """Load into live objects.

    Args:
        comm: the ranks.
        open_source: opens the checkpoint, on every rank; all must find the same one.
        prepare: makes the target for a checkpoint; must not change anything.
        cache: this process's, kept between loads.
        strict: whether missing and unexpected names are errors.

    Returns:
        The evidence of this rank.

    Raises:
        NotFoundError: there is no such checkpoint.
        TornCheckpointError: it was never committed.
        UnsupportedFormatError: a newer format.
        MismatchError: checkpoint and target differ; nothing was changed.
        CorruptionError: bytes disagree; `target_modified` tells whether the target was changed before it showed.
        PeerError: a rank failed otherwise.
        CollectiveTimeout: ranks fell silent.

    Collective:
        All ranks: five rounds.
    """
    began = time.monotonic()
    source: Source | None = None
    target: Target | None = None

    def resolve() -> _Resolved:
        nonlocal source
        source = open_source()
        return _Resolved(source.manifest.checkpoint_id, source.sealed)

    agree(comm, "load: resolve", resolve, _Resolved, _check_same, _Resolved)
    assert source is not None  # noqa: S101 - the round succeeded, so `resolve` did
    found: Source = source

    def collect() -> StructureBallot:
        nonlocal target
        target = prepare(found)
        table = digest_of(encode_table(target.collected.table))
        return StructureBallot(table, cache.key_for(table), b"", "")

    structure = agree(
        comm,
        "load: structure",
        collect,
        StructureBallot,
        lambda ballots: decide_structure(ballots, cache),
        StructureVerdict,
    )
    assert target is not None  # noqa: S101 - the round succeeded, so `collect` did
    ready: Target = target
    own = ready.collected

    def contribute() -> _Contribution:
        # Order: a file that is missing or short is found here, before any byte of the target changes.
        check_files(found, ready.parts)
        sends = any(comm.rank == sender for sender, _ in structure.table_senders)
        table = encode_table(own.table) if sends else b""
        return _Contribution(table, own.problems, own.missing, own.unexpected)

    def decide_match(ballots: Sequence[_Contribution]) -> _Matched:
        tables = [(ranks, ballots[sender].table) for sender, ranks in structure.table_senders]
        merged = merge_sent(tables, comm.world_size) if tables else cache.get(structure.key)
        assert merged is not None  # noqa: S101 - `decide_structure` asks for tables unless they are cached
        problems = _distinct(ballot.problems for ballot in ballots)
        for optimizer in own.optimizers:
            problems += unplaced_members(optimizer.document, optimizer.part, merged.members)
        match_target(
            merged,
            found.manifest,
            ready.parts,
            problems=problems,
            missing=_distinct(ballot.missing for ballot in ballots),
            unexpected=_distinct(ballot.unexpected for ballot in ballots),
            strict=strict,
        )
        return _Matched(merged.digest, tables)

    matched = agree(comm, "load: match", contribute, _Contribution, decide_match, _Matched)

    plan: tuple[MergedTable, Match] | None = None
    num_bytes = 0

    def read() -> _Read:
        nonlocal plan, num_bytes
        merged = settle(cache, structure, own.table, matched.tables, matched.merged, comm.world_size)
        plan = merged, match_target(merged, found.manifest, ready.parts, strict=strict)
        try:
            partials, num_bytes = read_tensors(found, *plan, own.held, comm.rank, comm.progress)
        except CheckpointError as error:
            raise with_modified_target(error) from error.__cause__
        return _Read(pack_partials(partials), num_bytes)

    def verify(ballots: Sequence[_Read]) -> _Done:
        assert plan is not None  # noqa: S101 - every rank has voted, so `read` ran here
        return _verify(found, *plan, ballots)

    agree(comm, "load: read", read, _Read, verify, _Done, _merge_read)
    assert plan is not None  # noqa: S101 - the round succeeded, so `read` did
    match = plan[1]

    def install() -> _Done:
        ready.install()
        return _Done()

    agree(comm, "load: install", install, _Done, lambda _: _Done(), _Done)
    missing = {(e.part, e.key) for e, index in zip(plan[0].entries, match.stored, strict=True) if index is None}
    return LoadResult(
        found.manifest.name,
        num_bytes,
        len(own.held.keys() - missing),
        time.monotonic() - began,
        found.sealed,
        match.missing,
        match.unexpected,
    )


def _distinct(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(item for listed in lists for item in listed))


def _check_same(ballots: Sequence[_Resolved]) -> _Resolved:
    ids = {ballot.checkpoint_id: rank for rank, ballot in enumerate(ballots)}
    if len(ids) > 1:
        text = (
            f"the ranks see different checkpoints of one name ({ids}): it was replaced in this moment, or caches differ"
        )
        raise NotFoundError(text)
    return ballots[0]


def _verify(source: Source, target: MergedTable, match: Match, ballots: Sequence[_Read]) -> _Done:
    if not source.sealed:
        return _Done()
    whole = whole_tensors([ballot.partials for ballot in ballots], [entry.num_bytes for entry in target.entries])
    for index, (entry, stored_index) in enumerate(zip(target.entries, match.stored, strict=True)):
        if stored_index is None:
            continue
        stored = source.manifest.tensors[stored_index]
        path = source.manifest.files[stored.file].path
        if not whole.covered[index]:
            text = (
                f"{entry.label}: the ranks together read {whole.counted_bytes[index]} of {entry.num_bytes} bytes: some "
                "of its holders do not take part in this load"
            )
            raise DistributedError(text)
        actual = to_hex(whole.crcs[index])
        if actual != stored.crc64nvme:
            text = (
                f"{path} of {source.manifest.name} is damaged: tensor {stored.key} does not have the checksum that was "
                "committed. The target holds damaged values now: load another checkpoint before going on"
            )
            key = f"{path}#{stored.key}"
            raise ChecksumError(text, key=key, expected=stored.crc64nvme, actual=actual, target_modified=True)
    return _Done()
