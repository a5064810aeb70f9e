"""Does an optimizer whose state comes in behind step as if it had been there, or not at all?"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from shardpoint import Checkpointer, Latest, RunState, TrainState, load_checkpoint, save_checkpoint
from shardpoint.adapters.optimizer import is_incomplete
from shardpoint.booster import Booster, DistCoordinator
from shardpoint.errors import ChecksumError, StorageError, UsageError
from shardpoint.events import Event
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.training import OPTIMIZERS, bits, flip, net, optimizer_state, same_bits, train, weights

NAME = "epoch-0_step-3"
STATE_FILE = f"{NAME}/optimizer/optimizer-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Any:
    before = dict(_global_optimizer_pre_hooks)
    _global_optimizer_pre_hooks.clear()  # an optimizer whose state failed to come keeps its hook
    yield
    _global_optimizer_pre_hooks.clear()
    _global_optimizer_pre_hooks.update(before)


def made(seed: int, optimizer: str = "adamw") -> TrainState:
    model = net(seed)
    stepped = OPTIMIZERS[optimizer](model.parameters())
    return TrainState(
        model=model, optimizer=stepped, lr_scheduler=torch.optim.lr_scheduler.MultiStepLR(stepped, [2, 2, 5])
    )


def stepped(state: TrainState, steps: range) -> list[float]:
    assert state.optimizer is not None
    losses = []
    for step in steps:
        losses += train(state.model, state.optimizer, range(step, step + 1))
        state.lr_scheduler.step()
    return losses


def states(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    return optimizer_state(state.model, state.optimizer)


def saved(root: Path, optimizer: str = "adamw") -> TrainState:
    state = made(0, optimizer)
    stepped(state, range(3))
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=3, batch_size=4)
    return state


class Gate:
    """Holds the reading of the optimizer's file until it is opened."""

    def __init__(self, root: Path) -> None:
        self.opened = threading.Event()
        fault = Fault("open_reader", "*/optimizer/*.safetensors", action="call", then=self.wait)
        self.store = FaultyStore(LocalStore(root), [fault])

    def wait(self) -> None:
        assert self.opened.wait(60)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_next_steps_are_the_same_to_the_last_bit(optimizer: str, used: bool, tmp_path: Path) -> None:
    state = saved(tmp_path, optimizer)
    assert state.optimizer is not None
    at_save, lr = states(state), state.optimizer.param_groups[0]["lr"]
    expected = stepped(state, range(3, 6))
    other = made(7, optimizer)
    if used:
        stepped(other, range(20, 22))
    before = {name: tensor.clone() for name, tensor in states(other).items()}
    gate = Gate(tmp_path)
    with Checkpointer(tmp_path, store=gate.store) as checkpointer:
        assert checkpointer.resume(other, lazy_optimizer=True) == RunState(0, 3, 12)
        assert other.optimizer is not None
        assert other.optimizer.param_groups[0]["lr"] == lr
        if any(tensor.dim() for tensor in at_save.values()):
            assert checkpointer.optimizer_ready(0) is False
        assert same_bits(states(other), before), "before it is whole, an optimizer's state is as it was"
        gate.opened.set()
        assert checkpointer._arrival is None or checkpointer._arrival._finished.wait(60)
        assert same_bits(states(other), before), "nor when it is whole, until somebody waits for it"
        losses = stepped(other, range(3, 6))  # the first step waits
        assert losses == expected
        assert checkpointer.optimizer_ready()
        assert checkpointer.optimizer_ready(0)
    assert same_bits(weights(other.model), weights(state.model))
    assert same_bits(states(other), states(state))
    assert len(_global_optimizer_pre_hooks) == 0


def test_waiting_puts_the_state_in_place(tmp_path: Path) -> None:
    expected = states(saved(tmp_path))
    told: list[Event] = []
    other = made(7)
    with Checkpointer(tmp_path, listener=told.append) as checkpointer:
        checkpointer.resume(other, lazy_optimizer=True)
        assert checkpointer.optimizer_ready(timeout_s=60)
        assert same_bits(states(other), expected)
    assert [event.kind for event in told].count("loaded") == 2


def test_closing_waits_and_puts_the_state_in_place(tmp_path: Path) -> None:
    expected = states(saved(tmp_path))
    other = made(7)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(other, lazy_optimizer=True)
    assert same_bits(states(other), expected)
    assert not [thread for thread in threading.enumerate() if thread.name == "shardpoint-optimizer"]


def test_a_save_waits(tmp_path: Path) -> None:
    expected = states(saved(tmp_path))
    other = made(7)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(other, lazy_optimizer=True)
        checkpointer.save(other, epoch=0, step=4, batch_size=4)
        third = made(8)
        checkpointer.resume(third)
    assert same_bits(states(third), expected)


def test_a_second_resume_waits_and_replaces(tmp_path: Path) -> None:
    expected = states(saved(tmp_path))
    other = made(7)
    with Checkpointer(tmp_path) as checkpointer:
        for lazy in (True, True, False):
            checkpointer.resume(other, lazy_optimizer=lazy)
        assert same_bits(states(other), expected)
        stepped(other, range(3, 4))


def test_another_optimizer_steps_while_the_state_comes_in(tmp_path: Path) -> None:
    saved(tmp_path)
    gate, free = Gate(tmp_path), made(9)
    with Checkpointer(tmp_path, store=gate.store) as checkpointer:
        checkpointer.resume(made(7), lazy_optimizer=True)
        stepped(free, range(1))
        gate.opened.set()


def test_without_an_optimizer_nothing_comes_in(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.optimizer_ready()
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
        assert checkpointer.resume(TrainState(model=model), lazy_optimizer=True) == RunState(0, 1, 1)
        assert checkpointer.optimizer_ready()


def test_a_damaged_state_is_an_error_at_every_step_and_save(tmp_path: Path) -> None:
    first = made(0)
    stepped(first, range(1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(first, epoch=0, step=1, batch_size=4)
    saved(tmp_path)
    flip(tmp_path / STATE_FILE)
    other = made(7)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(other, lazy_optimizer=True) == RunState(0, 3, 12)
        for _ in range(2):
            with pytest.raises(ChecksumError) as caught:
                stepped(other, range(3, 4))
            assert caught.value.target_modified
            assert caught.value.key.startswith("optimizer/optimizer-00001-of-00001.safetensors#")
            assert any("resume again" in note for note in caught.value.__notes__)
        with pytest.raises(ChecksumError):
            checkpointer.optimizer_ready()
        with pytest.raises(ChecksumError):
            checkpointer.save(other, epoch=0, step=4, batch_size=4)
        assert not states(other), "nothing of it was put in place"
        assert checkpointer.resume(other) == RunState(0, 1, 4), "an eager resume falls back"
        assert same_bits(states(other), states(first))
        assert len(_global_optimizer_pre_hooks) == 0
        stepped(other, range(1, 2))


def test_closing_tells_of_damage_that_nobody_heard_of(tmp_path: Path) -> None:
    saved(tmp_path)
    flip(tmp_path / STATE_FILE)
    other = made(7)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.resume(other, lazy_optimizer=True)
    with pytest.raises(ChecksumError):
        checkpointer.close()
    checkpointer.close()
    Checkpointer(tmp_path).close()  # the root was given up
    with pytest.raises(ChecksumError):  # and such an optimizer never steps
        stepped(other, range(3, 4))


def test_an_error_on_its_way_out_is_not_hidden(tmp_path: Path) -> None:
    saved(tmp_path)
    gate, other = Gate(tmp_path), made(7)

    def run() -> None:
        with Checkpointer(tmp_path, store=gate.store) as checkpointer:
            checkpointer.resume(other, lazy_optimizer=True)
            gate.opened.set()
            raise RuntimeError("of the loop")

    with pytest.raises(RuntimeError, match="of the loop"):
        run()
    assert not [thread for thread in threading.enumerate() if thread.name == "shardpoint-optimizer"]


def test_a_read_that_fails_is_an_error_at_the_step(tmp_path: Path) -> None:
    saved(tmp_path)
    other = made(7)
    store = FaultyStore(LocalStore(tmp_path), [Fault("read", "*/optimizer/*.safetensors")])
    with Checkpointer(tmp_path, store=store) as checkpointer:
        checkpointer.resume(other, lazy_optimizer=True)
        with pytest.raises(StorageError, match="injected"):
            stepped(other, range(3, 4))


def test_nobody_saves_or_fills_an_optimizer_behind_its_back(tmp_path: Path) -> None:
    saved(tmp_path)
    gate, other, booster = Gate(tmp_path), made(7), Booster()
    assert other.optimizer is not None
    with Checkpointer(tmp_path, store=gate.store) as checkpointer:
        checkpointer.resume(other, lazy_optimizer=True)
        with pytest.raises(UsageError, match="optimizer_ready"):
            save_checkpoint(
                tmp_path / "b", booster, other.model, other.optimizer, other.lr_scheduler, 0, 1, 1, DistCoordinator()
            )
        with pytest.raises(UsageError, match="still being restored"):
            load_checkpoint(tmp_path / NAME, booster, other.model, other.optimizer, other.lr_scheduler)
        gate.opened.set()


def test_a_mismatch_changes_nothing_and_starts_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    other = made(7, "sgd_momentum")
    before = weights(other.model)
    from shardpoint.errors import MismatchError

    with Checkpointer(tmp_path, keep=[Latest(1)]) as checkpointer:
        with pytest.raises(MismatchError):
            checkpointer.resume(other, lazy_optimizer=True)
        assert checkpointer.optimizer_ready()
    assert same_bits(weights(other.model), before)
    assert other.optimizer is not None
    assert not is_incomplete(other.optimizer)
    assert len(_global_optimizer_pre_hooks) == 0


def test_damaged_weights_fall_back_before_anything_comes_in(tmp_path: Path) -> None:
    first = made(0)
    stepped(first, range(1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(first, epoch=0, step=1, batch_size=4)
    saved(tmp_path)
    flip(tmp_path / NAME / "modeling" / "model-00001-of-00001.safetensors")
    other = made(7)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(other, lazy_optimizer=True) == RunState(0, 1, 4)
        checkpointer.optimizer_ready()
    assert same_bits(states(other), states(first))
    assert [bits(tensor) for tensor in weights(other.model).values()] == [
        bits(tensor) for tensor in weights(first.model).values()
    ]


def test_a_failed_optimizer_is_not_kept_alive(tmp_path: Path) -> None:
    import weakref

    saved(tmp_path)
    flip(tmp_path / STATE_FILE)
    other = made(7)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.resume(other, lazy_optimizer=True)
    with pytest.raises(ChecksumError):
        checkpointer.close()
    assert other.optimizer is not None
    alive = weakref.ref(other.optimizer)
    del other, checkpointer
    gc.collect()
    assert alive() is None
