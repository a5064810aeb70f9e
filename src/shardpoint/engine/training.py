"""How a whole training state is saved and resumed: each role's model, optimizer, scheduler, sampler; random states."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from shardpoint.adapters import lora
from shardpoint.adapters.collect import GROUPS_NAME, Collected, Known, collect_roles
from shardpoint.adapters.documents import EXTRA_STATE_NAME, join, match_extra_states, rank_document, scheduler_state
from shardpoint.adapters.names import NamedModule, name_tensors
from shardpoint.adapters.nesting import is_skeleton
from shardpoint.adapters.restored import (
    next_samples,
    option_differences,
    position_problem,
    scheduler_differences,
    state_differences,
    steps_another,
)
from shardpoint.adapters.rng import read_rng
from shardpoint.adapters.state import RunState, TrainState
from shardpoint.comm import Comm
from shardpoint.engine.carried import RNG_DIRECTORY, RUNNING_STATES_NAME, carried, random_state_back
from shardpoint.engine.feeding import watch_samplers
from shardpoint.engine.load import Target
from shardpoint.engine.opening import SaveRequest
from shardpoint.engine.source import Source
from shardpoint.errors import ManifestError, ResumeMismatchError, UnsupportedFormatError, UsageError
from shardpoint.events import Event, Listener
from shardpoint.manifest import NEXT_SAMPLES_NAME, decode_document, encode_document
from shardpoint.planning import Allowances

_NOTHING = Allowances()

_OTHERS_SCHEDULER = (
    "the scheduler sets the learning rate of another optimizer than the state's: make it from that optimizer"
)


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the directory name of a training checkpoint."""
    return f"epoch-{epoch}_step-{step}"


def run_state(epoch: int, step: int, batch_size: int) -> RunState:
    """Return the position that a checkpoint records.

    Raises:
        UsageError: a number is not an integer, or is negative; or the batch size is not positive.
    """
    for name, value, least in (("epoch", epoch, 0), ("step", step, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    return RunState(epoch, step, step * batch_size)


def running_states(run: RunState) -> bytes:
    """Return `running_states.json`: exactly epoch, step and sample_start_index."""
    fields = {"epoch": run.epoch, "step": run.step, "sample_start_index": run.sample_start_index}
    return json.dumps(fields, ensure_ascii=False, indent=4).encode()


def refused_request(error: UsageError) -> SaveRequest:
    """Return a save that fails on this rank, so that a wrong argument of one rank is an error on all of them."""

    def collect() -> Collected:
        raise error

    return SaveRequest("", collect)


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return what is to be kept with a checkpoint.

    Raises:
        UsageError: a name is not a string, or a value is no number.
    """
    try:
        checked = {name: float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"metrics must be numbers by name: {error}") from error
    if not all(isinstance(name, str) for name in checked):
        raise UsageError(f"metrics must be numbers by name, got the names {list(checked)}")
    return checked


def training_request(
    roles: Mapping[str, TrainState],
    comm: Comm,
    run: RunState,
    *,
    metrics: Mapping[str, float] | None = None,
    known: Known | None = None,
) -> SaveRequest:
    """Describe the save of a whole training state.

    Args:
        roles: role -> state.
        comm: the ranks.
        run: the position.
        metrics: what the trainer passes along.
        known: what earlier saves found of each tensor; added to.

    Raises:
        UsageError: a metric is no number.
    """

    def collect() -> Collected:
        collected = collect_roles(roles, comm.rank, is_coordinator=comm.is_coordinator, known=known)
        for role, state in roles.items():
            _check_state(role, state, run)
            following = join(role, "data", NEXT_SAMPLES_NAME)
            data = next_samples(state.sampler, following)
            if data is not None:
                collected.documents[following] = data
        # The random state is read last, so that nothing in the walk above draws from it afterwards.
        collected.rank_documents[rank_document(RNG_DIRECTORY, comm.rank)] = encode_document(read_rng())
        return collected

    name = checkpoint_name(run.epoch, run.step)
    request = SaveRequest(name, collect, run, list(roles), checked_metrics(metrics))
    return replace(request, documents={RUNNING_STATES_NAME: running_states(run)})


def _check_state(role: str, state: TrainState, run: RunState) -> None:
    """Refuse to save what could not be resumed truly.

    Raises:
        UsageError: the scheduler is another optimizer's, or the sampler was never moved.
    """
    if state.optimizer is not None and steps_another(state.lr_scheduler, state.optimizer):
        raise UsageError(f"{join(role, 'lr_scheduler')}: {_OTHERS_SCHEDULER}")
    problem = position_problem(state.sampler.state_dict(), run) if state.sampler is not None else None
    if problem is not None:
        raise UsageError(f"{join(role, 'sampler')}: {problem}")


def training_target(
    source: Source,
    roles: Mapping[str, TrainState],
    comm: Comm,
    listener: Listener,
    *,
    weights: bool = True,
    partial: bool = False,
    random_state: bool = True,
    lazy_optimizer: bool = False,
    allowed: Allowances = _NOTHING,
) -> Target:
    """Prepare live objects to be filled from a checkpoint; nothing is changed before `install`.

    Args:
        source: the checkpoint.
        roles: role -> state.
        comm: the ranks.
        listener: told where a rank's random state had to be derived.
        weights: whether the models themselves are filled (False: they only give the optimizers' names).
        partial: allow what the checkpoint has and the state leaves out (no optimizer, no scheduler).
        random_state: whether the random state is restored.
        lazy_optimizer: whether the optimizers' states may come in behind: then they are read into new tensors, and
            `install` puts everything else in place, the options of the param groups too.
        allowed: what may differ.

    Raises:
        UnsupportedFormatError: another library wrote the files.
        CorruptionError: a document is damaged.
        UsageError: an optimizer or a model cannot be loaded into.
    """
    wants = any(state.optimizer is not None or state.lr_scheduler is not None for state in roles.values())
    if is_foreign(source) and (weights or wants):
        text = (
            f"{source.manifest.name} holds another library's files, none of ours: load it with that library's Booster"
        )
        raise UnsupportedFormatError(text)
    collected = Collected(comm.rank)
    afresh = (listener if comm.is_coordinator else _unheard) if partial else None
    optional: list[str] = [f"role {name!r}" for name in source.manifest.roles if name not in roles]
    installs: list[Callable[[], None]] = []
    parts: set[str] = set()
    behind: set[str] = set()
    for role, state in roles.items():
        if role not in source.manifest.roles:
            collected.missing.append(f"role {role!r}")
            continue
        named = name_tensors(state.model)
        if weights:
            parts |= _add_weights(source, role, named, collected, installs)
        behind |= _add_optimizer(
            source, role, state, named, collected, optional, fresh=lazy_optimizer, may_miss=allowed.may_miss
        )
        _add_scheduler(source, role, state, collected, installs, optional)
        installs += carried(source, role, state, collected, comm, optional, afresh)
    if not partial:
        collected.unexpected += optional
    options = [optimizer.install_options for optimizer in collected.optimizers]
    states = [optimizer.install_states for optimizer in collected.optimizers]
    same_options = [functools.partial(option_differences, optimizer) for optimizer in collected.optimizers]
    same_states = [functools.partial(state_differences, optimizer) for optimizer in collected.optimizers]
    checks: list[Callable[[], Iterable[str]]] = [*same_options, *collected.checks]
    if random_state:
        # Order: put back last, and looked at last: whatever a check above draws from it is noticed.
        write_back, unchanged = random_state_back(source, comm, listener)
        installs += write_back
        checks += unchanged
        if comm.is_coordinator:
            installs += watch_samplers(roles, source.manifest.name, listener)
    everything, name = frozenset(parts | behind), source.manifest.name
    if lazy_optimizer:
        first = functools.partial(_install, name, [*options, *installs], checks)
        second = functools.partial(_install, name, states, same_states)
        return Target(collected, everything, first, frozenset(behind), second, allowed=allowed)
    return Target(
        collected,
        everything,
        functools.partial(_install, name, [*options, *states, *installs], [*same_states, *checks]),
        allowed=allowed,
    )


def _unheard(event: Event) -> None:
    """Leave the telling to the coordinator."""


def _install(name: str, calls: Iterable[Callable[[], None]], checks: Iterable[Callable[[], Iterable[str]]]) -> None:
    """Put everything in place, then look whether it is there.

    Raises:
        ResumeMismatchError: something is not what the checkpoint holds.
    """
    for call in calls:
        call()
    differences = [difference for check in checks for difference in check()]
    if differences:
        text = (
            f"{name} was restored, but the state is not what it holds: {'; '.join(differences[:5])}"
            f"{f'; and {len(differences) - 5} more' if len(differences) > 5 else ''}. Do not train on with it"  # noqa: PLR2004
        )
        raise ResumeMismatchError(text, differences=differences)


def is_foreign(source: Source) -> bool:
    """Tell whether a checkpoint holds another library's files: it has neither tensors nor random states of ours."""
    return not source.manifest.tensors and source.manifest.file(rank_document(RNG_DIRECTORY, 0)) is None


def _add_weights(
    source: Source, role: str, named: NamedModule, collected: Collected, installs: list[Callable[[], None]]
) -> set[str]:
    modeling, adapters = join(role, "modeling"), join(role, "adapter")
    collected.add_model(named, modeling, adapters)
    collected.problems += collected.untied(source.manifest)
    extra = match_extra_states(named, source.document(join(modeling, EXTRA_STATE_NAME)), modeling)
    collected.missing_of += extra.missing
    collected.unexpected_of += extra.unexpected
    installs.append(extra.install)
    stored = {tensor.part for tensor in source.manifest.tensors if tensor.part.startswith(f"{adapters}/")}
    return {modeling, *stored, *(join(adapters, name) for name in lora.adapter_names(named.root))}


def _add_optimizer(
    source: Source,
    role: str,
    state: TrainState,
    named: NamedModule,
    collected: Collected,
    optional: list[str],
    *,
    fresh: bool,
    may_miss: Callable[[str], bool],
) -> set[str]:
    part = join(role, "optimizer")
    path = join(part, GROUPS_NAME)
    if state.optimizer is None:
        if source.manifest.file(path) is not None:
            optional.append(part)
        return set()
    data = source.document(path)
    if data is None:
        collected.missing.append(f"{part} (a resume without it would start the optimizer afresh)")
        return set()
    document = optimizer_document(data, path)
    collected.add_optimizer_target(
        state.optimizer, named, part, document, source.manifest, fresh=fresh, may_miss=may_miss
    )
    return {part}


def optimizer_document(data: bytes, path: str) -> dict[str, object]:
    """Return a `param_groups.json`, its form checked.

    Raises:
        ManifestError: it is not one.
    """
    document = decode_document(data, path)
    try:
        well_formed = all(
            isinstance(group["params"], list) and isinstance(group["options"], dict) for group in document["groups"]
        ) and all(isinstance(values, dict) for values in document["states"].values())
        well_formed &= all(
            is_skeleton(node) for values in document.get("nested", {}).values() for node in values.values()
        )
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        text = f"{path} does not have the form of an optimizer's param groups"
        raise ManifestError(text, key=path)
    assert isinstance(document, dict)  # noqa: S101 - for the type checker
    return document


def _add_scheduler(
    source: Source,
    role: str,
    state: TrainState,
    collected: Collected,
    installs: list[Callable[[], None]],
    optional: list[str],
) -> None:
    path = join(role, "lr_scheduler.json")
    if state.lr_scheduler is None:
        if source.manifest.file(path) is not None:
            optional.append(path)
        return
    data = source.document(path)
    if data is None:
        collected.missing.append(path)
        return
    values, problem = scheduler_state(state.lr_scheduler, data, path)
    if problem is not None:
        collected.problems.append(problem)
    if not hasattr(state.lr_scheduler, "state_dict"):
        collected.problems.append(f"{path}: {type(state.lr_scheduler).__name__} has no state_dict to compare")
    if state.optimizer is not None and steps_another(state.lr_scheduler, state.optimizer):
        collected.problems.append(f"{path}: {_OTHERS_SCHEDULER}")
    installs.append(lambda: state.lr_scheduler.load_state_dict(values))
    collected.checks.append(lambda: scheduler_differences(state.lr_scheduler, data, path))
