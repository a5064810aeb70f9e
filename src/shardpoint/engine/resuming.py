"""How a run comes back from one checkpoint of its root, and what a person should know of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from shardpoint.adapters.state import RunState, TrainState
from shardpoint.catalog import newer_suspects
from shardpoint.comm import Comm
from shardpoint.commit import Committed
from shardpoint.engine.carried import stored_run
from shardpoint.engine.lazy import Arrival, load_weights_first
from shardpoint.engine.load import Target, load
from shardpoint.engine.results import LoadResult
from shardpoint.engine.source import Source, open_committed
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.training import training_target
from shardpoint.events import Event, Listener
from shardpoint.manifest import Manifest
from shardpoint.planning import Allowances
from shardpoint.storage import BufferPool, Store


def resume_named(
    store: Store,
    comm: Comm,
    name: str,
    roles: Mapping[str, TrainState],
    cache: StructureCache,
    *,
    pool: BufferPool,
    listener: Listener,
    own_comm: Callable[[], Comm] | None,
    allowed: Allowances,
) -> tuple[RunState, Manifest, Arrival | None]:
    """Restore everything from one checkpoint.

    Args:
        store: the root.
        comm: the ranks.
        name: the checkpoint.
        roles: role -> state, to be filled.
        cache: this process's.
        pool: lends memory for reads past the page cache.
        listener: told of it, on the coordinator.
        own_comm: opens a comm for a thread that brings the optimizers' states behind; None loads all at once.
        allowed: what may differ.

    Returns:
        Where the run was, what the checkpoint is, and what is still coming.

    Raises:
        CheckpointError: as `load`.

    Collective:
        All ranks.
    """
    found: tuple[RunState, Manifest] | None = None

    def open_source() -> Source:
        return open_committed(store, name)

    def prepare(source: Source) -> Target:
        nonlocal found
        found = stored_run(source), source.manifest
        return training_target(source, roles, comm, listener, lazy_optimizer=own_comm is not None, allowed=allowed)

    result: LoadResult
    arrival: Arrival | None = None
    if own_comm is not None:
        result, arrival = load_weights_first(comm, own_comm, open_source, prepare, cache, pool=pool)
    else:
        result = load(comm, open_source, prepare, cache, pool=pool)
    assert found is not None  # noqa: S101 - the load succeeded, so `prepare` ran
    run, manifest = found
    if comm.is_coordinator:
        text = f"resumed {name} of {store.location}: step {run.step}, {result.num_bytes / 1e6:.1f} MB on this rank"
        listener(Event("loaded", text, name))
        tell_of_allowed(result, listener)
    return with_allowed(run, result), manifest, arrival


def with_allowed(run: RunState, result: LoadResult) -> RunState:
    """Return a position with what the load was allowed to leave and to convert."""
    return replace(run, missing=result.missing, unexpected=result.unexpected, cast=result.cast)


def tell_of_allowed(result: LoadResult, listener: Listener) -> None:
    """Tell what a load was allowed to leave and to convert, and which patterns allowed nothing."""
    for what, lines in (
        ("left as it was, since the checkpoint lacks it", result.missing),
        ("not loaded, since the state lacks it", result.unexpected),
        ("converted", result.cast),
    ):
        if lines:
            listener(Event("allowed", f"{result.name}: {what}: {'; '.join(lines)}", result.name, logging.WARNING))
    for line in result.idle:
        text = f"{result.name}: {line}: is it misspelt, or not needed any more?"
        listener(Event("idle_pattern", text, result.name, logging.WARNING))


def tell_of_suspects(found: Iterable[Committed], resumed: str, listener: Listener) -> None:
    """Tell which suspect checkpoints are newer than the one that was resumed, or that it is one."""
    for name, suspect in newer_suspects(found, resumed):
        if name == resumed:
            text = f"{name} is suspect, and no other is intact: {suspect}"
            listener(Event("resumed_suspect", text, name, logging.WARNING))
        else:
            text = (
                f"{resumed} is resumed, though {name} is newer: that is suspect ({suspect}). Load it by its name "
                "(load_checkpoint) to go on from it all the same"
            )
            listener(Event("passed_over_suspect", text, name, logging.WARNING))
