"""What two ranks check of signals that say that they will be killed; started by `test_preemption.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from shardpoint import Booster, Checkpointer, Every, OnPreemption, PendingSave, RunState, TrainState
from shardpoint.booster import TorchFSDPPlugin
from shardpoint.engine import background
from shardpoint.engine.background import BackgroundSaver
from shardpoint.engine.writing import stage_chunk
from shardpoint.errors import SaveCancelledError
from shardpoint.events import Event
from shardpoint.policies import SavePolicy
from tests.distributed.reporting import run_and_report
from tests.training import net, on_disk, same_bits, weights

WAIT_S = 60.0
MANY = 2000
RANK = 0
PIDS: list[int] = []


def made(seed: int = 0) -> TrainState:
    model: Any = net(seed)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, *_ = Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    return TrainState(model=model, optimizer=optimizer)


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * number + RANK))
    state.model(batch).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def send(number: int, to: int, *, by: int) -> None:
    """Send a real signal from one rank's process to another's."""
    if by == RANK:
        os.kill(PIDS[to], number)


def names(root: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in root.iterdir() if path.name != ".shardpoint")


def same_on_all(value: Any) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return all(other == found[0] for other in found)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


def train_until_preempted(checkpointer: Checkpointer, state: TrainState, signals: dict[int, Callable[[], None]]) -> int:
    """Train as the guide says, and send signals after some steps; return the step at which the loop was left."""
    for number in range(1, MANY):
        step(state, number)
        signals.get(number, lambda: None)()
        checkpointer.save(state, epoch=0, step=number, batch_size=8)
        if checkpointer.preempted:
            return number
    raise AssertionError("the signal was never heard of")


def check_a_signal_to_one_rank_has_both_save_the_same_step(out: Path) -> None:
    before = handlers()
    for name, number, to, by, every in (
        ("term", signal.SIGTERM, 1, 0, 1),
        ("usr1", signal.SIGUSR1, 0, 1, 1),
        ("seldom", signal.SIGUSR1, 1, 1, 4),
    ):
        root, events, state = out / name, list[Event](), made()
        policies: list[SavePolicy] = [Every(steps=MANY), OnPreemption(check_every=every)]
        with Checkpointer(root, save=policies, listener=events.append) as checkpointer:
            left_at = train_until_preempted(checkpointer, state, {3: lambda: send(number, to, by=by)})  # noqa: B023 - called in this turn
            assert handlers() != before
            send(number, to, by=by)  # again, while it leaves
            dist.barrier()
        assert handlers() == before
        assert same_on_all(left_at)
        assert left_at >= 3
        assert left_at % every == 0
        assert names(root) == [f"epoch-0_step-{left_at}"]
        assert same_bits(weights(state.model), on_disk(root / f"epoch-0_step-{left_at}" / "modeling"))
        if RANK == 0:
            told = [event.message for event in events if event.kind == "preempted"]
            assert len(told) == 1
            assert f"rank {to} got {signal.Signals(number).name}" in told[0]
        with Checkpointer(root, save=policies) as checkpointer:
            assert checkpointer.resume(made(7)) == RunState(0, left_at, 8 * left_at)
            assert not checkpointer.preempted


def check_signals_to_both_at_different_moments_are_one(out: Path) -> None:
    state, events = made(), list[Event]()
    with Checkpointer(out, save=[OnPreemption()], listener=events.append) as checkpointer:
        left_at = train_until_preempted(
            checkpointer,
            state,
            {
                2: lambda: send(signal.SIGUSR1, 0, by=0),
                3: lambda: send(signal.SIGTERM, 1, by=0),
            },
        )
        send(signal.SIGTERM, 0, by=1)
        dist.barrier()
        # The launcher changes its mind, and the loop goes on.
        for number in range(left_at + 1, left_at + 5):
            step(state, number)
            assert checkpointer.save(state, epoch=0, step=number, batch_size=8) is None
            assert checkpointer.preempted
    assert same_on_all(left_at)
    assert names(out) == [f"epoch-0_step-{left_at}"]


def check_grace_too_short_for_another_save(out: Path) -> None:
    state, events = made(), list[Event]()
    policies: list[SavePolicy] = [Every(steps=2), OnPreemption(grace_s=1e-6)]
    with Checkpointer(out, save=policies, listener=events.append) as checkpointer:
        left_at = train_until_preempted(checkpointer, state, {5: lambda: send(signal.SIGTERM, 1, by=0)})
        assert not list((out / ".shardpoint").rglob("attempt-*"))
    assert left_at >= 5
    stands = left_at - 1 - (left_at - 1) % 2  # it was committed before the signal was heard of
    assert names(out) == [f"epoch-0_step-{number}" for number in range(2, stands + 1, 2)]
    if RANK == 0:
        (event,) = [event for event in events if event.kind == "preempted"]
        assert f"none is started: epoch-0_step-{stands} is what stands" in event.message
        assert event.key == f"epoch-0_step-{stands}"
    with Checkpointer(out) as checkpointer:
        assert checkpointer.resume(made(7)) == RunState(0, stands, 8 * stands)


@contextmanager
def gated() -> Iterator[threading.Event]:
    """Hold this rank's staging up until somebody waits for the saves in the background to end."""
    opened = threading.Event()
    wait = BackgroundSaver.wait

    def wait_and_stage(*args: Any) -> Any:
        assert opened.wait(WAIT_S)
        return stage_chunk(*args)

    def open_and_wait(saver: BackgroundSaver) -> None:
        opened.set()
        wait(saver)

    with patch.object(background, "stage_chunk", wait_and_stage), patch.object(BackgroundSaver, "wait", open_and_wait):
        try:
            yield opened
        finally:
            opened.set()


def save(checkpointer: Checkpointer, state: TrainState, number: int) -> PendingSave:
    pending = checkpointer.save(state, epoch=0, step=number, batch_size=8, force=True)
    assert pending is not None
    return pending


def in_flight_when_the_signal_comes(
    checkpointer: Checkpointer, state: TrainState, *, first: bool
) -> tuple[PendingSave, PendingSave | None]:
    """Save step 1, then step 2, which is in flight when the signal comes; return that, and what was saved then."""
    with gated() as opened:
        if not first:
            opened.set()
            save(checkpointer, state, 1).result(WAIT_S)
            dist.barrier()
            opened.clear()
        step(state, 1)
        flying = save(checkpointer, state, 2)
        assert not flying.done()
        assert not checkpointer.preempted
        send(signal.SIGTERM, 0, by=0)
        dist.barrier()
        after = checkpointer.save(state, epoch=0, step=3, batch_size=8)
        assert checkpointer.preempted
        assert flying.done()
        return flying, after


def check_a_save_in_flight_is_finished(out: Path) -> None:
    state = made()
    with Checkpointer(out, save=[OnPreemption(grace_s=1000)], async_save=True) as checkpointer:
        flying, after = in_flight_when_the_signal_comes(checkpointer, state, first=True)
        assert flying.failure is None
        assert after is not None
    assert names(out) == ["epoch-0_step-2", "epoch-0_step-3"]
    with Checkpointer(out) as checkpointer:
        assert checkpointer.resume(made(7)) == RunState(0, 3, 24)


def check_a_save_in_flight_that_does_not_fit_is_given_up_by_both(out: Path) -> None:
    state, events = made(), list[Event]()
    policies = [OnPreemption(grace_s=1e-6)]
    with Checkpointer(out, save=policies, async_save=True, listener=events.append) as checkpointer:
        flying, after = in_flight_when_the_signal_comes(checkpointer, state, first=False)
        assert isinstance(flying.failure, SaveCancelledError)
        assert after is None
        # Leaving the block is no error: what was given up was told.
    assert names(out) == ["epoch-0_step-1"]
    if RANK == 0:
        told = [event.message for event in events if event.kind == "preempted"]
        assert len(told) == 2
        assert "epoch-0_step-2 is given up" in told[0]
        assert "epoch-0_step-1 is what stands" in told[1]
    with Checkpointer(out) as checkpointer:
        assert checkpointer.resume(made(7)) == RunState(0, 1, 8)


def check_seconds_are_the_coordinators(out: Path) -> None:
    state = made()
    with Checkpointer(out, save=[Every(seconds=1000)]) as checkpointer:
        if RANK == 1:
            checkpointer._schedule._last_began -= 5000
        assert checkpointer.save(state, epoch=0, step=1, batch_size=8) is None
        if RANK == 0:
            checkpointer._schedule._last_began -= 5000
        assert checkpointer.save(state, epoch=0, step=2, batch_size=8) is not None
        assert checkpointer.save(state, epoch=0, step=3, batch_size=8) is None
    assert names(out) == ["epoch-0_step-2"]


def torchrun(out: Path) -> None:
    """Train until torchrun, told to end, tells its ranks."""
    state = made()
    with Checkpointer(out, save=[OnPreemption()]) as checkpointer:

        def tell_the_launcher() -> None:
            if RANK == 0:
                os.kill(os.getppid(), signal.SIGTERM)

        left_at = train_until_preempted(checkpointer, state, {3: tell_the_launcher})
    print(json.dumps({"left_at": left_at}), flush=True)  # noqa: T201 - the test reads it


def checks() -> dict[str, Callable[[Path], None]]:
    """Return the checks by name."""
    return {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}


def main() -> None:
    global RANK, PIDS  # noqa: PLW0603 - the checks are functions of the rank that runs them
    out, wanted = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    PIDS = [0] * dist.get_world_size()
    dist.all_gather_object(PIDS, os.getpid())
    if wanted == ["torchrun"]:
        torchrun(out)
        dist.destroy_process_group()
        return
    run_and_report({name: checks()[name] for name in wanted}, lambda name: out / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
