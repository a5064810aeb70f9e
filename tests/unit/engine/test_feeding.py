"""Does a StatefulDataLoader's state come back exactly, and is one that does not fit refused before anything changes?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler as TorchdataSampler

from shardpoint import Checkpointer, MismatchError, TrainState, UsageError
from shardpoint.adapters.tensors import live_values, plain_values
from shardpoint.data import StatefulDistributedSampler
from shardpoint.engine.feeding import check_fit
from shardpoint.manifest import decode_document, encode_document

SAMPLES = list(range(40))


class Stream(IterableDataset[int]):
    """Numbers, with a state that holds every kind of value that is known to be in one."""

    def __init__(self, extra: Any = None) -> None:
        self.position = 0
        self.extra = extra
        self.random = random.Random(5)

    def __iter__(self) -> Iterator[int]:
        while self.position < len(SAMPLES):
            self.position += 1
            self.random.random()
            yield self.position

    def state_dict(self) -> dict[Any, Any]:
        return {
            "position": self.position,
            "random": self.random.getstate(),  # a tuple of 625 integers, in one
            "generator": torch.Generator().get_state(),
            "buffer": [torch.arange(3, dtype=torch.bfloat16), np.arange(4, dtype=np.int16), np.float32(1.5)],
            "digest": b"\x00\xff",
            "nothing": None,
            "empty": {},
            "nan": float("nan"),
            3: {(1, 2): {4, 5}},
            "extra": self.extra,
        }

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.position = state["position"]
        self.random.setstate(state["random"])


def made(kind: str, num_workers: int, **options: Any) -> Any:
    """Make a loader, the same in every life."""
    torch.manual_seed(3)
    options = {"batch_size": 2, "num_workers": num_workers} | options
    if kind == "stream":
        return StatefulDataLoader(Stream(), **options)
    if kind == "sampler":
        options["sampler"] = StatefulDistributedSampler(SAMPLES, 1, 0, micro_batch_size=2, seed=8)
    return StatefulDataLoader(SAMPLES, **options, shuffle=kind == "shuffled" or None)


def values(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def same(one: Any, other: Any) -> bool:
    """Compare values and their types, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return bool(one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, np.ndarray | np.generic):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    return bool(one == other or (one != one and other != other))  # noqa: PLR0124 - NaN


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "sampler", "shuffled", "sequential"])
def test_a_loader_goes_on_with_the_next_batch(kind: str, num_workers: int, tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    loader = made(kind, num_workers)
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    assert same(live_values(decode_document(encode_document(plain_values(state, "state")))), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, sampler=loader), epoch=0, step=7, batch_size=2)
        expected = values(batches)
        again = made(kind, num_workers)
        checkpointer.resume(TrainState(model=model, sampler=again))
    random_state = torch.get_rng_state()
    found = values(again)
    assert found == expected
    assert len(found) >= 13
    assert torch.equal(torch.get_rng_state(), random_state), "opened before the random state was restored"


def test_the_next_epoch_of_a_loader_that_was_resumed(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    for stop in (7, 20):  # in the middle, and behind the last batch
        loader = made("sampler", 0)
        loader.sampler.set_epoch(4)
        batches = iter(loader)
        for _ in range(stop):
            next(batches)
        with Checkpointer(tmp_path / str(stop)) as checkpointer:
            checkpointer.save(TrainState(model=model, sampler=loader), epoch=4, step=stop, batch_size=2)
            expected = [values(batches)]
            loader.sampler.set_epoch(5)
            expected.append(values(loader))
            again = made("sampler", 0)
            checkpointer.resume(TrainState(model=model, sampler=again))
        found = []
        for epoch in (4, 5):
            again.sampler.set_epoch(epoch)
            found.append(values(again))
        assert found == expected
        assert [len(epoch) for epoch in found] == [20 - stop, 20]


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 2)])
def test_another_number_of_workers_is_refused(workers: tuple[int, int], tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    loader = made("sampler", workers[0])
    next(iter(loader))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, sampler=loader), epoch=0, step=1, batch_size=2)
        other, weight = made("sampler", workers[1]), torch.nn.Linear(1, 1)
        before = weight.weight.clone()
        with pytest.raises(MismatchError, match=f"num_workers={workers[0]}, and this one has {workers[1]}") as caught:
            checkpointer.resume(TrainState(model=weight, sampler=other))
    assert caught.value.mismatched[0].startswith("data: saved by")
    assert torch.equal(weight.weight, before)
    assert len(values(other)) == 20


class Colour:
    """What no document holds."""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_document_cannot_hold_is_named_with_its_place(num_workers: int, tmp_path: Path) -> None:
    loader = StatefulDataLoader(Stream(extra={"deep": [1, Colour()]}), num_workers=num_workers)
    next(iter(loader))
    place = r"data/rank-00000.json: the state of the StatefulDataLoader .* \$\.\S*dataset_state\['extra'\].deep\[1\]"
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match=rf"{place} is a \S+Colour, "):
        checkpointer.save(TrainState(model=torch.nn.Linear(1, 1), sampler=loader), epoch=0, step=1, batch_size=1)
    assert not list(tmp_path.glob("epoch-*"))


def test_what_has_no_state_is_refused(tmp_path: Path) -> None:
    loader: Any = torch.utils.data.DataLoader(SAMPLES)  # type: ignore[arg-type]
    model = torch.nn.Linear(1, 1)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UsageError, match=r"data/rank-00000.json: a DataLoader has no state_dict: give the sampler"):
            checkpointer.save(TrainState(model=model, sampler=loader), epoch=0, step=1, batch_size=1)
        checkpointer.save(TrainState(model=model, sampler=made("sampler", 0)), epoch=0, step=2, batch_size=1)
        with pytest.raises(MismatchError, match="DataLoader has no load_state_dict"):
            checkpointer.resume(TrainState(model=model, sampler=loader))


def stopped(loader: Any, num_batches: int = 3) -> Any:
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)
    return loader.state_dict()


def test_only_what_counts_for_the_whole_job_goes_on_on_other_ranks() -> None:
    check_fit(made("sampler", 0), stopped(made("sampler", 0)), 1, 3)
    for kind in ("stream", "shuffled", "sequential"):
        check_fit(made(kind, 0), stopped(made(kind, 0)), 2, 2)
        with pytest.raises(UsageError, match="counts the batches of one rank: resume on 2 ranks, as many as saved it"):
            check_fit(made(kind, 0), stopped(made(kind, 0)), 2, 3)
    rare = {"num_workers": 1, "snapshot_every_n_steps": 2}
    check_fit(made("sampler", **rare), stopped(made("sampler", **rare), 2), 2, 3)
    with pytest.raises(UsageError, match="between two of its snapshots"):
        check_fit(made("sampler", **rare), stopped(made("sampler", **rare)), 2, 3)
    theirs = TorchdataSampler(SAMPLES, 2, 0)
    check_fit(theirs, theirs.state_dict(), 2, 2)
    with pytest.raises(UsageError, match=r"torchdata\S+StatefulDistributedSampler counts the samples of one rank"):
        check_fit(theirs, theirs.state_dict(), 2, 3)


def test_a_loader_over_other_data_or_batches_is_refused() -> None:
    state = stopped(made("sampler", 0))
    other = StatefulDataLoader([0] * 39, batch_size=2, sampler=StatefulDistributedSampler(range(39), 1, 0))
    with pytest.raises(UsageError, match="num_samples=40 and this sampler 39"):
        check_fit(other, state, 1, 1)
    batch_sampler = BatchSampler(StatefulDistributedSampler(SAMPLES, 1, 0), 2, drop_last=False)
    own = StatefulDataLoader(SAMPLES, batch_sampler=batch_sampler)
    with pytest.raises(UsageError, match="batch sampler kept no state of its StatefulDistributedSampler"):
        check_fit(own, stopped(own), 1, 1)
    with pytest.raises(UsageError, match="not the state of a StatefulDataLoader"):
        check_fit(own, {"position": 3}, 1, 1)
    check_fit(own, {}, 1, 1)
