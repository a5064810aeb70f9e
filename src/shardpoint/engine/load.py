"""In which order a load happens: resolve, collect the target, match, read, verify, install.

Until the match is made nothing of the target changes. What is found afterwards is a `CorruptionError` with
`target_modified=True`. Documents (groups, scheduler, sampler, random state) are read and checked before any tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import torch

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.optimizer import unplaced_members
from shardpoint.checksum import merge_packed, pack_partials, to_hex, whole_tensors
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree, with_modified_target
from shardpoint.engine.reading import Filled, check_files, read_tensors
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
from shardpoint.errors import CheckpointError, ChecksumError, DistributedError, NotFoundError, UsageError
from shardpoint.planning import PIECE_BYTES, Allowances, Match, MergedTable, encode_table, match_target
from shardpoint.storage import BufferPool

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """What a load fills.

    Attributes:
        collected: this rank's tensors and optimizers, with what does not fit.
        parts: the parts of the checkpoint that are loaded.
        install: puts optimizer states, schedulers, samplers and random state in place, once every tensor is verified.
        behind: those of the parts that may be filled after `install`, which leaves them out.
        install_behind: puts those in place.
        allowed: what may differ between the two.
    """

    collected: Collected
    parts: frozenset[str]
    install: Callable[[], None]
    behind: frozenset[str] = frozenset()
    install_behind: Callable[[], None] = lambda: None
    allowed: Allowances = field(default_factory=Allowances)


class _Resolved(msgspec.Struct, frozen=True):
    checkpoint_id: str
    sealed: bool


class _Contribution(msgspec.Struct, frozen=True):
    table: bytes
    problems: list[str]
    missing: list[str]
    unexpected: list[str]
    missing_of: list[tuple[str, str]]
    unexpected_of: list[tuple[str, str]]
    allowed: Allowances


class _Matched(msgspec.Struct, frozen=True):
    merged: bytes
    tables: list[tuple[list[int], bytes]]
    missing: list[str]
    unexpected: list[str]
    idle: list[str]


class _Read(msgspec.Struct, frozen=True):
    partials: bytes


def _merge_read(ballots: Sequence[_Read]) -> _Read:
    return _Read(merge_packed([ballot.partials for ballot in ballots]))


class _Done(msgspec.Struct, frozen=True):
    ok: bool = True


class Fitting:
    """A checkpoint and a target that fits it, before a byte of the target has changed.

    Attributes:
        source: the checkpoint.
        target: what is to be filled.
        missing: what the checkpoint lacks and may lack, on any rank.
        unexpected: what it has and the target may lack.
        idle: patterns of the allowances that no name matches.
    """

    def __init__(self, source: Source, target: Target, settle_table: Callable[[], MergedTable], told: _Matched) -> None:
        self.source = source
        self.target = target
        self.missing, self.unexpected, self.idle = tuple(told.missing), tuple(told.unexpected), tuple(told.idle)
        self._settle_table = settle_table
        self._plan: tuple[MergedTable, Match] | None = None

    def plan(self) -> tuple[MergedTable, Match]:
        """Return the target's merged table, with the dtypes that are stored, and which stored tensor fills which entry.

        Raises:
            DistributedError: this rank's merged table is not the coordinator's; so the first call is inside a round.
        """
        if self._plan is None:
            merged = self._settle_table()
            # The coordinator has decided what may be left; here it is only looked up.
            match = match_target(
                merged, self.source.manifest, self.target.parts, strict=False, allowed=self.target.allowed
            )
            self._plan = match.as_stored(merged, self.source.manifest), match
        return self._plan


def load(
    comm: Comm,
    open_source: Callable[[], Source],
    prepare: Callable[[Source], Target],
    cache: StructureCache,
    *,
    strict: bool = True,
    pool: BufferPool | None = None,
) -> LoadResult:
    """Load into live objects.

    Args:
        comm: the ranks.
        open_source: opens the checkpoint, on every rank; all must find the same one.
        prepare: makes the target for a checkpoint; must not change anything.
        cache: this process's, kept between loads.
        strict: whether missing and unexpected names are errors.
        pool: lends memory for reads past the page cache.

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
    fitting = fit_target(comm, open_source, prepare, cache, strict=strict)
    filled = fill_target(comm, fitting, fitting.target.parts, pool=pool)
    install(comm, fitting.target.install)
    return result_of(fitting, filled, time.monotonic() - began)


def fit_target(
    comm: Comm,
    open_source: Callable[[], Source],
    prepare: Callable[[Source], Target],
    cache: StructureCache,
    *,
    strict: bool = True,
) -> Fitting:
    """Do all of a load that changes nothing: resolve, collect the target, match (arguments and errors as `load`).

    Collective:
        All ranks: three rounds.
    """
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
        with torch.no_grad():  # once: entering the mode for each tensor costs as much as looking at it
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
        return _Contribution(
            table, own.problems, own.missing, own.unexpected, own.missing_of, own.unexpected_of, ready.allowed
        )

    def decide_match(ballots: Sequence[_Contribution]) -> _Matched:
        tables = [(ranks, ballots[sender].table) for sender, ranks in structure.table_senders]
        merged = merge_sent(tables, comm.world_size) if tables else cache.get(structure.key)
        assert merged is not None  # noqa: S101 - `decide_structure` asks for tables unless they are cached
        if any(ballot.allowed != ballots[0].allowed for ballot in ballots):
            raise UsageError("allow_missing, allow_unexpected or allow_cast differ between the ranks")
        problems = _distinct(ballot.problems for ballot in ballots)
        unexpected_of = _distinct(ballot.unexpected_of for ballot in ballots)
        for optimizer in own.optimizers:
            never, left = unplaced_members(optimizer.document, optimizer.part, merged.members)
            problems += never
            unexpected_of += left
        match = match_target(
            merged,
            found.manifest,
            ready.parts,
            problems=problems,
            missing=_distinct(ballot.missing for ballot in ballots),
            unexpected=_distinct(ballot.unexpected for ballot in ballots),
            strict=strict,
            allowed=ready.allowed,
            missing_of=_distinct(ballot.missing_of for ballot in ballots),
            unexpected_of=unexpected_of,
        )
        return _Matched(merged.digest, tables, list(match.missing), list(match.unexpected), list(match.idle))

    matched = agree(comm, "load: match", contribute, _Contribution, decide_match, _Matched)

    def settle_table() -> MergedTable:
        return settle(cache, structure, own.table, matched.tables, matched.merged, comm.world_size)

    return Fitting(found, ready, settle_table, matched)


def fill_target(
    comm: Comm,
    fitting: Fitting,
    parts: Collection[str],
    *,
    topic: str = "load: read",
    piece_bytes: int = PIECE_BYTES,
    before_each: Callable[[], None] = lambda: None,
    pool: BufferPool | None = None,
) -> Filled:
    """Read the tensors of some parts into the target, and verify them.

    Args:
        comm: the ranks.
        fitting: the checkpoint and the target.
        parts: which parts; a part is filled once.
        topic: of the round.
        piece_bytes: the largest read.
        before_each: called before each read, from any thread; what it raises ends the work.
        pool: lends memory for reads past the page cache.

    Raises:
        CorruptionError: bytes disagree, on every rank; `target_modified` is True.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        DistributedError: the ranks' reads do not cover every byte once.
        PeerError: a rank failed otherwise.
        CollectiveTimeout: ranks fell silent.

    Collective:
        All ranks: one round.
    """
    filled: Filled | None = None
    held = fitting.target.collected.held

    def read() -> _Read:
        nonlocal filled
        plan = fitting.plan()
        try:
            filled = read_tensors(
                fitting.source,
                *plan,
                held,
                comm.rank,
                comm.progress,
                parts=parts,
                piece_bytes=piece_bytes,
                before_each=before_each,
                pool=pool,
            )
        except CheckpointError as error:
            raise with_modified_target(error) from error.__cause__
        return _Read(pack_partials(filled.partials))

    def verify(ballots: Sequence[_Read]) -> _Done:
        return _verify(fitting.source, *fitting.plan(), parts, ballots)

    agree(comm, topic, read, _Read, verify, _Done, _merge_read)
    assert filled is not None  # noqa: S101 - the round succeeded, so `read` did
    return filled


def install(comm: Comm, put_in_place: Callable[[], None]) -> None:
    """Put in place what is assigned and not read into: optimizer states, schedulers, samplers, the random state.

    Raises:
        PeerError: it failed on a rank.
        CollectiveTimeout: ranks fell silent.

    Collective:
        All ranks: one round.
    """

    def work() -> _Done:
        put_in_place()
        return _Done()

    agree(comm, "load: install", work, _Done, lambda _: _Done(), _Done)


def result_of(fitting: Fitting, filled: Filled, seconds: float) -> LoadResult:
    """Return the evidence of what was filled."""
    _, match = fitting.plan()
    return LoadResult(
        fitting.source.manifest.name,
        filled.num_bytes,
        filled.num_tensors,
        seconds,
        fitting.source.sealed,
        fitting.missing,
        fitting.unexpected,
        filled.read_bytes,
        match.cast,
        fitting.idle,
    )


def _distinct(lists: Iterable[list[_T]]) -> list[_T]:
    return list(dict.fromkeys(item for listed in lists for item in listed))


def _check_same(ballots: Sequence[_Resolved]) -> _Resolved:
    ids = {ballot.checkpoint_id: rank for rank, ballot in enumerate(ballots)}
    if len(ids) > 1:
        text = (
            f"the ranks see different checkpoints of one name ({ids}): it was replaced in this moment, or caches differ"
        )
        raise NotFoundError(text)
    return ballots[0]


def _verify(
    source: Source, target: MergedTable, match: Match, parts: Collection[str], ballots: Sequence[_Read]
) -> _Done:
    if not source.sealed:
        return _Done()
    whole = whole_tensors([ballot.partials for ballot in ballots], [entry.num_bytes for entry in target.entries])
    for index, (entry, stored_index) in enumerate(zip(target.entries, match.stored, strict=True)):
        if stored_index is None or entry.part not in parts:
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
