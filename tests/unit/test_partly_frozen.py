"""Is what a model does not train written once, whatever else changes it, and is every checkpoint whole all the same?"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, Latest, RunState, TrainState, load
from shardpoint.catalog import verify
from shardpoint.comm import Comm, in_process_comms
from shardpoint.commit import find_committed
from shardpoint.engine.opening import agree_on_structure
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.training import training_request
from shardpoint.errors import CheckpointError, TornSnapshotError
from shardpoint.events import Event
from shardpoint.storage import BufferPool, LocalStore
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
    # Behind the training it is asked for once a save has found it unchanged.
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


@contextmanager
def slow_writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold what is behind the staging back; give what lets it go."""
    go, opened = threading.Event(), save_module.open_save

    def held(*args: Any) -> Any:
        assert go.wait(60)
        return opened(*args)

    with monkeypatch.context() as patches:
        patches.setattr(save_module, "open_save", held)
        try:
            yield go
        finally:
            go.set()


def unchanged_twice(checkpointer: Checkpointer, state: TrainState) -> None:
    """Make two saves, after which what does not train is no longer staged."""
    for number in (1, 2):
        step(state, number)
        save(checkpointer, state, number).result()


def test_a_few_rows_that_change_after_a_step_are_not_in_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(1)
    table = state.model.get_parameter("embed.weight")
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        unchanged_twice(checkpointer, state)
        with slow_writer(monkeypatch) as go:
            pending, expected = save(checkpointer, state, 3), weights(state.model)
            step(state, 3)
            with torch.no_grad():
                table[7] += 1
            go.set()
            assert pending.result().linked_bytes > 0
        pending, after = save(checkpointer, state, 4), weights(state.model)
        step(state, 4)
        with torch.no_grad():
            table[8] += 1
        assert pending.result().linked_bytes == 0
    assert same_bits(expected, on_disk(place(tmp_path, 3) / "modeling"))
    assert same_bits(after, on_disk(place(tmp_path, 4) / "modeling"))


def test_what_is_synced_now_and_then_never_fails_a_save(tmp_path: Path) -> None:
    """As a target network inside the model."""
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    expected, linked = {}, []
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        for number in range(1, 13):
            expected[number] = weights(state.model)
            pending = save(checkpointer, state, number)
            step(state, number)
            if number % 4 == 0:
                with torch.no_grad():
                    body.copy_(state.model.get_parameter("head.weight"))
            linked.append(pending.result().linked_bytes > 0)
    assert all(same_bits(model, on_disk(place(tmp_path, n) / "modeling")) for n, model in expected.items())
    assert linked == [False, False, True, True, False, False, True, True, False, False, True, True]


def test_a_file_that_is_another_under_the_same_name(tmp_path: Path) -> None:
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    body.requires_grad = True
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        unchanged_twice(checkpointer, state)
        body.requires_grad = False  # the first file is of the embedding and this one from now on
        for number in (3, 4, 5):
            pending, expected = save(checkpointer, state, number), weights(state.model)
            step(state, number)
            with torch.no_grad():
                body.mul_(0.9)
            pending.result()
            assert same_bits(expected, on_disk(place(tmp_path, number) / "modeling"))


@pytest.mark.parametrize("refreezes", [False, True])
def test_a_step_that_trains_it_while_a_save_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, refreezes: bool
) -> None:
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        unchanged_twice(checkpointer, state)
        with slow_writer(monkeypatch):
            pending, expected = save(checkpointer, state, 3), weights(state.model)
            body.requires_grad = True
            assert state.optimizer is not None
            state.model(torch.arange(8)).square().mean().backward()
            body.requires_grad = not refreezes
            state.optimizer.step()
        pending.result()
    assert same_bits(expected, on_disk(place(tmp_path, 3) / "modeling"))
    assert not torch.equal(expected["body.weight"], weights(state.model)["body.weight"])


def test_a_save_of_another_structure_is_committed_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(1)
    body = state.model.get_parameter("body.weight")
    with Checkpointer(tmp_path, async_save=True, max_in_flight=3) as checkpointer:
        unchanged_twice(checkpointer, state)
        with slow_writer(monkeypatch):
            body.requires_grad = True
            between = save(checkpointer, state, 3)  # not committed yet when the next one compares with the one before
            body.requires_grad = False
            pending, expected = save(checkpointer, state, 4), weights(state.model)
            step(state, 4)
            with torch.no_grad():
                body.mul_(0.9)
        between.result()
        assert pending.result().linked_bytes > 0
    assert inode(tmp_path, 4, STILL) == inode(tmp_path, 2, STILL)
    assert same_bits(expected, on_disk(place(tmp_path, 4) / "modeling"))


@pytest.mark.parametrize("changes", [False, True])
def test_a_link_that_is_refused_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, changes: bool) -> None:
    state = state_of(1)
    table = state.model.get_parameter("embed.weight")

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        unchanged_twice(checkpointer, state)
        monkeypatch.setattr(os, "link", refuse)
        with slow_writer(monkeypatch):
            pending, expected = save(checkpointer, state, 3), weights(state.model)
            step(state, 3)
            if changes:
                with torch.no_grad():
                    table[7, 7] += 1
        if changes:
            with pytest.raises(TornSnapshotError, match=r"embed\.weight"):
                pending.result()
        else:
            assert pending.result().linked_bytes == 0
    assert (place(tmp_path, 3).exists()) == (not changes)
    if not changes:
        assert same_bits(expected, on_disk(place(tmp_path, 3) / "modeling"))


def test_nan_is_counted_once(tmp_path: Path) -> None:
    state = state_of(1)
    with torch.no_grad():
        state.model.get_parameter("embed.weight")[199, 5] = float("nan")
        state.model.get_parameter("body.weight")[0, 0] = float("inf")
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        told = []
        for number in (1, 2, 3, 4):
            if number == 4:
                with torch.no_grad():
                    state.model.get_parameter("body.weight")[1, 1] = 0  # found changed: staged after all
            told.append(save(checkpointer, state, number).result().suspect)
    assert told[0] is not None
    assert all(suspect == told[0] for suspect in told)


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


def on_two_ranks(models: list[nn.Module], optimized: list[bool], root: Path) -> list[BaseException | str]:
    """Save two ranks' states as one checkpoint; return how it ended on each."""
    outcomes: list[BaseException | str] = ["not reached"] * 2

    def run(comm: Comm, model: nn.Module, has_optimizer: bool) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if has_optimizer else None
        roles = {"": TrainState(model=model, optimizer=optimizer)}
        request = training_request(roles, comm, RunState(0, 1, 1))
        try:
            save_module.save(LocalStore(root), comm, request, StructureCache(), pool=BufferPool(2**26))
            outcomes[comm.rank] = "saved"
        except CheckpointError as error:
            outcomes[comm.rank] = error

    ranks = zip(in_process_comms(2, stall_s=20.0), models, optimized, strict=True)
    threads = [threading.Thread(target=run, args=rank) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("frozen_on", [0, 1])
def test_ranks_of_which_one_has_nothing_frozen_fail_by_the_same_error(tmp_path: Path, frozen_on: int) -> None:
    still, trained = nn.Linear(WIDTH, WIDTH), nn.Linear(8, WIDTH)
    still.weight.requires_grad = False
    models: list[nn.Module] = [still, trained] if frozen_on == 0 else [trained, still]
    outcomes = on_two_ranks(models, [True, True], tmp_path)
    assert all("weight" in str(outcome) for outcome in outcomes), outcomes
    assert not list(tmp_path.glob("epoch*"))


def test_stages_of_which_only_one_has_a_trained_base_under_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def stage(name: str) -> nn.Module:
        inner = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH)})
        model: nn.Module = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=[name]))
        return model

    models = [stage("first"), stage("second")]
    models[0].get_parameter("base_model.model.first.base_layer.bias").requires_grad_()
    assert on_two_ranks(models, [True, False], tmp_path) == ["saved", "saved"]


def test_what_one_rank_must_be_careful_with_is_read_late_by_none() -> None:
    """Stages of which one lies under adapters; the other is frozen in part, and may be changed by anything."""
    peft = pytest.importorskip("peft")
    adapted: nn.Module = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH)})
    adapted = peft.get_peft_model(adapted, peft.LoraConfig(r=2, target_modules=["first"]))
    plain = nn.Linear(WIDTH, WIDTH)
    plain.weight.requires_grad = False
    late: list[frozenset[str] | None] = [None] * 2

    def run(comm: Comm, model: nn.Module) -> None:
        state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        request = replace(training_request({"": state}, comm, RunState(0, 1, 1)), in_background=True)
        late[comm.rank] = agree_on_structure(comm, request, StructureCache(), 2**24).late

    for models, expected in (([adapted, plain], frozenset()), ([adapted, nn.Linear(4, 4)], frozenset({"modeling"}))):
        ranks = zip(in_process_comms(2, stall_s=20.0), models, strict=True)
        threads = [threading.Thread(target=run, args=rank) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert late == [expected, expected]
