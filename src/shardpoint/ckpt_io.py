"""How a ColossalChat script saves and loads: the four functions of `coati.utils.ckpt_io`, with the same parameters.

Here a save is all or nothing, and a load changes nothing unless everything fits.

Source: ColossalAI, `applications/ColossalChat/coati/utils/ckpt_io.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from shardpoint.adapters.c10d import open_comm
from shardpoint.adapters.colossal import lost_in_its_files
from shardpoint.adapters.state import RunState, TrainState
from shardpoint.booster import Booster
from shardpoint.comm import Comm
from shardpoint.commit import CONTROL_DIRECTORY, RootOwner, acquire_root
from shardpoint.engine import (
    BUDGET_BYTES,
    Source,
    StructureCache,
    Target,
    check_fit,
    checkpoint_name,
    is_colossal_layout,
    is_foreign,
    load,
    load_foreign,
    native_source,
    open_colossal,
    open_committed,
    run_state,
    running_states,
    save,
    save_foreign,
    stored_run,
    training_request,
    training_target,
    verify_share,
)
from shardpoint.engine.ballots import agree
from shardpoint.errors import ManifestError, NotFoundError, UnsupportedFormatError, UsageError
from shardpoint.events import Event, log_event
from shardpoint.planning import Allowances
from shardpoint.storage import BufferPool, LocalStore, Store, replace_document

StrPath = str | os.PathLike[str]

_cache = StructureCache()
_pool = BufferPool(BUDGET_BYTES)
# The roots that this process saves to stay its own until it ends: two runs on one root would replace each other's
# steps. By process, since a forked child owns nothing.
_owned: dict[tuple[int, str], RootOwner] = {}


@runtime_checkable
class BoosterPersistence(Protocol):
    """What a Booster must offer to be saved through: ColossalAI's own, ours, or another with these methods."""

    def save_model(self, model: Any, checkpoint: str, shard: bool = False) -> None:  # noqa: FBT001, FBT002 - ColossalAI's
        """Save a model."""

    def load_model(self, model: Any, checkpoint: str) -> Any:
        """Load a model."""

    def save_optimizer(self, optimizer: Any, checkpoint: str, shard: bool = False) -> None:  # noqa: FBT001, FBT002 - as above
        """Save an optimizer."""

    def load_optimizer(self, optimizer: Any, checkpoint: str) -> Any:
        """Load an optimizer."""

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
        """Save a scheduler."""

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> Any:
        """Load a scheduler."""


@runtime_checkable
class Coordinator(Protocol):
    """What tells which rank is the master: ColossalAI's `DistCoordinator`, ours, or another with this method."""

    def is_master(self) -> bool:
        """Return whether this is the master."""


def load_json(file_path: StrPath) -> dict[str, Any]:
    """Read a JSON file.

    Args:
        file_path: UTF-8.

    Raises:
        NotFoundError: the file is not there.
        ManifestError: it is not JSON.
    """
    path = Path(file_path)
    data = LocalStore(path.parent).read_bytes(path.name)
    try:
        value: dict[str, Any] = json.loads(data.decode())
    except ValueError as error:
        raise ManifestError(f"{path} is not valid JSON: {error}", key=str(path)) from error
    return value


def save_json(data: dict[str, Any], file_path: StrPath) -> None:
    """Write a JSON file: UTF-8, not escaped, indented by 4; over a file that is there, all or nothing.

    Args:
        data: what JSON has a form for.
        file_path: its directory must be there.

    Raises:
        UsageError: `data` has something that JSON has no form for.
        NotFoundError: the directory is not there.
        StorageError: the write failed; the old file is untouched.

    Durability:
        On return the file survives power loss.
    """
    try:
        text = json.dumps(data, ensure_ascii=False, indent=4).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"cannot write {file_path}: {error}") from error
    path = Path(file_path)
    replace_document(LocalStore(path.parent), path.name, text)


def save_checkpoint(
    save_dir: StrPath,
    booster: BoosterPersistence,
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: Any,
    epoch: int,
    step: int,
    batch_size: int,
    coordinator: Coordinator,
) -> None:
    """Save model, optimizer, scheduler, random state and position as `save_dir/epoch-{epoch}_step-{step}`.

    Args:
        save_dir: the root; this process owns it from the first save until it ends.
        booster: `shardpoint.Booster`, or ColossalAI's, whose files are then committed as they are.
        model: as `booster.boost` returned it.
        optimizer: likewise; None leaves it out.
        lr_scheduler: likewise; None leaves it out.
        epoch: the epoch that the run is in.
        step: steps done.
        batch_size: samples of a step over all ranks; `sample_start_index` is `step * batch_size`.
        coordinator: its master is the rank that writes metadata and commits.

    Raises:
        UsageError: an argument is wrong (a negative step, a `save_dir` that is a file), or the ranks disagree.
        RootBusyError: another living run owns `save_dir`.
        FencedError: another run took `save_dir` over since this one's first save.
        AlreadyExistsError: a directory that is not a committed checkpoint has the name.
        StorageError: with one rank; with more ranks it is in a `PeerError`.
        PeerError: a rank failed; nothing was committed.
        CollectiveTimeout: ranks fell silent; nothing was committed.
        CommitUnknownError: this rank heard no verdict.

    Collective:
        All ranks.

    Durability:
        On return the checkpoint survives power loss; a checkpoint of the same name is replaced at once, or stands.

    Source:
        `coati.utils.ckpt_io.save_checkpoint`.
    """
    comm = open_comm()
    store: LocalStore | None = None

    def check() -> bool:
        # Order: in a round, so that a wrong argument of one rank is an error on all of them, and nobody waits for it.
        nonlocal store
        run_state(epoch, step, batch_size)
        _check_booster(booster)
        _check_coordinator(coordinator, comm)
        store = LocalStore(save_dir)
        return True

    def own(_: Sequence[bool]) -> bool:
        assert store is not None  # noqa: S101 - every rank has voted, so `check` ran here
        _own(store)
        return True

    agree(comm, "own the root", check, bool, own, bool)
    assert store is not None  # noqa: S101 - the round succeeded, so `check` did
    run, owner = run_state(epoch, step, batch_size), _owned.get((os.getpid(), store.location))
    if isinstance(booster, Booster):
        state = TrainState(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler)
        save(store, comm, training_request({"": state}, comm, run), _cache, pool=_pool, owner=owner)
        return

    def write(directory: str) -> None:
        booster.save_model(model, f"{directory}/modeling", shard=True)
        if optimizer is not None:
            booster.save_optimizer(optimizer, f"{directory}/optimizer", shard=True)
        if lr_scheduler is not None:
            booster.save_lr_scheduler(lr_scheduler, f"{directory}/lr_scheduler")

    documents = {"running_states.json": running_states(run)}
    save_foreign(store, comm, checkpoint_name(epoch, step), run, write, documents, owner=owner)


def load_checkpoint(
    load_dir: StrPath,
    booster: BoosterPersistence | None,
    model: nn.Module | None,
    optimizer: Optimizer | None,
    lr_scheduler: Any,
) -> tuple[int, int, int]:
    """Load a checkpoint that `save_checkpoint` or a `Checkpointer` saved, from any number of ranks and any plugin.

    Args:
        load_dir: the checkpoint's directory, `.../epoch-1_step-500`.
        booster: as for saving; may be None when model, optimizer and scheduler are.
        model: filled in place; None skips it.
        optimizer: likewise.
        lr_scheduler: likewise.

    Returns:
        (epoch, step, sample_start_index). Where an optimizer is loaded, this rank's random state is restored too.

    Raises:
        NotFoundError: `load_dir` is not there.
        TornCheckpointError: it was never committed.
        UnsupportedFormatError: a newer format, or files of another Booster.
        MismatchError: a name, shape, dtype or group differs; nothing was changed. It lists everything.
        CorruptionError: bytes are not those that were committed; see `target_modified`.
        PeerError: a rank failed otherwise.

    Collective:
        All ranks; but any one alone where model, optimizer and scheduler are all None.

    Source:
        `coati.utils.ckpt_io.load_checkpoint`.
    """
    comm = open_comm()
    path = Path(os.path.abspath(load_dir))  # noqa: PTH100 - must not resolve symlinks
    wanted = {"modeling": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler}

    def find() -> Source:
        # Order: in a round, so that a wrong argument of one rank is an error on all of them, and nobody waits for it.
        if booster is not None:
            _check_booster(booster)
        elif any(live is not None for live in wanted.values()):
            raise UsageError("load_checkpoint: give the booster that boosted what is to be loaded")
        if path.exists():
            LocalStore(path)  # refuses a file
        store = LocalStore(path.parent)
        if not is_colossal_layout(store, path.name):
            return open_committed(store, path.name)
        if comm.is_coordinator and any(live is not None for live in wanted.values()):
            text = (
                f"{path} was saved by ColossalChat itself: it has no manifest, so nothing can tell whether its bytes "
                "are those that were saved; it has no random state either"
            )
            log_event(Event("unverified", text, path.name, logging.WARNING))
        return open_colossal(store, path.name)

    if all(live is None for live in wanted.values()):
        run = stored_run(find())  # what one process may ask alone, as ColossalChat's producers do
    elif booster is None or isinstance(booster, Booster):
        run = _load_native(find, booster, model, optimizer, lr_scheduler, comm)
    else:
        run = _load_foreign(find, booster, wanted, comm)
    return run.epoch, run.step, run.sample_start_index


def _load_native(
    find: Callable[[], Source],
    booster: Booster | None,
    model: nn.Module | None,
    optimizer: Optimizer | None,
    lr_scheduler: Any,
    comm: Comm,
) -> RunState:
    run: RunState | None = None
    named = model
    if named is None and optimizer is not None and booster is not None:
        named = booster.model_of(optimizer)
    live = nn.Module() if named is None else named
    # ColossalAI stores the rounded weights of a run in mixed precision; here float32 ones are made of them, as there.
    allowed = Allowances()

    def find_ours() -> Source:
        nonlocal allowed
        source = find()
        if not is_foreign(source):
            return source
        allowed = Allowances(widen=True)
        # Order: verified before anything of it is looked into; a damaged file of any rank's share ends the load on all.
        verify_share(source, comm)
        return native_source(source, live, optimizer, lr_scheduler)

    def prepare(source: Source) -> Target:
        nonlocal run
        run = stored_run(source)
        state = TrainState(model=live, optimizer=optimizer, lr_scheduler=lr_scheduler)
        return training_target(
            source,
            {"": state},
            comm,
            log_event,
            weights=model is not None,
            partial=True,
            random_state=optimizer is not None,
            allowed=allowed,
        )

    result = load(comm, find_ours, prepare, _cache)
    if result.cast and comm.is_coordinator:
        text = (
            f"{result.name}: {len(result.cast)} weights (first {result.cast[0]}) are stored in 16 bits, without the "
            "float32 master weights that were trained: the run goes on from the rounded ones, as ColossalAI's own would"
        )
        log_event(Event("inexact", text, result.name, logging.WARNING))
    assert run is not None  # noqa: S101 - the load succeeded, so `prepare` ran
    return run


def _load_foreign(
    find: Callable[[], Source], booster: BoosterPersistence, wanted: Mapping[str, Any], comm: Comm
) -> RunState:
    source: Source | None = None

    def resolve() -> RunState:
        nonlocal source
        source = find()
        name = source.manifest.name
        if not is_foreign(source):
            raise UnsupportedFormatError(f"{name} was saved by Shardpoint's own Booster: load it with that one")
        for part, live in wanted.items():
            stored = any(entry.path.split("/")[0] == part for entry in source.manifest.files)
            if live is not None and not stored:
                raise NotFoundError(f"{name} in {source.store.location} has no {part}: it was saved without")
        return stored_run(source)

    run = agree(comm, "load: resolve", resolve, RunState, lambda ballots: ballots[0], RunState)
    assert source is not None  # noqa: S101 - the round succeeded, so `resolve` did
    found: Source = source
    readers = {
        "modeling": booster.load_model,
        "optimizer": booster.load_optimizer,
        "lr_scheduler": booster.load_lr_scheduler,
    }

    def check() -> None:
        dtypes = check_fit(found, comm, booster, wanted["modeling"], wanted["optimizer"], wanted["lr_scheduler"])
        lost = lost_in_its_files(booster, wanted["optimizer"], dtypes)
        if lost and comm.is_coordinator:
            text = f"{found.manifest.name}: ColossalAI's files do not have {' and '.join(lost)}"
            text = f"{text}: the run goes on, but not as if it had never stopped"
            log_event(Event("inexact", text, found.manifest.name, logging.WARNING))

    def read(directory: str) -> None:
        for part, live in wanted.items():
            if live is not None:
                readers[part](live, f"{directory}/{part}")

    load_foreign(comm, found, check, read)
    return run


def _check_booster(booster: object) -> None:
    if not isinstance(booster, BoosterPersistence):
        raise UsageError(
            f"booster is a {type(booster).__name__}, which lacks the Booster's persistence methods (save_model, "
            "load_model, save_optimizer, load_optimizer, save_lr_scheduler, load_lr_scheduler)"
        )


def _check_coordinator(coordinator: object, comm: Comm) -> None:
    if not isinstance(coordinator, Coordinator):
        raise UsageError(f"coordinator is a {type(coordinator).__name__}, which has no is_master()")
    if coordinator.is_master() != comm.is_coordinator:
        raise UsageError(f"rank {comm.rank}: the coordinator's master must be rank 0 of the default process group")


def _own(store: Store) -> None:
    key = (os.getpid(), store.location)
    if key in _owned and not store.exists(CONTROL_DIRECTORY):
        _owned.pop(key).release()  # the whole root was deleted: what is made now is a new one
    if key in _owned:
        _owned[key].check_alive(store)
    else:
        _owned[key] = acquire_root(store)
