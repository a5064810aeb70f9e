"""Is what a model does not train written once, whatever else changes it, and is every checkpoint whole all the same?"""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, Latest, TrainState, load
from shardpoint.catalog import verify
from shardpoint.commit import find_committed
from shardpoint.errors import TornSnapshotError
from shardpoint.events import Event
from shardpoint.storage import LocalStore
from tests.training import on_disk, same_bits, weights

save_module: Any = importlib.import_module("shardpoint.engine.save")

WIDTH = 160  # a weight has 100 KB
STILL, TRAINED = (f"modeling/model-0000{number}-of-00002.safetensors" for number in (1, 2))


class Tower(nn.Module):
    """A large embedding and a first layer that do not train, with a small one that does not either, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))
        for parameter in (self.embed.weight, self.body.weight, self.scale):
            parameter.requires_grad = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return out


def state_of(seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = Tower()
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05))


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    state.model(torch.arange(number, number + 8)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def save(checkpointer: Checkpointer, state: TrainState, number: int) -> Any:
    pending = checkpointer.save(state, epoch=0, step=number, batch_size=1)
    assert pending is not None
    return pending


def place(root: Path, number: int) -> Path:
    return root / f"epoch-0_step-{number}"


def inode(root: Path, number: int, path: str) -> int:
    return (place(root, number) / path).stat().st_ino


@pytest.mark.parametrize("async_save", [False, True])
def test_it_is_written_once_and_every_checkpoint_is_whole(tmp_path: Path, *, async_save: bool) -> None:
    state, heard = state_of(1), list[Event]()
    with Checkpointer(tmp_path, keep=[Latest(2)], async_save=async_save, listener=heard.append) as checkpointer:
        linked = []
        for number in range(1, 6):
            step(state, number)
            linked.append(save(checkpointer, state, number).result().linked_bytes)
    size = (place(tmp_path, 5) / STILL).stat().st_size
    # Behind the training it is trusted once a save has found it unchanged.
    assert linked == ([0, 0, size, size, size] if async_save else [0, size, size, size, size])
    assert inode(tmp_path, 4, STILL) == inode(tmp_path, 5, STILL)
    assert inode(tmp_path, 4, TRAINED) != inode(tmp_path, 5, TRAINED)
    assert set(on_disk_in(place(tmp_path, 5) / STILL)) == {"embed.weight", "body.weight"}
    shutil.rmtree(place(tmp_path, 4))
    assert same_bits(weights(state.model), on_disk(place(tmp_path, 5) / "modeling"))
    committed = find_committed(LocalStore(tmp_path), "epoch-0_step-5")
    assert committed is not None
    assert verify(LocalStore(tmp_path), committed).ok
    assert not [event for event in heard if event.kind == "frozen_changed"]

    other = state_of(9)
    with Checkpointer(tmp_path, async_save=async_save) as checkpointer:
        checkpointer.resume(other)
        for number in (6, 7):
            step(state, number)
            step(other, number)
            # Found unchanged by the first save already: the checkpoint before is that of the run before.
            result = save(checkpointer, other, number).result()
            assert result.linked_bytes == (0 if async_save and number == 6 else size)
    assert same_bits(weights(other.model), weights(state.model))


def on_disk_in(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_what_something_else_changes_after_each_step_is_saved_as_it_was(tmp_path: Path) -> None:
    """As an average of weights in the model itself, or a router's bias."""
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    expected = {}
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        for number in range(1, 5):
            expected[number] = weights(state.model)
            pending = save(checkpointer, state, number)
            step(state, number)
            with torch.no_grad():
                body.mul_(0.9)
            pending.result()
    for number, model in expected.items():
        assert same_bits(model, on_disk(place(tmp_path, number) / "modeling"))
    assert len({inode(tmp_path, number, STILL) for number in expected}) == 4


class Held:
    """Holds the checksums of what is frozen back until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        checksum: Callable[..., Any] = save_module.checksum_frozen

        def held(*args: Any) -> None:
            self.reached.set()
            assert self.go.wait(60)
            checksum(*args)

        monkeypatch.setattr(save_module, "checksum_frozen", held)


def proven(checkpointer: Checkpointer, state: TrainState) -> None:
    """Make two saves, after which what does not train is trusted."""
    for number in (1, 2):
        step(state, number)
        save(checkpointer, state, number).result()


def test_what_was_trusted_and_changes_too_early_is_not_committed_and_trusted_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        proven(checkpointer, state)
        with monkeypatch.context() as patches:
            held = Held(patches)
            pending = save(checkpointer, state, 3)
            assert held.reached.wait(60)
            with torch.no_grad():
                body.mul_(0.9)
            held.go.set()
            with pytest.raises(TornSnapshotError, match=r"body\.weight.*pending\.staged"):
                pending.result()
        pending = save(checkpointer, state, 4)
        expected = weights(state.model)
        step(state, 4)
        with torch.no_grad():
            body.mul_(0.9)
        pending.result()
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == [f"epoch-0_step-{number}" for number in (1, 2, 4)]
    assert same_bits(expected, on_disk(place(tmp_path, 4) / "modeling"))


def test_a_step_that_begins_to_train_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(1)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        proven(checkpointer, state)
        held = Held(monkeypatch)
        pending, expected = save(checkpointer, state, 3), weights(state.model)
        assert held.reached.wait(60)
        step(state, 3)  # does not wait
        assert not pending.done()
        state.model.get_parameter("body.weight").requires_grad_()
        trainer = threading.Thread(target=step, args=(state, 4))
        trainer.start()
        trainer.join(0.2)
        had_waited = trainer.is_alive()
        held.go.set()
        trainer.join()
        pending.result()
    assert had_waited
    assert same_bits(expected, on_disk(place(tmp_path, 3) / "modeling"))
    assert not torch.equal(expected["body.weight"], weights(state.model)["body.weight"])


def test_layers_may_begin_and_cease_to_train(tmp_path: Path) -> None:
    state, heard = state_of(1), list[Event]()
    body = state.model.get_parameter("body.weight")
    with Checkpointer(tmp_path, listener=heard.append) as checkpointer:
        for number in range(1, 7):
            body.requires_grad = number in (3, 4)
            step(state, number)
            save(checkpointer, state, number)
            assert same_bits(weights(state.model), on_disk(place(tmp_path, number) / "modeling"))
    assert [inode(tmp_path, n, STILL) == inode(tmp_path, n + 1, STILL) for n in range(1, 6)] == [
        True,  # both do not train
        False,  # the embedding alone: another file
        True,
        False,
        True,
    ]
    assert not [event for event in heard if event.kind == "frozen_changed"]


def test_a_change_behind_the_optimizers_back_is_told(tmp_path: Path) -> None:
    state, heard = state_of(1), list[Event]()
    with Checkpointer(tmp_path, listener=heard.append) as checkpointer:
        save(checkpointer, state, 1)
        with torch.no_grad():
            state.model.get_parameter("embed.weight")[3, 3] = 7
        save(checkpointer, state, 2)
    (told,) = [event for event in heard if event.kind == "frozen_changed"]
    assert "embed.weight" in told.message
    assert "body" not in told.message
    assert on_disk(place(tmp_path, 2) / "modeling")["embed.weight"][3, 3] == 7
    assert on_disk(place(tmp_path, 1) / "modeling")["embed.weight"][3, 3] != 7


def test_it_loads_where_everything_trains(tmp_path: Path) -> None:
    state = state_of(1)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2):
            step(state, number)
            save(checkpointer, state, number)
    model = Tower().requires_grad_()
    load(place(tmp_path, 2), TrainState(model=model))
    assert same_bits(weights(state.model), weights(model))
