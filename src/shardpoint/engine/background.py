"""How saves run behind the training: one thread stages them, another writes and commits them, each in their order.

Two threads and two comms, so that the next save can be staged while the last one is written. All ranks submit the same
saves in the same order, so each thread meets its peers' in the same rounds. What is staged lies in the pool's buffers:
where a budget bounds them, staging waits for the writing, and a step waits for the staging.

The interpreter's lock: while a trainer runs, these threads do little Python. They copy, checksum and write whole
buffers in native calls; what would be a loop over many small tensors was copied before the save returned.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from torch.optim import Optimizer

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.snapshot import Arena, Snapshot, hook_steps, role_of, take_snapshot
from shardpoint.adapters.staging import Copier, Landing
from shardpoint.adapters.state import TrainState
from shardpoint.comm import Comm
from shardpoint.commit import RootOwner
from shardpoint.engine.gathering import ByteExchange
from shardpoint.engine.opening import AgreedSave, SaveRequest
from shardpoint.engine.pending import PendingSave
from shardpoint.engine.results import SaveResult
from shardpoint.engine.save import SaveAttempt
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.writing import StagedChunk, stage_chunk
from shardpoint.errors import SaveCancelledError, UsageError
from shardpoint.events import Event, Listener
from shardpoint.storage import BufferPool, Store

_NICENESS = 10


@dataclass
class _Job:
    """One save under way on this rank.

    Attributes:
        staged: chunks on their way to the writer; None ends them, an error ends them badly.
        landings: per role, when copies that are queued on a GPU will have ended.
        released: roles that a step may change again.
        older: the saves that were under way when it began.
    """

    pending: PendingSave
    attempt: SaveAttempt
    snapshot: Snapshot | None
    arena: Arena
    staged: queue.SimpleQueue[StagedChunk | BaseException | None] = field(default_factory=queue.SimpleQueue)
    landings: dict[str, Landing] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    older: list[_Job] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    agreed: AgreedSave | None = None
    is_staged: bool = False
    has_failed: bool = False

    @property
    def read_late(self) -> frozenset[tuple[str, str]]:
        """What is read at the end, since no step changes it."""
        return frozenset() if self.agreed is None else self.agreed.read_late

    def has_ended_staging(self) -> bool:
        return self.is_staged

    def release(self, role: str, landing: Landing) -> None:
        with self.changed:
            self.landings[role] = landing
            self.released.add(role)
            self.changed.notify_all()

    def end_staging(self) -> None:
        with self.changed:
            self.is_staged = True
            self.changed.notify_all()
        if self.read_late or any(job.read_late for job in self.older):
            return  # steps may go on; what else changes weights waits until it has been read, at the end
        landings = list(self.landings.values())

        def wait() -> None:
            for landing in landings:
                landing.wait()

        self.pending.finish_staging(wait)

    def check_late(self) -> None:
        """Compare what was read at the end; raises as `Snapshot.check_late`."""
        if self.snapshot is not None:
            self.snapshot.check_late(self.read_late)

    def wait_for(self, role: str) -> None:
        """Return once a step may change a role."""
        with self.changed:
            self.changed.wait_for(lambda: role in self.released or self.is_staged)
        if role in self.landings:
            self.landings[role].hold_back()


class BackgroundSaver:
    """Runs saves behind the training of one run under one root.

    Args:
        store: the root.
        comms: one for staging, one for writing; no other thread uses them.
        cache: plans; the staging thread's alone.
        pool: staging memory.
        owner: on the coordinator, the run's hold on the root.
        listener: told of what happens, on the background threads.
        exchange: gives the way between ranks; called on the writing thread.
        after_commit: called on every rank after each commit, on the writing thread (prunes).
    """

    def __init__(
        self,
        store: Store,
        comms: tuple[Comm, Comm],
        cache: StructureCache,
        pool: BufferPool,
        *,
        owner: RootOwner | None,
        listener: Listener,
        exchange: Callable[[], ByteExchange],
        after_commit: Callable[[Comm], None],
    ) -> None:
        self._store = store
        self._stage_comm, self._write_comm = comms
        self._cache = cache
        self._pool = pool
        self._owner = owner
        self._listener = listener
        self._exchange = exchange
        self._after_commit = after_commit
        self._to_stage: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._arenas: list[Arena] = []
        self._changed = threading.Condition()
        self._closed = False
        self._hook = hook_steps(self._before_step)
        self._threads = [
            threading.Thread(target=self._run_stager, name="shardpoint-stage", daemon=True),
            threading.Thread(target=self._run_writer, name="shardpoint-commit", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._tell_of_the_end)

    @property
    def num_in_flight(self) -> int:
        """How many saves have not ended."""
        with self._changed:
            return len(self._jobs)

    def wait_for_room(self, max_in_flight: int) -> None:
        """Return once fewer saves than that are under way."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < max_in_flight)

    def wait(self) -> None:
        """Return once no save is under way."""
        self.wait_for_room(1)

    def submit(self, request: SaveRequest, roles: Mapping[str, TrainState], began: float) -> PendingSave:
        """Take what must be taken now, and have the rest done behind the training.

        Args:
            request: what to save; it is collected here, on the calling thread.
            roles: role -> state.
            began: when the save was asked for, on the monotonic clock.

        Raises:
            UsageError: the saver is closed.
        """
        if self._closed:
            raise UsageError("saves in the background are closed")
        pending = PendingSave(request.name, began)
        arena = self._arenas.pop() if self._arenas else Arena()
        snapshot: Snapshot | None = None
        try:
            with _without_garbage_collection():
                collected = request.collect()
                snapshot = take_snapshot(collected, roles, arena)
                collected.held = dict(snapshot.held)
        except Exception as error:  # noqa: BLE001 - voted in the first round: the other ranks have begun this save too
            # Order: an error is this rank's vote, never raised here, where the others would wait for this rank.
            failure = error

            def collect() -> Collected:
                raise failure
        else:

            def collect() -> Collected:
                return collected

        quiet = replace(request, collect=collect, in_background=True)
        attempt = SaveAttempt(
            self._store,
            quiet,
            self._cache,
            self._pool,
            owner=self._owner,
            listener=self._listener,
            exchange=self._exchange,
        )
        job = _Job(pending, attempt, snapshot, arena)
        with self._changed:
            job.older = list(self._jobs)
            self._jobs.append(job)
        self._to_stage.put(job)
        pending.add_blocked(time.monotonic() - began)
        return pending

    def close(self) -> None:
        """Wait for what is under way, then end the threads; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.wait()
        self._to_stage.put(None)
        for thread in self._threads:
            thread.join()
        self._hook.remove()
        self._pool.close()
        self._stage_comm.close()
        self._write_comm.close()
        atexit.unregister(self._tell_of_the_end)

    def _tell_of_the_end(self) -> None:
        """Say, when the interpreter ends without `close`, what is lost; threads cannot be waited for any more then."""
        for job in self._jobs:
            text = f"the process ended while {job.pending.name} was being saved, without waiting: it was not committed"
            self._listener(Event("save_failed", f"{text}. Call `close()` first", job.pending.name, logging.ERROR))

    # The trainer's thread.

    def _before_step(self, optimizer: Optimizer) -> None:
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            if job.snapshot is None:
                continue
            began = time.monotonic()
            for role in () if job.is_staged else job.snapshot.roles_of(optimizer):
                job.wait_for(role)
            # Order: after that wait, since what is read late is known once the ranks have agreed.
            if job.snapshot.thaws(job.read_late):
                with self._changed:
                    self._changed.wait_for(lambda job=job: job not in self._jobs)  # type: ignore[misc]
            job.pending.add_blocked(time.monotonic() - began)

    # The staging thread.

    def _run_stager(self) -> None:
        while (job := self._to_stage.get()) is not None:
            try:
                agreed = job.agreed = job.attempt.agree(self._stage_comm)
            except BaseException as error:  # noqa: BLE001 - told by `result`; the round failed on every rank alike
                self._end(job, error)
                continue
            self._to_write.put(job)
            try:
                self._stage(job, agreed)
            except BaseException as error:  # noqa: BLE001 - voted in the last round
                job.staged.put(error)
            else:
                job.staged.put(None)
            finally:
                job.end_staging()
                self._pool.wake()
        self._to_write.put(None)

    def _stage(self, job: _Job, agreed: AgreedSave) -> None:
        snapshot, table, chunks = job.snapshot, agreed.table, agreed.plan.chunks
        assert snapshot is not None  # noqa: S101 - the ranks agreed, so collecting succeeded here
        roles = list(snapshot.stepped)
        left = [
            frozenset(role_of(table.entries[piece.entry].part, roles) for piece in chunk.pieces) for chunk in chunks
        ]
        last = {role: number for number, members in enumerate(left) for role in members}
        copier = Copier(agreed.own.held)

        def let_go(role: str, landing: Landing, *, is_staged: bool) -> None:
            """Let a step change a role; what others hold of it too is compared before, and nothing may have changed."""
            with copier.streams():
                if job.attempt.examination.compare(copier, lambda part: role_of(part, roles) == role) or is_staged:
                    snapshot.check(role)
            job.release(role, landing)

        try:
            for role in roles:
                if role not in last:  # this rank writes nothing of it
                    let_go(role, Landing(), is_staged=False)
            for number, chunk in enumerate(chunks):
                if job.has_failed or job.pending.is_cancelled:
                    return
                buffer = self._pool.acquire(give_up=lambda: job.has_failed or job.pending.is_cancelled)
                if buffer is None:
                    return
                staged = stage_chunk(table, chunk, copier, buffer, self._pool)
                job.staged.put(staged)
                for role in left[number]:
                    if last[role] == number:
                        let_go(role, staged.landing, is_staged=True)
        finally:
            copier.close()

    # The writing thread.

    def _run_writer(self) -> None:
        _step_back()
        while (job := self._to_write.get()) is not None:
            assert job.agreed is not None  # noqa: S101 - the stager agreed with its peers
            try:
                # Staging has the cores' and the memory's time first: it is what a step may have to wait for.
                self._pool.wait_until(job.has_ended_staging)
                opened = job.attempt.open(self._write_comm, job.agreed)
                result = job.attempt.commit(
                    self._write_comm, job.agreed, opened, self._chunks(job), check=job.check_late
                )
                self._after_commit(self._write_comm)
            except BaseException as error:  # noqa: BLE001 - told by `result`
                job.has_failed = True
                self._pool.wake()
                self._drop_staged(job)
                job.attempt.abandon(error)
                self._end(job, error)
            else:
                self._end(job, result)

    def _chunks(self, job: _Job) -> Iterator[StagedChunk]:
        """Yield what was staged; raise what staging raised. At the end no `cancel` counts any more."""
        while (item := job.staged.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if job.pending.is_cancelled:  # what is left need not be written
                item.release()
                break
            yield item
        if not job.pending.vote():
            raise SaveCancelledError(f"{job.pending.name} was cancelled by a rank: nothing was committed")

    def _drop_staged(self, job: _Job) -> None:
        """Give back the buffers of what was staged and not written."""
        while not job.is_staged or not job.staged.empty():
            try:
                item = job.staged.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(item, StagedChunk):
                item.release()

    def _end(self, job: _Job, outcome: SaveResult | BaseException) -> None:
        job.end_staging()
        job.older.clear()
        job.pending.finish(outcome)
        with self._changed:
            self._jobs.remove(job)
            self._arenas.append(job.arena)
            self._changed.notify_all()
        if isinstance(outcome, BaseException) and self._write_comm.is_coordinator:
            text = f"the save of {job.pending.name} to {self._store.location} failed: {outcome}"
            self._listener(Event("save_failed", text, job.pending.name, logging.ERROR))


def _step_back() -> None:
    """Have this thread, and those that it starts, give way to the trainer's: a save may take longer, a step should not.

    The staging thread does not: a step may wait for it.
    """
    with suppress(OSError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep the collector from walking all objects of the process while the trainer waits: it can take 0.1 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
