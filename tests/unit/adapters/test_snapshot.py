"""Are nested optimizer states, taken behind the training, those of the moment when the save was asked for?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState
from shardpoint.adapters.collect import SMALL_BYTES
from shardpoint.engine import background
from shardpoint.engine.writing import stage_chunk
from shardpoint.errors import TornSnapshotError
from tests.optimizers import Nested
from tests.training import on_disk, same_bits

WAIT_S = 60.0
WIDTH = 160


class Turning(Nested):
    """Keeps a turned tensor in a nest, too, and a flat one of another shape: both change in place with each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for parameter, state in self.state.items():
            if "turned" not in state:
                state["turned"] = [torch.zeros(parameter.numel(), 3).t()]
                state["wide"] = {"sums": torch.zeros(WIDTH, WIDTH)}
            state["turned"][0].add_(1)
            state["wide"]["sums"].add_(parameter.sum())


def made() -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
    return TrainState(model=model, optimizer=Turning(model.parameters()))


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
    state.model(batch).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def kept(state: TrainState) -> dict[str, torch.Tensor]:
    """Return copies of the nested tensors, as they are called on disk."""
    assert state.optimizer is not None
    found: dict[str, torch.Tensor] = {}
    for name, parameter in state.model.named_parameters():
        own = state.optimizer.state[parameter]
        momenta = own["momenta"]
        found |= {f"{name}.history/{number}": tensor for number, tensor in enumerate(own["history"])}
        found |= {f"{name}.momenta/fast": momenta["fast"], f"{name}.momenta/slow~1~0~2": momenta["slow/~#"]}
        found |= {f"{name}.momenta/#3/deep": momenta[3]["deep"], f"{name}.a~1b": own["a/b"]}
        found |= {f"{name}.turned/0": own["turned"][0], f"{name}.wide/sums": own["wide"]["sums"]}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold staging up: yield (set once staging begins, what lets it go on)."""
    reached, opened = threading.Event(), threading.Event()

    def held_up(*args: Any) -> Any:
        reached.set()
        assert opened.wait(WAIT_S)
        return stage_chunk(*args)

    monkeypatch.setattr(background, "stage_chunk", held_up)
    yield reached, opened
    opened.set()


def test_a_step_right_after_the_save_waits_for_nested_states(
    tmp_path: Path, gate: tuple[threading.Event, threading.Event]
) -> None:
    reached, opened = gate
    state = made()
    step(state, 1)
    step(state, 2)
    expected = kept(state)
    sizes = [tensor.numel() * tensor.element_size() for tensor in expected.values()]
    assert min(sizes) < SMALL_BYTES < max(sizes), "both what is copied at once and what is copied before a step"
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=2, batch_size=4)
        assert pending is not None
        assert reached.wait(WAIT_S)
        thread = threading.Thread(target=step, args=(state, 3), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "the step waits"
        assert same_bits(kept(state), expected)
        opened.set()
        thread.join(WAIT_S)
        pending.result(WAIT_S)
    assert not any(torch.equal(tensor, expected[name]) for name, tensor in kept(state).items()), "all of it changed"
    assert same_bits(on_disk(tmp_path / "epoch-0_step-2" / "optimizer"), expected)


def test_a_nest_that_is_replaced_before_it_is_staged_is_saved_as_it_was(
    tmp_path: Path, gate: tuple[threading.Event, threading.Event]
) -> None:
    reached, opened = gate
    state = made()
    assert state.optimizer is not None
    step(state, 1)
    expected = kept(state)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=4)
        assert pending is not None
        assert reached.wait(WAIT_S)
        for own in state.optimizer.state.values():
            own["history"].clear()
            own["momenta"] = {}
            own["wide"]["sums"] = torch.zeros(WIDTH, WIDTH)
        opened.set()
        pending.result(WAIT_S)
    assert same_bits(on_disk(tmp_path / "epoch-0_step-1" / "optimizer"), expected)


def test_a_nested_tensor_that_changes_outside_a_step_is_never_committed(
    tmp_path: Path, gate: tuple[threading.Event, threading.Event]
) -> None:
    reached, opened = gate
    state = made()
    assert state.optimizer is not None
    step(state, 1)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=4)
        assert pending is not None
        assert reached.wait(WAIT_S)
        state.optimizer.state[state.model.get_parameter("0.weight")]["momenta"][3]["deep"].add_(1)
        opened.set()
        with pytest.raises(TornSnapshotError, match=r"1 tensors changed.*0\.weight\.momenta/#3/deep"):
            pending.result(WAIT_S)
    assert not list(tmp_path.glob("epoch-*"))


def test_small_and_turned_nested_tensors_may_change_at_once(
    tmp_path: Path, gate: tuple[threading.Event, threading.Event]
) -> None:
    reached, opened = gate
    state = made()
    assert state.optimizer is not None
    step(state, 1)
    expected = kept(state)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=4)
        assert pending is not None
        assert reached.wait(WAIT_S)
        for parameter, own in state.optimizer.state.items():
            own["turned"][0].add_(1)
            if parameter.numel() < WIDTH * WIDTH:
                own["momenta"]["fast"].add_(1)
        opened.set()
        pending.result(WAIT_S)
    assert same_bits(on_disk(tmp_path / "epoch-0_step-1" / "optimizer"), expected)
