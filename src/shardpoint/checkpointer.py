"""What a training loop sees: when to save, what to keep, and where to go on after a restart."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self, get_args

from shardpoint.adapters.c10d import open_comm, own_comm
from shardpoint.adapters.collect import Known
from shardpoint.adapters.exchange import GlooExchange
from shardpoint.adapters.staging import pinning
from shardpoint.adapters.state import RunState, TrainState, as_roles
from shardpoint.catalog import in_order_of_trust, training_checkpoints
from shardpoint.comm import Comm
from shardpoint.commit import Committed, RootOwner, acquire_root, prune
from shardpoint.engine import (
    BUDGET_BYTES,
    Arrival,
    BackgroundSaver,
    PendingSave,
    ReplicaCheck,
    RunJournal,
    Schedule,
    StructureCache,
    refused_request,
    resume_named,
    run_state,
    save,
    tell_of_suspects,
    training_request,
)
from shardpoint.engine.ballots import agree
from shardpoint.errors import CheckpointError, CorruptionError, NotFoundError, UsageError
from shardpoint.events import Event, Listener, log_event
from shardpoint.planning import Allowances
from shardpoint.policies import KeepPolicy, SavePolicy, names_to_keep
from shardpoint.storage import BufferPool, LocalStore, Store


class Checkpointer:
    """Saves and resumes one run under one root.

    Args:
        root: the directory of checkpoints; made if it is not there.
        save: when to save; empty means at every call.
        keep: what to keep; empty means everything. The union of the policies is kept, and always the last one
            committed, the last healthy one, and those that were pinned (`shardpoint pin`).
        async_save: whether saves run behind the training. Then `save` returns when buffers, small tensors, param
            groups, schedulers and random states are taken; all else is staged during the next forward and backward,
            and a step of a `torch.optim.Optimizer` waits for what is not staged yet. Failures are told to the listener
            and raised by `PendingSave.result`, and by `close` where nobody asked.
        budget_bytes: host memory that a rank may stage in. None: 64 MiB, through which a save streams; with
            `async_save` as much as the saves in flight need. A save in the background that is greater than its budget
            makes steps wait for the disk.
        max_in_flight: how many saves may be under way in the background.
        when_busy: what a further save does: `"wait"` until one has ended, or `"skip"` it.
        check_replicas: how much of what several ranks hold alike each save compares: `"sampled"` a 32nd of each tensor
            (64 KiB at least), another with each save; `"full"` everything, which reads all that a rank holds once more,
            in the background before a step may change it; `"off"` nothing. What differs, and NaN, marks the checkpoint.
        store: where the bytes go, instead of the local directory `root`.
        listener: told of what happens; the default logs to the `shardpoint` logger.

    Raises:
        RootBusyError: another living run owns the root.
        UsageError: `root` is a file; or an `OnPreemption` is in `save`, and this is not the main thread.
        StorageError: the root cannot be made.

    Collective:
        All ranks construct, save, resume and close together, after `torch.distributed` is initialised.

    Durability:
        On return the run owns the root; what dead runs left unfinished there is swept.

    Examples:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 2)
        >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
        ...     state = TrainState(model=model)
        ...     _ = checkpointer.save(state, epoch=0, step=10, batch_size=4)
        ...     checkpointer.resume(state)
        RunState(epoch=0, step=10, sample_start_index=40)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save: Sequence[SavePolicy] = (),
        keep: Sequence[KeepPolicy] = (),
        async_save: bool = False,
        budget_bytes: int | None = None,
        max_in_flight: int = 2,
        when_busy: Literal["wait", "skip"] = "wait",
        check_replicas: ReplicaCheck = "sampled",
        store: Store | None = None,
        listener: Listener = log_event,
    ) -> None:
        if max_in_flight < 1 or when_busy not in ("wait", "skip"):
            text = f"max_in_flight must be at least 1, when_busy 'wait' or 'skip': got {max_in_flight}, {when_busy!r}"
            raise UsageError(text)
        if check_replicas not in get_args(ReplicaCheck):
            raise UsageError(f"check_replicas must be one of {get_args(ReplicaCheck)}, got {check_replicas!r}")
        if budget_bytes is None and not async_save:
            budget_bytes = BUDGET_BYTES
        self._schedule = Schedule(save, listener, max_in_flight=max_in_flight, when_busy=when_busy)
        self._keep_policies = tuple(keep)
        self._listener = listener
        self._comm = open_comm()
        self._cache = StructureCache()
        self._pool = BufferPool(budget_bytes, on_allocate=pinning())
        self._check_replicas = check_replicas
        self._max_in_flight = max_in_flight
        self._background: BackgroundSaver | None = None
        self._pending: list[PendingSave] = []
        self._known: Known = {}
        self._found: list[Committed] = []
        self._owner: RootOwner | None = None
        self._arrival: Arrival | None = None
        self._journal = RunJournal(self._comm, self._owned)
        self._closed = False
        opened: list[Store] = [] if store is None else [store]

        def open_store() -> bool:
            if not opened:
                opened.append(LocalStore(root))  # refuses a file
            self._schedule.open()
            return True

        def own(_: Sequence[bool]) -> bool:
            self._owner = acquire_root(opened[0], listener=listener)
            return True

        try:
            agree(self._comm, "own the root", open_store, bool, own, bool)
            self._store: Store = opened[0]
            if async_save:
                self._background = self._open_background()
        except BaseException:
            self._schedule.close()
            raise

    def _open_background(self) -> BackgroundSaver:
        comms = own_comm(), own_comm()
        exchange: list[GlooExchange] = []

        def may_need_one(ballots: Sequence[bool]) -> bool:
            return self._comm.world_size > 1 and any(ballots)

        # Order: process groups are made by all ranks together, on the thread that the trainer uses.
        if agree(self._comm, "files", lambda: self._store.shared_files != "any", bool, may_need_one, bool):
            exchange.append(GlooExchange())
        return BackgroundSaver(
            self._store,
            comms,
            StructureCache(),
            self._pool,
            owner=self._owner,
            listener=self._listener,
            exchange=lambda: exchange[0],
            after_commit=self._after_commit,
        )

    def _after_commit(self, comm: Comm) -> None:
        if self._keep_policies:
            agree(comm, "prune", lambda: True, bool, lambda _: self._prune(), bool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._arrival is not None:
            # The error on its way out is the one to see; and nobody wants to wait for gigabytes now.
            self._arrival.give_up()
            self._arrival.end()
            self._arrival = None
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(f"work in the background had failed too: {failed}")

    @property
    def preempted(self) -> bool:
        """Whether a signal has told the run that it will be stopped (see `OnPreemption`): the loop should leave.

        The ranks agree on it in `save`, so it is the same on all of them, and changes in `save` only.
        """
        return self._schedule.preempted

    def save(
        self,
        state: TrainState | Mapping[str, TrainState],
        *,
        epoch: int,
        step: int,
        batch_size: int,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> PendingSave | None:
        """Save everything as one checkpoint, if a policy says so; then prune what no policy keeps.

        Args:
            state: the live objects, or a dict of them by role. They are read, not changed (FSDP2 modules are
                resharded).
            epoch: the epoch that the run is in.
            step: steps done; the checkpoint is called `epoch-{epoch}_step-{step}`.
            batch_size: samples of a step, over all ranks: `sample_start_index` is `step * batch_size`.
            metrics: numbers to keep with it; the coordinator's are stored.
            force: save whatever the policies say.

        Returns:
            The save, done unless it runs in the background; or None when no policy wanted one, or when too many are
            under way and `when_busy` is `"skip"`.

        Raises:
            UsageError: an argument is wrong, the ranks disagree, or something in the state cannot be saved.
            FencedError: another run took the root over.
            AlreadyExistsError: a directory that is not ours has the checkpoint's name.
            StorageError: with one rank; with more ranks it is in a `PeerError`. Or the new checkpoint is committed, and
                pruning an old one failed.
            PeerError: a rank failed; nothing was committed.
            CollectiveTimeout: ranks fell silent; nothing was committed.
            CommitUnknownError: this rank heard no verdict, or the root's fsync failed.
            CorruptionError: an optimizer state that was to come in behind (`resume(lazy_optimizer=True)`) is damaged.

        Collective:
            All ranks, with the same arguments but for `metrics`. A call that does not save costs no round, unless a
            policy has to ask the ranks: `Every(seconds=...)`, `OnPreemption`.

        Durability:
            On return (of `PendingSave.result`, in the background) the checkpoint survives power loss. A checkpoint of
            the same name is replaced at once, or stands.

        Memory:
            `budget_bytes`, 64 MiB more where what does not train has to be written, up to 64 MiB of small tensors on
            the coordinator, and in the background 8 KiB for each tensor.
        """
        began = time.monotonic()
        self._check_open()
        self.optimizer_ready()
        call = self._schedule.next_call(self._comm, self._background)
        refusal: UsageError | None = None
        try:
            run = run_state(epoch, step, batch_size)
            request = training_request(as_roles(state), self._comm, run, metrics=metrics, known=self._known)
            request = replace(request, check_replicas=self._check_replicas)
            self._journal.look_at(as_roles(state))
        except UsageError as error:
            # Order: into the first round with it. Raised here, it would leave the other ranks waiting for this one.
            refusal, request = error, refused_request(error)
        can_be_due = refusal is None or (type(step) is int and step >= 0)
        if can_be_due and not self._schedule.is_due(
            call, self._comm, self._background, step, request.name, force=force
        ):
            return None
        if self._background is not None:
            self._background.wait_for_room(self._max_in_flight)
            roles = as_roles(state) if refusal is None else {}
            pending = self._background.submit(request, roles, began)
            self._remind()
            self._pending.append(pending)
            self._schedule.started(pending)
            return pending
        outcome = save(
            self._store, self._comm, request, self._cache, pool=self._pool, owner=self._owner, listener=self._listener
        )
        pending = PendingSave.completed(outcome, began)
        self._schedule.started(pending)
        self._after_commit(self._comm)
        return pending

    def _remind(self) -> None:
        """Tell of earlier saves that failed in the background, and that nobody asked about; forget those that ended."""
        for known in self._pending:
            if known.failure is not None and not known.was_told:
                self._tell("save_failed", f"the save of {known.name} had failed: {known.failure}", known.name)
        self._pending = [known for known in self._pending if not known.done()]

    def resume(
        self,
        state: TrainState | Mapping[str, TrainState],
        *,
        lazy_optimizer: bool = False,
        allow_missing: Collection[str] = (),
        allow_unexpected: Collection[str] = (),
        allow_cast: bool = False,
    ) -> RunState | None:
        """Restore everything from the newest committed checkpoint.

        The newest is the one committed last, not the one with the highest step. Where it turns out to be corrupt, the
        one committed before it is taken, and the listener is told. A suspect one (`SaveResult.suspect`) is taken only
        where no other is intact; the listener is told of those that are passed over, and `load_checkpoint` loads any by
        its name. The random state is restored last. Then all that was assigned is read back and compared: options,
        counters, the scheduler, the samples that come next, the random state. Whatever the state or the checkpoint has
        and the other lacks is an error, never a fresh start.

        Args:
            state: the live objects to fill, built as they were when saved; any number of ranks and any plugin.
            lazy_optimizer: return when everything but the optimizers' states is restored and verified (the options of
                their param groups are), and let those come in behind, on a thread. Until they are whole and verified
                the optimizers' states are as before; the first step of an optimizer, a save and `optimizer_ready` wait
                for them. Where they turn out to be damaged, each of these raises that on every rank, and goes on doing
                so: the weights are restored already, so no earlier checkpoint is taken. Resume again without this.
            allow_missing: patterns (`fnmatch`) of names of parameters and buffers that the checkpoint may lack; they
                stay as they are, their optimizer states too, and may be in another param group.
            allow_unexpected: patterns of the names that the state may lack.
            allow_cast: convert weights whose floating-point dtype differs. Optimizer states are never converted.

        Returns:
            Where the run was, or None when the root has no checkpoint.

        Raises:
            MismatchError: checkpoint and state differ; nothing was changed. It lists everything.
            UsageError: something in the state cannot be loaded into.
            ResumeMismatchError: what was put in place is not what the checkpoint holds; do not train on with it.
            CorruptionError: there are checkpoints, and none is intact.
            NotFoundError: the only ones went away while they were read.
            UnsupportedFormatError: the newest is of a newer format.
            PeerError: a rank failed otherwise.

        Collective:
            All ranks.

        Memory:
            Nothing beside the state; with `lazy_optimizer`, an optimizer that has state already holds it twice until
            the new one is in place.
        """
        self._check_open()
        if self._background is not None:
            self._background.wait()
        if self._arrival is not None:
            # What it brings, or why it failed, does not matter any more: everything is restored again.
            self._arrival.end()
            self._arrival.forget()
            self._arrival = None
        passed_over: dict[str, CorruptionError | NotFoundError] = {}
        tried: set[str] = set()
        allowances: list[Allowances] = []

        def look() -> bool:
            allowances.append(Allowances.of(allow_missing, allow_unexpected, cast=allow_cast))
            return bool(as_roles(state)) and lazy_optimizer

        while True:
            # Order: the arguments are looked at in a round, so that a wrong one on one rank is an error on all of them.
            candidates = agree(
                self._comm,
                "resume: list",
                look,
                bool,
                self._candidates,
                list[str],
            )
            name = next((candidate for candidate in candidates if candidate not in tried), None)
            if name is None:
                break
            tried.add(name)
            try:
                run, manifest, self._arrival = resume_named(
                    self._store,
                    self._comm,
                    name,
                    as_roles(state),
                    self._cache,
                    pool=self._pool,
                    listener=self._listener,
                    own_comm=own_comm if lazy_optimizer else None,
                    allowed=allowances[-1],
                )
            except CorruptionError as error:
                passed_over[name] = error
                self._tell("fell_back", f"{name} is corrupt, trying an earlier one: {error}", name)
                continue
            except NotFoundError as error:
                passed_over[name] = error
                self._tell("fell_back", f"{name} went away while it was read, looking again: {error}", name)
                continue
            self._schedule.resumed(name, run.step)
            if self._comm.is_coordinator:
                tell_of_suspects(self._found, name, self._listener)
            self._journal.begin(as_roles(state), manifest, passed_over)
            return run
        if passed_over:
            # Order: never None here. A run that started afresh on a half-filled target would not be a fresh one.
            first = next(iter(passed_over.values()))
            first.add_note(f"none of the {len(passed_over)} checkpoints in {self._store.location} is intact")
            raise first
        self._journal.begin(as_roles(state))
        return None

    def optimizer_ready(self, timeout_s: float | None = None) -> bool:
        """Wait for what `resume(lazy_optimizer=True)` lets come in behind, and put it in place.

        Args:
            timeout_s: how long to wait, in seconds; None waits as long as it takes, 0 only looks.

        Returns:
            Whether every optimizer has its state; True where nothing is coming in.

        Raises:
            CorruptionError: the state's bytes are not those that were committed.
            PeerError: a rank failed otherwise.
            CollectiveTimeout: ranks fell silent.

        Collective:
            None: each rank may wait when it likes. What is raised is the same on all of them.
        """
        if self._arrival is None:
            return True
        result = self._arrival.wait(timeout_s)
        if result is None:
            return False
        self._arrival.end()
        self._arrival = None
        if self._comm.is_coordinator:
            text = f"restored the optimizer state of {result.name}, {result.num_bytes / 1e6:.1f} MB on this rank"
            self._listener(Event("loaded", text, result.name))
        return True

    def close(self) -> None:
        """Wait for saves in the background, and give the root up, so that another run may own it.

        Last of all the handlers of signals that `OnPreemption` needed are put back. A second call does nothing.

        Raises:
            CheckpointError: the last save failed in the background, and nobody asked for its result.
            CorruptionError: an optimizer state that was to come in behind is damaged, and nobody was told yet. The root
                is given up all the same; so with any other error of that kind.

        Collective:
            All ranks should close; none waits for another, but for saves that are under way and what comes in behind.
        """
        if self._closed:
            return
        self._closed = True
        if self._background is not None:
            self._background.close()
        else:
            self._pool.close()
        owner, self._owner = self._owner, None
        arrival, self._arrival = self._arrival, None
        try:
            untold = arrival.end() if arrival is not None else None
            self._journal.close()
        finally:
            if owner is not None:
                owner.release()
            self._schedule.close()
        last = self._pending[-1] if self._pending else None
        if untold is None and last is not None and not last.was_told:
            untold = last.failure
        if untold is not None:
            raise untold

    @property
    def journal(self) -> RunJournal:
        """The journal of this run: `journal.record(epoch=..., step=..., loss=...)` after each step."""
        self._check_open()
        return self._journal

    def _owned(self) -> tuple[Store, RootOwner]:
        assert self._owner is not None  # noqa: S101 - asked on the coordinator, which owns the root until `close`
        return self._store, self._owner

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer is closed: make a new one")

    def _tell(self, kind: str, message: str, key: str) -> None:
        if self._comm.is_coordinator:
            self._listener(Event(kind, message, key, logging.WARNING))

    def _candidates(self, lazy: Sequence[bool]) -> list[str]:
        if len(set(lazy)) > 1:
            raise UsageError(f"resume: lazy_optimizer differs between the ranks: {list(lazy)}")
        self._found = in_order_of_trust(self._store)
        return [item.name for item in self._found]

    def _prune(self) -> bool:
        assert self._owner is not None  # noqa: S101 - runs on the coordinator, which owns the root until `close`
        # A copy under another name is somebody's own: no policy counts it, and nothing deletes it.
        found = [info for info in training_checkpoints(self._store) if info.name == info.manifest.name]
        kept = names_to_keep(self._keep_policies, found)
        for info in found:
            if info.name not in kept and prune(self._store, self._owner, info.name):
                self._listener(Event("pruned", f"pruned {info.name} of {self._store.location}", info.name))
        return True
