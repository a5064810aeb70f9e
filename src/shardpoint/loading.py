"""How some roles of a checkpoint are loaded into live models, without owning the root that it is in."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from shardpoint.adapters.c10d import open_comm
from shardpoint.adapters.state import RunState, TrainState, as_roles
from shardpoint.catalog import training_checkpoints
from shardpoint.engine import Source, StructureCache, Target, open_committed, stored_run, training_target
from shardpoint.engine import load as load_target
from shardpoint.engine.ballots import agree
from shardpoint.engine.resuming import tell_of_allowed, with_allowed
from shardpoint.errors import NotFoundError, UsageError
from shardpoint.events import Listener, log_event
from shardpoint.manifest import MANIFEST_NAME
from shardpoint.planning import Allowances
from shardpoint.storage import LocalStore


def load(
    path: str | os.PathLike[str],
    state: TrainState | Mapping[str, TrainState],
    *,
    roles: Collection[str] | None = None,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    allow_cast: bool = False,
    listener: Listener = log_event,
) -> RunState:
    """Load some roles of a checkpoint, and of each what its state has: weights alone, or with the optimizer.

    Unlike `Checkpointer.resume` it leaves the random state alone, does not mind what else the checkpoint has, and needs
    no hold on the root: a job that evaluates may load while the run that trains goes on saving.

    Args:
        path: a committed checkpoint, or a root: then the checkpoint that was committed last.
        state: the live objects to fill, by role; or a single one.
        roles: which of them to load; None loads all that `state` has. With a single state: the one role that it gets.
        allow_missing: patterns (`fnmatch`) of names of parameters and buffers that the checkpoint may lack; they
            stay as they are, their optimizer states too, and may be in another param group.
        allow_unexpected: patterns of the names that the state may lack.
        allow_cast: convert weights whose floating-point dtype differs. Optimizer states are never converted.
        listener: told of what a person should know.

    Returns:
        Where the run was when the checkpoint was saved.

    Raises:
        NotFoundError: there is no such checkpoint.
        TornCheckpointError: it was never committed.
        UnsupportedFormatError: it is of a newer format, or another library's.
        MismatchError: checkpoint and state differ, or it lacks a part that the state has; nothing was changed.
        CorruptionError: bytes disagree; `target_modified` tells whether the state was changed before that showed.
        UsageError: `roles` names what `state` has not.
        PeerError: a rank failed otherwise.

    Collective:
        All ranks of the default process group, if there is one, with the same arguments.

    Examples:
        >>> import tempfile, torch
        >>> from shardpoint import Checkpointer
        >>> root = tempfile.mkdtemp()
        >>> actor, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> with Checkpointer(root) as checkpointer:
        ...     roles = {"actor": TrainState(model=actor), "critic": TrainState(model=critic)}
        ...     _ = checkpointer.save(roles, epoch=0, step=3, batch_size=8)
        >>> fresh = torch.nn.Linear(2, 2)
        >>> load(root, TrainState(model=fresh), roles=["actor"])
        RunState(epoch=0, step=3, sample_start_index=24)
        >>> torch.equal(fresh.weight, actor.weight)
        True
    """
    comm = open_comm()
    run: RunState | None = None
    chosen: dict[str, TrainState] = {}
    allowances: list[Allowances] = []

    def choose() -> bool:
        # Order: in a round, so that a wrong argument of one rank is an error on all of them.
        chosen.update(_chosen(state, roles))
        allowances.append(Allowances.of(allow_missing, allow_unexpected, cast=allow_cast))
        return True

    root, name = agree(comm, "load: find", choose, bool, lambda _: _find(Path(path)), tuple[str, str])

    def open_source() -> Source:
        return open_committed(LocalStore(root), name)

    def prepare(source: Source) -> Target:
        nonlocal run
        run = stored_run(source)
        return training_target(source, chosen, comm, listener, partial=True, random_state=False, allowed=allowances[0])

    result = load_target(comm, open_source, prepare, StructureCache())
    assert run is not None  # noqa: S101 - the load succeeded, so `prepare` ran
    if comm.is_coordinator:
        tell_of_allowed(result, listener)
    return with_allowed(run, result)


def _chosen(state: TrainState | Mapping[str, TrainState], roles: Collection[str] | None) -> dict[str, TrainState]:
    if isinstance(roles, str):
        text = f"roles={roles!r}: give a list of names, [{roles!r}]"
        raise UsageError(text)
    if isinstance(state, TrainState):
        names = list(roles) if roles is not None else [""]
        if len(names) != 1:
            text = f"one TrainState cannot be filled from the roles {names}: give a dict of them by role"
            raise UsageError(text)
        return as_roles({names[0]: state} if names[0] else state)
    known = as_roles(state)
    unknown = [name for name in roles or () if name not in known]
    if unknown:
        text = f"roles {unknown} are asked for, and the state has only {list(known)}"
        raise UsageError(text)
    return {name: value for name, value in known.items() if roles is None or name in roles}


def _find(path: Path) -> tuple[str, str]:
    """Return the root and the name of a checkpoint."""
    if (path / MANIFEST_NAME).is_file():
        return str(path.resolve().parent), path.resolve().name
    found = training_checkpoints(LocalStore(path))
    if not found:
        text = f"{path} is no committed checkpoint, and has none in it: `shardpoint ls` lists those of a root"
        raise NotFoundError(text)
    return str(path.resolve()), found[-1].name
