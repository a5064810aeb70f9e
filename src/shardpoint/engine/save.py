"""In which order a save happens: collect, agree on the structure, open the attempt, write, vote, commit.

Three rounds, and one more each where a structure is new, where something is frozen or may be unchanged, where small
tensors are gathered, and where replicas differ and the ranks have to tell in what. Whatever goes wrong before the
last is decided, on any rank, fails all ranks, and the previous checkpoint stands. A rank that voted in the last and
heard no verdict does not know, and says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

from shardpoint.adapters.collect import Held
from shardpoint.adapters.documents import join
from shardpoint.adapters.exchange import open_exchange
from shardpoint.adapters.staging import Copier
from shardpoint.checksum import crc64, pack_partials, to_hex
from shardpoint.comm import Comm
from shardpoint.commit import RootOwner, write_documents
from shardpoint.engine.ballots import agree
from shardpoint.engine.committing import Committed, Verdict, Written, commit_votes, merge_written
from shardpoint.engine.evidence import MAX_GROUPS, Details, merge_details, suspicion
from shardpoint.engine.examining import Examination
from shardpoint.engine.frozen import checksum_frozen, find_unchanged, stage_frozen
from shardpoint.engine.gathering import ByteExchange, write_gathered
from shardpoint.engine.opening import (
    AgreedSave,
    CoordinatorState,
    OpenSave,
    SaveRequest,
    agree_on_structure,
    open_save,
)
from shardpoint.engine.plans import make_plan
from shardpoint.engine.results import SaveResult
from shardpoint.engine.small import gather_small
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.writing import OpenFiles, PieceSums, StagedChunk, in_file_order, stage_chunks, write_staged
from shardpoint.errors import CollectiveTimeout, CommitUnknownError
from shardpoint.events import Event, Listener, log_event
from shardpoint.manifest import FileEntry
from shardpoint.storage import BufferPool, Store, SyncPoint

BUDGET_BYTES = 64 * 2**20


def save(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    cache: StructureCache,
    *,
    pool: BufferPool,
    owner: RootOwner | None = None,
    listener: Listener = log_event,
) -> SaveResult:
    """Save, all or nothing.

    Args:
        store: the root.
        comm: the ranks.
        request: what to save.
        cache: this process's, kept between saves.
        pool: where staging memory comes from, kept between saves.
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
        All ranks: three rounds, and one more each where the structure is new, where something is frozen, where small
        tensors are gathered, and where replicas differ.

    Durability:
        On return the checkpoint is committed and survives power loss.

    Memory:
        The pool's buffers, up to 64 MiB of small tensors on the coordinator, and a whole shard at a time for tensors
        that are not contiguous in host memory.
    """
    attempt = SaveAttempt(store, request, cache, pool, owner=owner, listener=listener)
    with attempt.abandoned_on_error():
        agreed = attempt.agree(comm)
        opened = attempt.open(comm, agreed)
        staged = stage_chunks(agreed.table, agreed.plan.chunks, agreed.own.held, pool)
        return attempt.commit(comm, agreed, opened, staged, compare=Copier(agreed.own.held))


class SaveAttempt:
    """One save on one rank, from its first round to its last.

    Args:
        store: the root.
        request: what to save.
        cache: this process's.
        pool: where staging memory comes from.
        owner: on the coordinator, the run's hold on the root, or None: the root is owned for this save only.
        listener: told of the commit.
        exchange: gives the way between ranks, where each file has one writer.
    """

    def __init__(
        self,
        store: Store,
        request: SaveRequest,
        cache: StructureCache,
        pool: BufferPool,
        *,
        owner: RootOwner | None,
        listener: Listener,
        exchange: Callable[[], ByteExchange] = open_exchange,
    ) -> None:
        self._store = store
        self._request = request
        self._cache = cache
        self._pool = pool
        self._owner = owner
        self._listener = listener
        self._exchange = exchange
        self._coordinator = CoordinatorState(owner)
        self._small: dict[tuple[str, str], Held] = {}
        self._examination: Examination | None = None
        self._written: Written | None = None
        self._began = time.monotonic()

    @contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """Give the attempt up when what is done inside raises, and the root, where it was owned for this save only."""
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
        finally:
            self.release()

    def abandon(self, error: BaseException) -> None:
        """Delete what was made, unless it may have been committed."""
        self._cache.proven = frozenset()  # a save that failed proves nothing
        # Order: an attempt whose verdict is unknown is left to the next owner of the root.
        if self._coordinator.attempt is not None and not isinstance(error, CommitUnknownError):
            self._coordinator.attempt.abandon(error)

    def release(self) -> None:
        """Give the root up, where it was owned for this save only."""
        if self._coordinator.owner is not None and self._owner is None:
            self._coordinator.owner.release()

    def agree(self, comm: Comm) -> AgreedSave:
        """Agree on the structure, and on what is unchanged; raises as what it calls."""
        request = self._request
        agreed = agree_on_structure(comm, request, self._cache, self._pool.buffer_bytes)
        self._examination = Examination(agreed, comm.rank, request.name, request.check_replicas)
        return find_unchanged(
            self._store, comm, request, self._cache, agreed, self._coordinator, self._pool, self._examination
        )

    @property
    def examination(self) -> Examination:
        """What this rank finds out about its tensors; there once the ranks agreed."""
        assert self._examination is not None  # noqa: S101 - `agree` comes first
        return self._examination

    def open(self, comm: Comm, agreed: AgreedSave) -> OpenSave:
        """Open the attempt, and bring small tensors to the coordinator; raises as what it calls."""
        checksum_frozen(comm, agreed, self._coordinator, self._pool, self.examination.look)
        opened = open_save(self._store, comm, self._request, agreed, self._coordinator, self._listener)
        self._small = gather_small(comm, agreed, opened, self.examination.look)
        return opened

    def commit(
        self,
        comm: Comm,
        agreed: AgreedSave,
        opened: OpenSave,
        staged: Iterable[StagedChunk],
        *,
        compare: Copier | None = None,
        check: Callable[[], None] | None = None,
    ) -> SaveResult:
        """Write what is staged, vote, and commit; raises as `save`.

        Args:
            comm: the ranks.
            agreed: the structure.
            opened: the attempt.
            staged: this rank's chunks, in order; an error that it raises is this rank's.
            compare: with what replicas are compared beside the writing; None where they were when they were staged.
            check: called on each rank before it votes; what it raises is this rank's error.
        """
        request, store = self._request, self._store
        try:
            verdict = agree(
                comm,
                "save: commit",
                lambda: self._write(comm, agreed, opened, staged, compare, check),
                Written,
                lambda ballots: self._decide(comm, merge_written(ballots)),
                Verdict,
                merge_written,
            )
            if verdict.committed is None:
                verdict = agree(
                    comm,
                    "save: replicas",
                    lambda: self.examination.details(verdict.differing),
                    Details,
                    lambda ballots: Verdict(self._commit(comm, merge_details(ballots)), []),
                    Verdict,
                    merge_details,
                )
        except CollectiveTimeout as error:
            if not comm.is_coordinator and 0 in error.waiting_for:
                text = (
                    f"rank {comm.rank} wrote its part of {request.name} and heard no verdict ({error}). Whether it was "
                    f"committed shows `shardpoint show {join(store.location, request.name)}`: it was if the "
                    f"checkpoint's id is {opened.attempt_id}. The next run on this root settles it"
                )
                raise CommitUnknownError(text, attempt_id=opened.attempt_id) from error
            raise
        committed = verdict.committed
        assert committed is not None  # noqa: S101 - after the details it is
        result = SaveResult(
            committed.name,
            join(store.location, committed.name),
            committed.checkpoint_id,
            committed.sequence,
            committed.num_bytes,
            committed.linked_bytes,
            committed.num_tensors,
            time.monotonic() - self._began,
            tuple(committed.notes),
            committed.suspect,
        )
        if comm.is_coordinator:
            text = f"committed {result.path}: {result.num_bytes / 1e6:.1f} MB in {result.seconds:.2f} s"
            self._listener(Event("committed", text, result.name))
            if result.suspect is not None:
                text = f"{result.path} is committed, but suspect: {result.suspect}"
                self._listener(Event("suspect", text, result.name, logging.WARNING))
        return result

    def _decide(self, comm: Comm, written: Written) -> Verdict:
        """Commit, unless the ranks must tell first which tensors differ; on the coordinator."""
        self._written = written
        differing = written.evidence.differing()
        return Verdict(None, differing[:MAX_GROUPS]) if differing else Verdict(self._commit(comm, {}), [])

    def _commit(self, comm: Comm, details: Details) -> Committed:
        written, merged = self._written, self._coordinator.merged
        assert written is not None and merged is not None  # noqa: S101, PT018 - opened and voted before
        evidence = written.evidence
        suspect = suspicion(merged, evidence.not_finite, details, num_differing=len(evidence.differing()))
        committed = commit_votes(comm, self._request, written, self._coordinator, suspect)
        self._cache.proven = self._coordinator.proven
        return committed

    def _write(
        self,
        comm: Comm,
        agreed: AgreedSave,
        opened: OpenSave,
        staged: Iterable[StagedChunk],
        compare: Copier | None,
        check: Callable[[], None] | None,
    ) -> Written:
        opened.check(agreed, comm.rank)
        store, plan, sums = self._store, agreed.plan, PieceSums(self._look_at(agreed))
        # Order: not from the budget. Every buffer of it may hold what waits to be written after this.
        small = stage_chunks(agreed.table, plan.small_chunks, self._small, self._pool, beyond_budget=True)
        frozen = stage_frozen(agreed, opened, self._pool.buffer_bytes)
        comparing: list[Future[bool]] = []
        with (
            ThreadPoolExecutor(2, thread_name_prefix="shardpoint-beside") as beside,
            OpenFiles(store, opened.key, plan.layout) as files,
            closing(in_file_order(in_file_order(staged, small), frozen)) as everything,
        ):
            documents = beside.submit(self._write_documents, agreed, opened)
            if compare is not None:
                comparing.append(beside.submit(self.examination.compare, compare, progress=comm.progress))
            if opened.one_writer:
                write_gathered(
                    files,
                    everything,
                    sums,
                    self._pool.buffer_bytes,
                    comm.progress,
                    chunks_of=[
                        make_plan(
                            agreed.table, plan.layout, rank, self._pool.buffer_bytes, plan.frozen_files
                        ).all_chunks(opened.linked)
                        for rank in range(comm.world_size)
                    ],
                    num_files=len(plan.layout.files),
                    rank=comm.rank,
                    exchange=self._exchange(),
                )
            else:
                write_staged(files, everything, sums, comm.progress)
            entries, notes = documents.result(), files.notes
            for compared in comparing:
                compared.result()
        if check is not None:
            check()
        files_written = {comm.rank: entries} if entries else {}
        partials = pack_partials(sums.partials(agreed.table))
        return Written({opened.attempt_id: comm.rank}, partials, files_written, notes, self.examination.evidence())

    def _look_at(self, agreed: AgreedSave) -> Callable[[int, memoryview], None]:
        """Return what looks at staged bytes; gathered and frozen tensors were looked at before."""
        gathered, frozen, placed = frozenset(agreed.plan.gathered), agreed.plan.frozen_files, agreed.plan.layout.tensors

        def look(entry: int, data: memoryview) -> None:
            if entry not in gathered and placed[entry].file not in frozen:
                self.examination.look(entry, data)

        return look

    def _write_documents(self, agreed: AgreedSave, opened: OpenSave) -> list[FileEntry]:
        """Write this rank's documents, and on the coordinator those of the whole checkpoint; return the rank's."""
        attempt = self._coordinator.attempt
        if attempt is not None and not self._request.as_file:
            write_documents(attempt, self._coordinator.documents)
        entries: list[FileEntry] = []
        for path, data in agreed.own.rank_documents.items():
            self._store.write_document(f"{opened.key}/{path}", data, SyncPoint.DOCUMENT)
            entries.append(FileEntry(path, len(data), to_hex(crc64(data))))
        return entries
