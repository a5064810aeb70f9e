"""Does a save behind the training hold what was there when it was asked for, or say why not, and block only steps?"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, Latest, PendingSave, RunState, TrainState
from shardpoint.engine import background
from shardpoint.engine.writing import stage_chunk
from shardpoint.errors import SaveCancelledError, StorageError, TornSnapshotError, UsageError
from shardpoint.events import Event
from shardpoint.storage import LocalStore
from shardpoint.storage.writer import LocalWriter
from shardpoint.testing import Fault, FaultyStore
from tests.training import on_disk, optimizer_state, same_bits, weights

WAIT_S = 60.0
WIDTH = 192  # a square of floats is more than what is copied at once


class Wide(nn.Module):
    """Tensors that are staged later, small ones that are copied at once, and buffers that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(1)
        out: torch.Tensor = self.second(self.norm(self.first(x)))
        return out


def made(seed: int = 0, **options: Any) -> TrainState:
    torch.manual_seed(seed)
    model = Wide()
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, **options))


def backward(state: TrainState, number: int) -> None:
    batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
    state.model(batch).square().mean().backward()


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    backward(state, number)
    state.optimizer.step()
    state.optimizer.zero_grad()


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    return weights(state.model) | {
        f"optimizer/{name}": value for name, value in optimizer_state(state.model, state.optimizer).items()
    }


def stored(checkpoint: Path, role: str = "") -> dict[str, torch.Tensor]:
    found = on_disk(checkpoint / role / "modeling")
    return found | {f"optimizer/{name}": value for name, value in on_disk(checkpoint / role / "optimizer").items()}


def without_steps(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if not name.endswith(".step")}


class Gate:
    """Holds staging up: chunks after the first `free` wait until the gate is opened."""

    def __init__(self, free: int = 0) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self._left = free
        self._real = stage_chunk

    def __call__(self, *args: Any) -> Any:
        if self._left == 0:
            self.reached.set()
            assert self.opened.wait(WAIT_S)
        else:
            self._left -= 1
        return self._real(*args)


@contextmanager
def gated(monkeypatch: pytest.MonkeyPatch, free: int = 0) -> Iterator[Gate]:
    gate = Gate(free)
    monkeypatch.setattr(background, "stage_chunk", gate)
    try:
        yield gate
    finally:
        gate.opened.set()


def in_thread(work: Any) -> tuple[threading.Thread, threading.Event]:
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_it_holds_what_was_there_when_it_was_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    state = made(**options)
    expected = {}
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        for number in range(1, 6):
            step(state, number)
            expected[number] = everything(state)
            pending = checkpointer.save(state, epoch=0, step=number, batch_size=8)
            step(state, 100 + number)  # at once: forward, backward, a step
        assert pending is not None
        assert pending.result(WAIT_S).name == "epoch-0_step-5"
        assert pending.blocked_s > 0
    for number, values in expected.items():
        checkpoint = tmp_path / f"epoch-0_step-{number}"
        assert same_bits(stored(checkpoint), without_steps(values))
    other = made(1)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(other) == RunState(0, 5, 40)
    assert same_bits(everything(other), expected[5])


def test_a_step_waits_for_staging_and_a_forward_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    step(state, 0)
    expected = everything(state)
    with Checkpointer(tmp_path, async_save=True) as checkpointer, gated(monkeypatch) as gate:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        assert pending is not None
        assert gate.reached.wait(WAIT_S)
        for number in range(3):  # gradients may be accumulated over several
            backward(state, number)
        with pytest.raises(TimeoutError):
            pending.staged(0.01)
        assert state.optimizer is not None
        thread, stepped = in_thread(state.optimizer.step)
        assert not stepped.wait(0.2)
        assert same_bits(weights(state.model), {k: v for k, v in expected.items() if "/" not in k} | buffers(state))
        gate.opened.set()
        thread.join(WAIT_S)
        assert stepped.is_set()
        pending.staged()
        pending.result(WAIT_S)
    assert same_bits(stored(tmp_path / "epoch-0_step-1"), without_steps(expected))


def buffers(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in state.model.named_buffers()}


def test_a_step_waits_for_its_own_role_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = {"actor": made(0), "critic": made(1)}
    for state in roles.values():
        step(state, 0)
    expected = {role: everything(state) for role, state in roles.items()}
    with Checkpointer(tmp_path, async_save=True, budget_bytes=4 * 2**20) as checkpointer:
        # The actor's two files (weights, states) are its first two chunks.
        with gated(monkeypatch, free=2) as gate:
            pending = checkpointer.save(roles, epoch=0, step=1, batch_size=8)
            assert pending is not None
            assert gate.reached.wait(WAIT_S)
            step(roles["actor"], 1)
            stranger = made(2)
            step(stranger, 1)  # a model that is not saved
            critic = roles["critic"].optimizer
            assert critic is not None
            thread, stepped = in_thread(critic.step)
            assert not stepped.wait(0.2)
            gate.opened.set()
            thread.join(WAIT_S)
        pending.result(WAIT_S)
    for role, values in expected.items():
        assert same_bits(stored(tmp_path / "epoch-0_step-1", role), without_steps(values))


@pytest.mark.parametrize("what", ["weights", "one tensor", "state", "step counter"])
def test_a_torn_snapshot_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    state = made(fused=True)
    step(state, 0)
    assert state.optimizer is not None
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        first = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        assert first is not None
        first.result(WAIT_S)
        with gated(monkeypatch) as gate:
            pending = checkpointer.save(state, epoch=0, step=2, batch_size=8)
            assert pending is not None
            assert gate.reached.wait(WAIT_S)
            moments = [values["exp_avg"] for values in state.optimizer.state.values()]
            with torch.no_grad():
                if what == "weights":
                    for parameter in state.model.parameters():
                        parameter.data.mul_(1.5)
                elif what == "one tensor":
                    state.model.get_parameter("second.weight").detach().numpy()[:] += 1
                elif what == "state":
                    for moment in moments:
                        moment.add_(1)
                else:
                    next(iter(state.optimizer.state.values()))["step"] += 1
        with pytest.raises(TornSnapshotError, match=r"pending\.staged"):
            pending.result(WAIT_S)
        later = checkpointer.save(state, epoch=0, step=3, batch_size=8)
        assert later is not None
        later.result(WAIT_S)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0_step-1", "epoch-0_step-3"]
    assert not list((tmp_path / ".shardpoint").rglob("attempt-*"))


def test_after_staged_anything_may_change_weights(tmp_path: Path) -> None:
    state = made()
    step(state, 0)
    expected = everything(state)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        assert pending is not None
        pending.staged()
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.zero_()
        pending.result(WAIT_S)
    assert same_bits(stored(tmp_path / "epoch-0_step-1"), without_steps(expected))


def test_two_are_under_way_and_a_third_waits_or_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    step(state, 0)
    events: list[Event] = []
    for when_busy in ("wait", "skip"):
        root = tmp_path / when_busy
        with (
            Checkpointer(root, async_save=True, when_busy=when_busy, listener=events.append) as checkpointer,
            gated(monkeypatch) as gate,
        ):
            for number in (1, 2):
                assert checkpointer.save(state, epoch=0, step=number, batch_size=8) is not None
            if when_busy == "skip":
                assert checkpointer.save(state, epoch=0, step=3, batch_size=8) is None
                gate.opened.set()
            else:

                def third() -> None:
                    checkpointer.save(state, epoch=0, step=3, batch_size=8)

                thread, asked = in_thread(third)
                assert not asked.wait(0.2)
                gate.opened.set()
                thread.join(WAIT_S)
                assert asked.is_set()
        assert len(list(root.glob("epoch-*"))) == (3 if when_busy == "wait" else 2)
    assert [event.key for event in events if event.kind == "save_skipped"] == ["epoch-0_step-3"]


def test_a_cancelled_save_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    step(state, 0)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        with gated(monkeypatch) as gate:
            pending = checkpointer.save(state, epoch=0, step=1, batch_size=8)
            assert pending is not None
            assert gate.reached.wait(WAIT_S)
            assert pending.cancel()
        with pytest.raises(SaveCancelledError, match="epoch-0_step-1 was cancelled"):
            pending.result(WAIT_S)
        done = checkpointer.save(state, epoch=0, step=2, batch_size=8)
        assert done is not None
        done.result(WAIT_S)
        assert not done.cancel()
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-2"]


def test_what_is_staged_of_a_cancelled_save_is_not_written(tmp_path: Path) -> None:
    state, asked, found = made(), threading.Event(), list[PendingSave | None]()

    def cancel() -> None:  # everything is staged, and nothing is written yet
        assert asked.wait(WAIT_S)
        assert found[0] is not None
        assert found[0].cancel()

    store = FaultyStore(LocalStore(tmp_path), [Fault("create_file", "*attempt-*", action="call", then=cancel)])
    with Checkpointer(tmp_path, async_save=True, store=store) as checkpointer:
        found.append(checkpointer.save(state, epoch=0, step=1, batch_size=8))
        asked.set()
        assert found[0] is not None
        with pytest.raises(SaveCancelledError):
            found[0].result(WAIT_S)
        ops = [op for op, _ in store.log]
        assert ops.count("write") == ops.count("create_file") > 0  # a header each, which the attempt was opened with
        assert len(checkpointer._pool._free) == checkpointer._pool._num_buffers > 0


@pytest.mark.parametrize("op", ["create_file", "write", "sync", "close", "rename"])
def test_a_failure_is_told_and_training_goes_on(tmp_path: Path, op: str) -> None:
    state, events = made(), list[Event]()
    step(state, 0)
    fault = Fault(op, "*attempt-epoch-0_step-1*", errno=errno.ENOSPC)
    with Checkpointer(
        tmp_path, async_save=True, store=FaultyStore(LocalStore(tmp_path), [fault]), listener=events.append
    ) as checkpointer:
        failing = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        step(state, 1)
        assert failing is not None
        with pytest.raises(StorageError, match="No space left"):
            failing.result(WAIT_S)
        expected = everything(state)
        good = checkpointer.save(state, epoch=0, step=2, batch_size=8)
        step(state, 2)
        assert good is not None
        good.result(WAIT_S)
    assert [event.key for event in events if event.kind == "save_failed"] == ["epoch-0_step-1"]
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-2"]
    assert same_bits(stored(tmp_path / "epoch-0_step-2"), without_steps(expected))


def test_a_failure_that_nobody_asked_about_is_told_again_and_raised_by_close(tmp_path: Path) -> None:
    state, events = made(), list[Event]()
    faults = [Fault("write", "*attempt-epoch-0_step-1*"), Fault("write", "*attempt-epoch-0_step-2*")]
    checkpointer = Checkpointer(
        tmp_path, async_save=True, store=FaultyStore(LocalStore(tmp_path), faults), listener=events.append
    )
    first = checkpointer.save(state, epoch=0, step=1, batch_size=8)
    assert first is not None
    while not first.done():
        first.staged()
    checkpointer.save(state, epoch=0, step=2, batch_size=8)
    with pytest.raises(StorageError, match="injected"):
        checkpointer.close()
    told = [event for event in events if event.kind == "save_failed"]
    assert [event.key for event in told] == ["epoch-0_step-1", "epoch-0_step-1", "epoch-0_step-2"]
    checkpointer.close()


def test_what_cannot_be_saved_is_told_by_the_result(tmp_path: Path) -> None:
    state = made()
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        meta = TrainState(model=nn.Linear(2, 2, device="meta"))
        for bad, message in ((meta, "meta"), (state, "at least 0")):
            pending = checkpointer.save(bad, epoch=0, step=1 if bad is meta else -1, batch_size=8)
            assert pending is not None
            with pytest.raises(UsageError, match=message):
                pending.result(WAIT_S)
    with pytest.raises(UsageError, match="max_in_flight"):
        Checkpointer(tmp_path, max_in_flight=0)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_budget_bounds_what_is_staged(tmp_path: Path, async_save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))  # 8 MiB
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    expected = weights(model)
    budget = 3 * 2**20
    peak = 0
    with Checkpointer(tmp_path, async_save=async_save, budget_bytes=budget) as checkpointer:
        real = checkpointer._pool.acquire

        def acquire(**how: Any) -> Any:
            nonlocal peak
            buffer = real(**how)
            peak = max(peak, checkpointer._pool.num_bytes)
            return buffer

        monkeypatch.setattr(checkpointer._pool, "acquire", acquire)
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        assert pending is not None
        pending.result(WAIT_S)
    assert 0 < peak <= budget
    assert same_bits(on_disk(tmp_path / "epoch-0_step-1" / "modeling"), expected)
    with pytest.raises(UsageError, match="budget_bytes"):
        Checkpointer(tmp_path, budget_bytes=2**20)


def test_old_ones_are_pruned_and_a_step_is_replaced_behind_the_training(tmp_path: Path) -> None:
    state = made()
    with Checkpointer(tmp_path, async_save=True, keep=[Latest(2)]) as checkpointer:
        for number in (1, 2, 3, 3):
            step(state, number)
            checkpointer.save(state, epoch=0, step=number, batch_size=8)
        expected = everything(state)
        other = made(1)
        assert checkpointer.resume(other) == RunState(0, 3, 24)  # waits for what is under way
        assert same_bits(everything(other), expected)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0_step-2", "epoch-0_step-3"]


def test_who_writes_gives_way_to_who_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    seen: set[int] = set()
    real = LocalWriter.write_at

    def write_at(self: LocalWriter, data: Any, byte_offset: int) -> None:
        if threading.current_thread().name.startswith("shardpoint-write"):
            seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        real(self, data, byte_offset)

    monkeypatch.setattr(LocalWriter, "write_at", write_at)
    state = made()
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=8)
        assert pending is not None
        pending.result(WAIT_S)
        assert seen == {before + 10}
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
