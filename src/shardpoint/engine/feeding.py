"""Does a saved sampler or loader fit the one that is to go on, and how is it put back without drawing random numbers?

torchdata's `StatefulDataLoader` is known here by name, not imported: it is the user's. Its state counts what one rank
was handed, and, with workers, what each worker was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardpoint.adapters.state import TrainState
from shardpoint.data import StatefulDistributedSampler
from shardpoint.errors import UsageError
from shardpoint.events import Event, Listener


def is_stateful_loader(sampler: Any) -> bool:
    """Tell whether it is a `torchdata.stateful_dataloader.StatefulDataLoader`, or of a class made from it."""
    return any(
        kind.__name__ == "StatefulDataLoader" and kind.__module__.partition(".")[0] == "torchdata"
        for kind in type(sampler).__mro__
    )


def check_fit(sampler: Any, values: Any, stored_world_size: int, world_size: int) -> None:
    """Refuse a saved state that cannot go on in a sampler or loader; nothing is changed.

    Args:
        sampler: what is to go on.
        values: the state, equal on all ranks that saved it where their number has changed.
        stored_world_size: how many ranks saved it.
        world_size: how many there are.

    Raises:
        UsageError: it cannot; the message says what can.
    """
    kind = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
    if not callable(getattr(sampler, "load_state_dict", None)):
        raise UsageError(
            f"a {kind} has no load_state_dict: give the sampler that it reads from, or torchdata's StatefulDataLoader"
        )
    if hasattr(sampler, "check_state_dict"):
        sampler.check_state_dict(values)
    if is_stateful_loader(sampler):
        _check_loader(sampler, values, stored_world_size, world_size)
    elif stored_world_size != world_size and kind.startswith("torchdata."):
        raise UsageError(f"a {kind} counts the samples of one rank: {_resume_on(stored_world_size)}")


def put_back(sampler: Any, values: Any) -> None:
    """Load a state. Called before the random state is restored.

    A `StatefulDataLoader` opens its iterator here, and the loop's `iter` gets that one: it would otherwise draw a base
    seed, and fast-forward a data set that may draw too, from the random state that was just restored; and it would undo
    a `set_epoch` between the resume and the `iter`.
    """
    sampler.load_state_dict(values)
    if is_stateful_loader(sampler):
        sampler.state_dict()


def watch_samplers(roles: Mapping[str, TrainState], name: str, listener: Listener) -> Iterable[Callable[[], None]]:
    """Yield what tells a listener, once the random state is restored, if a loader draws from it all the same."""

    def tell(message: str) -> None:
        listener(Event("rng_shifted", message, name, logging.WARNING))

    for state in roles.values():
        if isinstance(state.sampler, StatefulDistributedSampler):
            yield functools.partial(state.sampler.watch_random_state, tell)


def _check_loader(loader: Any, values: Any, stored_world_size: int, world_size: int) -> None:
    if values == {}:
        return  # what a loader takes for its start
    main, num_workers = values, 0
    try:
        if "_snapshot" in values:
            main = values["_snapshot"]["_main_snapshot"]
            num_workers = main["_num_workers"]
        batches = main["_sampler_iter_state"] or {}
        position = batches.get("sampler_state", main["_index_sampler_state"])
        iteration = batches.get("sampler_iter_state", batches)
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"this is not the state of a StatefulDataLoader ({error!r})") from error
    if num_workers != loader.num_workers:
        raise UsageError(
            f"saved by a StatefulDataLoader with num_workers={num_workers}, and this one has {loader.num_workers}: its "
            f"state is kept by worker; make it with num_workers={num_workers}, until the epoch ends at least"
        )
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    own = next((sampler for sampler in samplers if isinstance(sampler, StatefulDistributedSampler)), None)
    if own is not None:
        if not isinstance(position, dict):
            raise UsageError(
                "the loader's batch sampler kept no state of its StatefulDistributedSampler: let StatefulDataLoader "
                "make the batches (sampler=..., batch_size=...)"
            )
        own.check_state_dict(position)
    if stored_world_size == world_size:
        return
    if own is None:
        raise UsageError(
            f"a StatefulDataLoader's state counts the batches of one rank: {_resume_on(stored_world_size)}, or let it "
            "read from a shardpoint.data.StatefulDistributedSampler"
        )
    if values.get("_steps_since_snapshot"):
        raise UsageError(
            f"saved by a StatefulDataLoader between two of its snapshots: {_resume_on(stored_world_size)}, or make it "
            "with snapshot_every_n_steps=1"
        )
    own.check_iteration(iteration)


def _resume_on(world_size: int) -> str:
    return f"resume on {world_size} ranks, as many as saved it"
