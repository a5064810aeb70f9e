"""Is a resume that does not restore the whole run an error, whatever is wrong with it? One fault at a time."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shardpoint import Checkpointer, TrainState
from shardpoint.data import StatefulDistributedSampler
from shardpoint.errors import MismatchError, ResumeMismatchError, UsageError
from shardpoint.events import Event
from tests.training import OPTIMIZERS, net, train

NUM_SAMPLES, BATCH, STEPS = 40, 4, 3


def made(seed: int = 0, num_samples: int = NUM_SAMPLES) -> TrainState:
    model = net(seed)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    sampler = StatefulDistributedSampler(range(num_samples), 1, 0, seed=5, batch_size=BATCH)
    return TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler, sampler=sampler)


def advance(state: TrainState) -> None:
    assert state.optimizer is not None
    for number in range(STEPS):
        train(state.model, state.optimizer, range(number, number + 1))
        state.lr_scheduler.step()
        state.sampler.set_start_index((number + 1) * BATCH)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    state = made()
    advance(state)
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=STEPS, batch_size=BATCH)
    return root


def resume(root: Path, state: TrainState, **options: Any) -> None:
    with Checkpointer(root) as checkpointer:
        assert checkpointer.resume(state, **options) is not None
        checkpointer.optimizer_ready()


def refused(root: Path, state: TrainState, **options: Any) -> list[str]:
    with pytest.raises(ResumeMismatchError) as caught:
        resume(root, state, **options)
    assert "Do not train on with it" in str(caught.value)
    return caught.value.differences


@pytest.mark.parametrize("lazy", [False, True])
def test_a_whole_resume_finds_no_difference(lazy: bool, saved: Path) -> None:
    state = made(7)
    resume(saved, state, lazy_optimizer=lazy)
    document = json.loads((saved / f"epoch-0_step-{STEPS}/data/next.json").read_text())
    order = StatefulDistributedSampler(range(NUM_SAMPLES), 1, 0, seed=5)
    left = list(order)[STEPS * BATCH :]
    expected = list(left)
    for epoch in range(1, 8):
        order.set_epoch(epoch)
        expected += list(order)
    assert document == {"asked": 256, "samples": expected[:256]}
    assert list(state.sampler) == left


# ---- what the state or the checkpoint lacks: refused before anything changes


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler", "sampler"])
def test_what_is_left_out_is_an_error(name: str, saved: Path, tmp_path: Path) -> None:
    lacking = made()
    setattr(lacking, name, None)
    with pytest.raises(MismatchError) as caught:
        resume(saved, lacking)
    assert len(caught.value.unexpected) >= 1
    # and the other way round: the checkpoint has none
    advanced = made()
    advance(advanced)
    setattr(advanced, name, None)
    if name == "optimizer":
        advanced.lr_scheduler = None
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(advanced, epoch=0, step=STEPS, batch_size=BATCH)
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path, made())
    assert len(caught.value.missing) >= 1


def test_an_optimizer_without_parameters_is_an_error(saved: Path, tmp_path: Path) -> None:
    empty = made()
    empty.lr_scheduler = None
    empty.optimizer = torch.optim.AdamW([{"params": []}])
    with pytest.raises(MismatchError) as caught:
        resume(saved, empty)
    assert any("in no rank's optimizer" in line for line in caught.value.unexpected)
    with Checkpointer(tmp_path) as checkpointer:
        empty.sampler = None
        checkpointer.save(empty, epoch=0, step=STEPS, batch_size=BATCH)
        for target in (made(), empty):
            target.sampler = target.lr_scheduler = None
            with pytest.raises(MismatchError, match="without a parameter in any group"):
                checkpointer.resume(target)


def test_a_scheduler_of_another_optimizer_is_an_error(saved: Path, tmp_path: Path) -> None:
    state = made()
    other = torch.optim.AdamW(state.model.parameters())
    for scheduler in (
        torch.optim.lr_scheduler.MultiStepLR(other, [2, 5]),
        torch.optim.lr_scheduler.SequentialLR(other, [torch.optim.lr_scheduler.ConstantLR(other)] * 2, [1]),
    ):
        state.lr_scheduler = scheduler
        with pytest.raises(MismatchError, match="another optimizer than the state's"):
            resume(saved, state)
        with (
            Checkpointer(tmp_path) as checkpointer,
            pytest.raises(UsageError, match="another optimizer than the state"),
        ):
            checkpointer.save(state, epoch=0, step=0, batch_size=BATCH)


def test_a_scheduler_of_a_wrapper_of_the_optimizer_is_not(tmp_path: Path) -> None:
    class Wrapper(torch.optim.AdamW):
        optimizer: torch.optim.Optimizer

    state = made()
    outer = Wrapper(state.model.parameters())
    assert state.optimizer is not None
    outer.optimizer = state.optimizer
    state.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(outer, [2, 5])
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(state, epoch=0, step=0, batch_size=BATCH) is not None


def test_a_sampler_that_stands_at_the_beginning_after_steps_is_an_error(tmp_path: Path) -> None:
    state = made()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UsageError, match="stands at sample 0 of epoch 0 after 3 steps"):
            checkpointer.save(state, epoch=0, step=STEPS, batch_size=BATCH)
        checkpointer.save(state, epoch=0, step=0, batch_size=BATCH)  # nothing was done yet
        state.sampler.set_epoch(1)
        checkpointer.save(state, epoch=1, step=STEPS, batch_size=BATCH)  # a count of steps that goes on over epochs
        state.sampler.set_epoch(0)
        checkpointer.save(
            state, epoch=2, step=STEPS, batch_size=BATCH
        )  # a loop that does not tell the sampler of epochs


def test_a_stored_position_at_the_beginning_after_steps_is_an_error(tmp_path: Path) -> None:
    """What a release before this one may have saved."""
    state = made()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shardpoint.engine.training._check_state", lambda *_: None)
            checkpointer.save(state, epoch=0, step=STEPS, batch_size=BATCH)
        with pytest.raises(MismatchError, match="stands at sample 0 of epoch 0 after 3 steps"):
            checkpointer.resume(state)


@pytest.mark.parametrize("num_samples", [NUM_SAMPLES - 1, NUM_SAMPLES + 1])
def test_a_data_set_of_another_length_is_an_error(num_samples: int, saved: Path) -> None:
    with pytest.raises(MismatchError, match="num_samples=40"):
        resume(saved, made(num_samples=num_samples))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_iterator_from_before_the_resume_is_an_error_when_it_is_used(num_workers: int, saved: Path) -> None:
    state = made()
    loader: DataLoader[int] = DataLoader(range(NUM_SAMPLES), BATCH, sampler=state.sampler, num_workers=num_workers)  # type: ignore[arg-type]
    before = iter(loader)
    next(before)
    resume(saved, state)
    with pytest.raises(ResumeMismatchError, match="make a new iterator"):
        next(before)
    assert next(iter(loader)).tolist() == state.sampler.peek(BATCH)


# ---- what does not come to be what was saved


def test_an_optimizer_that_takes_its_options_its_own_way(saved: Path) -> None:
    state = made()
    load = type(state.lr_scheduler).load_state_dict

    def and_step(self: Any, values: Any) -> None:
        load(self, values)
        self.optimizer.param_groups[0]["lr"] *= 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state.lr_scheduler), "load_state_dict", and_step)
        assert refused(saved, state) == [
            "optimizer: lr of param group 0 was 0.005000000000000001 and is 0.010000000000000002"
        ]


def count(state: Any) -> None:
    next(iter(state.values()))["step"] += 1


def drop(state: Any) -> None:
    next(iter(state.values())).pop("exp_avg")


def empty(state: Any) -> None:
    state.clear()


def copy(state: Any) -> None:
    values = next(iter(state.values()))
    values["exp_avg"] = values["exp_avg"].clone()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "damage, text",
    [
        (count, "step of embed.weight was tensor(3.) and is tensor(4.)"),
        (drop, "embed.weight had the states ['exp_avg', 'exp_avg_sq', 'step'] and has ['exp_avg_sq', 'step']"),
        (empty, "embed.weight had the states ['exp_avg', 'exp_avg_sq', 'step'] and has []"),
        (copy, "exp_avg of embed.weight is not the tensor that was verified"),
    ],
)
def test_optimizer_states_that_something_changes(
    damage: Callable[[Any], None], text: str, lazy: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardpoint.adapters.optimizer import OptimizerTarget

    put = OptimizerTarget.install_states

    def and_damage(self: OptimizerTarget) -> None:
        put(self)
        damage(self.optimizer.state)

    monkeypatch.setattr(OptimizerTarget, "install_states", and_damage)
    assert refused(saved, made(), lazy_optimizer=lazy)[0] == f"optimizer: {text}"


def test_a_scheduler_that_ignores_its_state(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made()
    monkeypatch.setattr(type(state.lr_scheduler), "load_state_dict", lambda *_: None)
    assert "lr_scheduler.json: last_epoch was 3 and is 0" in refused(saved, state)


def test_a_scheduler_that_newer_torch_gave_one_more_field(saved: Path) -> None:
    state = made()
    state.lr_scheduler.later = 1
    resume(saved, state)


@pytest.mark.parametrize("name", ["lr_scheduler", "sampler"])
def test_what_cannot_be_read_back_is_an_error(name: str, saved: Path) -> None:
    class MultiStepLR:
        def load_state_dict(self, _: Any) -> None:
            raise AssertionError

    state = made()
    setattr(state, name, MultiStepLR())
    with pytest.raises(MismatchError, match="MultiStepLR has no state_dict"):
        resume(saved, state)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_sampler_that_ignores_its_position(lazy: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatefulDistributedSampler, "load_state_dict", lambda *_: None)
    differences = refused(saved, made(), lazy_optimizer=lazy)
    assert differences[0] == "data/rank-00000.json: start_index was 12 and is 0"
    assert differences[1].startswith(
        "data/next.json: 256 samples were to come next and 256 do; from number 0 on they were"
    )


def test_a_sampler_that_orders_the_samples_otherwise(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is the same, its samples are not: the same seed in another release of what shuffles."""
    monkeypatch.setattr(StatefulDistributedSampler, "_order", lambda self, *_: torch.arange(self.num_samples))
    (difference,) = refused(saved, made())
    assert difference.startswith("data/next.json: 256 samples were to come next and 256 do; from number 0 on")


def test_a_sampler_that_drops_others_since_its_batches_are_larger(tmp_path: Path) -> None:
    state = made()
    state.sampler = StatefulDistributedSampler(range(NUM_SAMPLES), num_replicas=1, rank=0, drop_last=True)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=0, batch_size=1)
    other = made()
    other.sampler = StatefulDistributedSampler(range(NUM_SAMPLES), num_replicas=7, rank=0, drop_last=True)
    (difference,) = refused(tmp_path, other)
    assert "make the sampler with the batch_size that the run was saved with" in difference
    kept = made()
    kept.sampler = StatefulDistributedSampler(range(NUM_SAMPLES), num_replicas=1, rank=0, drop_last=True)
    resume(tmp_path, kept)


@pytest.mark.parametrize(
    "draws, name",
    [(random.random, "python"), (np.random.random, "numpy"), (lambda: torch.rand(1), "torch")],
)
def test_a_random_state_that_something_draws_from(
    draws: Callable[[], object], name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peek = StatefulDistributedSampler.peek

    def and_draw(self: StatefulDistributedSampler, num_samples: int) -> list[int]:
        draws()
        return peek(self, num_samples)

    monkeypatch.setattr(StatefulDistributedSampler, "peek", and_draw)
    assert refused(saved, made()) == [f"rng/rank-00000.json: the random state of {name} is not the one that was saved"]


class Plain:
    """A sampler of somebody else's, without `peek`."""

    position = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.position, NUM_SAMPLES))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_sampler_without_peek_records_none(tmp_path: Path) -> None:
    state = made()
    state.sampler = Plain()
    state.sampler.position = 7
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=STEPS, batch_size=BATCH)
        state.sampler.position = 0
        checkpointer.resume(state)
    assert state.sampler.position == 7
    assert not (tmp_path / f"epoch-0_step-{STEPS}/data/next.json").exists()


# ---- a mismatch ends a resume: it is never passed over


def test_no_earlier_checkpoint_is_taken_instead(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(saved, tmp_path / "root")
    told: list[Event] = []
    state = made()
    advance(state)
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=STEPS + 1, batch_size=BATCH)
    monkeypatch.setattr(StatefulDistributedSampler, "load_state_dict", lambda *_: None)
    with Checkpointer(root, listener=told.append) as checkpointer, pytest.raises(ResumeMismatchError, match="step-4"):
        checkpointer.resume(made())
    assert "fell_back" not in [event.kind for event in told]
