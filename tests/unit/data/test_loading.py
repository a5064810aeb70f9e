"""Does a loader with a generator of its own draw nothing from the global random state, and stay seeded by the user?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from shardpoint import Booster
from shardpoint.data import StatefulDistributedSampler, with_own_generator
from shardpoint.errors import UsageError


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_opening_it_draws_nothing(kind: Any) -> None:
    model = torch.nn.Linear(1, 1)
    makes: list[Callable[[Any], Any]] = [
        with_own_generator,
        lambda loader: Booster().boost(model, dataloader=loader)[3],
    ]
    for make in makes:
        bare = kind(range(6), batch_size=2)
        before = torch.get_rng_state()
        assert torch.equal(torch.cat(list(bare)), torch.arange(6))
        assert not torch.equal(torch.get_rng_state(), before), "torch does not draw any more: with_own_generator can go"
        before = torch.get_rng_state()
        assert make(bare) is bare
        assert torch.equal(torch.cat(list(bare)), torch.arange(6))
        assert torch.equal(torch.get_rng_state(), before)


def test_its_seed_is_the_users() -> None:
    def seed(given: int) -> int:
        torch.manual_seed(given)
        torch.rand(given)  # what is drawn before does not matter
        loader: Any = with_own_generator(DataLoader(range(2)))  # type: ignore[arg-type]
        return int(loader.generator.initial_seed())

    assert seed(1) == seed(1) != seed(2)


def test_a_generator_that_is_there_stays() -> None:
    own = torch.Generator()
    assert with_own_generator(DataLoader(range(2), generator=own)).generator is own  # type: ignore[arg-type]


def test_what_is_no_loader_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a range is no torch.utils.data.DataLoader"):
        with_own_generator(range(3))  # type: ignore[type-var]
    loader = [1, 2]
    assert Booster().boost(torch.nn.Linear(1, 1), dataloader=loader)[3] is loader


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_what_loaders_drew_from_a_restored_random_state_is_told(draws: int) -> None:
    sampler = StatefulDistributedSampler(range(12), 1, 0)
    told: list[str] = []
    for start, num_told in ((4, int(draws > 0)), (0, 0)):  # at an epoch's begin the uninterrupted run draws as well
        sampler.set_start_index(start)
        sampler.watch_random_state(told.append)
        loaders: list[Any] = [DataLoader(range(12), sampler=sampler) for _ in range(max(draws, 1))]  # type: ignore[arg-type]
        opened = [iter(loader if draws else with_own_generator(loader)) for loader in loaders]
        assert not told
        for batches in opened:
            next(batches)
        assert len(told) == num_told
        told.clear()
    sampler.set_start_index(4)
    sampler.watch_random_state(told.append)
    torch.rand(1)  # not a base seed: the user's own
    list(sampler)
    assert not told
