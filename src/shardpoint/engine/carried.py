"""How what a rank carries beside tensors comes back: its sampler, extras and grad scaler, and last its random state."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.documents import join, rank_document
from shardpoint.adapters.grad_scaler import (
    GRAD_SCALER_NAME,
    scaler_differences,
    scaler_of,
    scaler_problem,
    scaler_state,
)
from shardpoint.adapters.restored import next_samples_differences, position_problem, sampler_differences
from shardpoint.adapters.rng import derive_rng, read_rng, rng_differences, write_rng
from shardpoint.adapters.state import RunState, TrainState
from shardpoint.adapters.tensors import live_values
from shardpoint.comm import Comm
from shardpoint.engine.feeding import check_fit, is_stateful_loader, put_back
from shardpoint.engine.source import Source
from shardpoint.errors import ManifestError, UsageError
from shardpoint.events import Event, Listener
from shardpoint.manifest import NEXT_SAMPLES_NAME, decode_document

RUNNING_STATES_NAME = "running_states.json"
RNG_DIRECTORY = "rng"


def stored_run(source: Source) -> RunState:
    """Return the position that a checkpoint records in `running_states.json`.

    Raises:
        ManifestError: the document is not there, or is not one.
        CorruptionError: it is damaged.
    """
    data = source.document(RUNNING_STATES_NAME)
    try:
        fields = json.loads(data or b"")
        return RunState(fields["epoch"], fields["step"], fields["sample_start_index"])
    except (ValueError, KeyError, TypeError) as error:
        text = f"{source.manifest.name} has no readable {RUNNING_STATES_NAME}: it is not a training checkpoint"
        raise ManifestError(text, key=RUNNING_STATES_NAME) from error


def _rank_documents(source: Source, directory: str) -> list[str]:
    return [entry.path for entry in source.manifest.files if entry.path.startswith(f"{directory}/rank-")]


def carried(
    source: Source,
    role: str,
    state: TrainState,
    collected: Collected,
    comm: Comm,
    optional: list[str],
    afresh: Listener | None = None,
) -> list[Callable[[], None]]:
    """Return what gives a role's sampler and extras back the states that this rank's had.

    Args:
        source: the checkpoint.
        role: whose they are.
        state: its live objects.
        collected: where what does not fit is noted.
        comm: the ranks.
        optional: where that is noted which only the checkpoint has.
        afresh: told if the loss scale of a Booster is not in the checkpoint, and starts afresh; None makes that an
            error, as a scaler of the state's own is in any case.
    """
    installs = _grad_scaler(source, join(role, GRAD_SCALER_NAME), state, collected, optional, afresh)
    if state.sampler is not None:
        installs += _sampler(source, join(role, "data"), state.sampler, collected, comm)
    elif _rank_documents(source, join(role, "data")):
        optional.append(join(role, "data"))
    top = join(role, "extras")
    prefix = f"{top}/"
    found = [entry.path.removeprefix(prefix) for entry in source.manifest.files if entry.path.startswith(prefix)]
    stored = dict.fromkeys(path.partition("/")[0] for path in found)
    optional += [join(top, name) for name in stored if name not in state.extras]
    for name, extra in state.extras.items():
        installs += _per_rank(source, join(top, name), extra, collected, comm)
    return installs


def _grad_scaler(
    source: Source, path: str, state: TrainState, collected: Collected, optional: list[str], afresh: Listener | None
) -> list[Callable[[], None]]:
    """Return what gives a grad scaler its scale and its counter back."""
    data, grad_scaler = source.document(path), scaler_of(state)
    if grad_scaler is None:
        optional += [path] if data is not None else []
        return []
    if data is None and afresh is not None and grad_scaler is not state.grad_scaler:
        text = (
            f"{source.manifest.name} has no {path}, since it was not trained in fp16 here: the loss scale starts afresh"
        )
        event = Event("scale_afresh", text, source.manifest.name, logging.WARNING)
        return [lambda: afresh(event)]
    if data is None:
        collected.missing.append(f"{path} (a resume without it would start the loss scale afresh)")
        return []
    values = scaler_state(data, path)
    problem = scaler_problem(grad_scaler, values)
    if problem is not None:
        collected.problems.append(f"{path}: {problem}")
    collected.checks.append(lambda: scaler_differences(grad_scaler, values, path))
    return [lambda: grad_scaler.load_state_dict(values)]


def _per_rank(
    source: Source,
    directory: str,
    target: Any,
    collected: Collected,
    comm: Comm,
    problem_of: Callable[[Any], str | None] = lambda _state: None,
) -> list[Callable[[], None]]:
    """Return what gives an object back the state that this rank's had.

    What does not fit is noted, and that the state is to be looked at again once it is back.
    """
    stored = _rank_documents(source, directory)
    if not stored:
        collected.missing.append(directory)
        return []
    path = rank_document(directory, comm.rank)
    data = source.document(path)
    if data is None and source.manifest.world_size == comm.world_size:
        collected.missing.append(f"{path} (rank {comm.rank} had none)")
        return []
    if data is None or source.manifest.world_size != comm.world_size:
        # Another number of ranks: only a state that does not depend on the rank can go on.
        contents = {source.document(other) for other in stored}
        if len(contents) != 1:
            text = (
                f"{directory}: saved by {source.manifest.world_size} ranks whose states differ, so that on "
                f"{comm.world_size} ranks there is none to go on with: use an object whose state is the same on all "
                "ranks (for a sampler shardpoint.data.StatefulDistributedSampler), or resume on as many ranks"
            )
            collected.problems.append(text)
            return []
        data = contents.pop()
    assert data is not None  # noqa: S101 - listed files have contents
    state = decode_document(data, path)
    values = live_values(state)
    if isinstance(target, dict):
        return [functools.partial(_refill, target, values)]
    problem = problem_of(state)
    if problem is not None:
        collected.problems.append(f"{directory}: {problem}")
    if not callable(getattr(target, "state_dict", None)):
        collected.problems.append(f"{directory}: {type(target).__name__} has no state_dict to compare")
    elif source.manifest.world_size == comm.world_size or not is_stateful_loader(target):
        # On another number of ranks a loader's own state says the same position in other words.
        collected.checks.append(lambda: sampler_differences(target, state, path))
    try:
        check_fit(target, values, source.manifest.world_size, comm.world_size)
    except UsageError as error:
        collected.problems.append(f"{directory}: {error}")
    return [lambda: put_back(target, values)]


def _refill(target: dict[Any, Any], values: dict[Any, Any]) -> None:
    target.clear()
    target.update(values)


def _sampler(
    source: Source, directory: str, sampler: Any, collected: Collected, comm: Comm
) -> list[Callable[[], None]]:
    """Return what gives a sampler its position back; the samples that come next are looked at once it is back."""

    def problem_of(state: Any) -> str | None:
        return position_problem(state, stored_run(source)) if source.manifest.step is not None else None

    installs = _per_rank(source, directory, sampler, collected, comm, problem_of)
    following = join(directory, NEXT_SAMPLES_NAME)
    upcoming = source.document(following)
    if upcoming is not None:
        collected.checks.append(lambda: next_samples_differences(sampler, upcoming, following))
    return installs


def random_state_back(
    source: Source, comm: Comm, listener: Listener
) -> tuple[list[Callable[[], None]], list[Callable[[], Iterable[str]]]]:
    """Return what puts this rank's random state back, and what tells whether it still stands there."""
    path = rank_document(RNG_DIRECTORY, comm.rank)
    data = source.document(path)
    if data is not None:
        state = decode_document(data, path)
        return [lambda: write_rng(state, path)], [lambda: rng_differences(state, path)]
    first = source.document(rank_document(RNG_DIRECTORY, 0))
    if first is None:
        return [], []
    text = (
        f"rank {comm.rank} was not there when {source.manifest.name} was saved by {source.manifest.world_size} ranks: "
        "its random state is derived from rank 0's"
    )
    event = Event("rng_derived", text, source.manifest.name, logging.WARNING)

    derived: dict[str, object] = {}

    def derive() -> None:
        derive_rng(first, comm.rank)
        derived.update(read_rng())
        listener(event)

    return [derive], [lambda: rng_differences(derived, f"the derived state of rank {comm.rank}")]
