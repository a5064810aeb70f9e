"""Does a prepared loader give every share equally many batches, and its workers numbers of their own?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from shardpoint import Booster
from shardpoint.booster import (
    GeminiPlugin,
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    Plugin,
    TorchDDPPlugin,
    TorchFSDPPlugin,
)
from shardpoint.data import StatefulDistributedSampler
from shardpoint.data.prepared import prepare_dataloader
from shardpoint.errors import UsageError


class Drawn(Dataset[tuple[int, ...]]):
    """What a worker's three generators give first, by its number, and the sample."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, ...]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        numbers = torch.randint(2**60, ()).item(), random.getrandbits(60), np.random.randint(2**60)  # noqa: NPY002 - the global one
        return info.id, *map(int, numbers), index


def share_of(dataset: Any, batch_size: int, share: int, num_shares: int, **changes: Any) -> DataLoader[Any]:
    settings: dict[str, Any] = {"shuffle": False, "seed": 1, "drop_last": False, "sampler_class": None, "options": {}}
    return prepare_dataloader(dataset, batch_size, share=share, num_shares=num_shares, **(settings | changes))


@given(num_samples=st.integers(1, 60), num_shares=st.integers(1, 5), batch_size=st.integers(1, 4))
def test_every_share_has_the_batches_that_torchs_sampler_would_give(
    num_samples: int, num_shares: int, batch_size: int
) -> None:
    data, sizes, seen = torch.arange(num_samples), [], []
    for share in range(num_shares):
        torchs = DataLoader(data, batch_size, sampler=DistributedSampler(data, num_shares, share, shuffle=False))  # type: ignore[arg-type, var-annotated]
        ours = share_of(data, batch_size, share, num_shares)
        sizes.append([len(batch) for batch in ours])
        assert sizes[-1] == [len(batch) for batch in torchs]
        assert len(ours) == len(sizes[-1])
        seen += [int(sample) for batch in ours for sample in batch]
    assert sizes == sizes[:1] * num_shares
    assert set(seen) == set(range(num_samples))
    assert len(seen) - num_samples == -num_samples % num_shares


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(num_shares: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = []
        for share in range(num_shares):
            loader = share_of(torch.arange(24), 6 // num_shares, share, num_shares, shuffle=True, seed=seed)
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            batches.append([batch.tolist() for batch in loader])
        return [sample for step in zip(*batches, strict=True) for batch in step for sample in batch]

    expected = StatefulDistributedSampler(range(24), 1, 0, seed=7).peek(48)
    assert order(7, 0) + order(7, 1) == expected
    assert sorted(order(8, 0)) == list(range(24))
    assert order(8, 0) != order(7, 0) != order(7, 1)


def test_drop_last_leaves_the_same_samples_out_on_any_number_of_ranks() -> None:
    for num_shares in (1, 2, 3):
        loaders = [
            share_of(torch.arange(20), 6 // num_shares, s, num_shares, drop_last=True) for s in range(num_shares)
        ]
        assert {len(loader) for loader in loaders} == {3}
        assert sorted(int(i) for loader in loaders for batch in loader for i in batch) == list(range(18))


def test_a_loader_starts_where_the_sampler_was_told() -> None:
    loader = TorchDDPPlugin().prepare_dataloader(torch.arange(10), 2)
    loader.sampler.set_start_index(start_index=4)  # type: ignore[attr-defined]  # ColossalChat calls it so
    assert len(loader) == 3
    assert [batch.tolist() for batch in loader] == [[4, 5], [6, 7], [8, 9]]


def test_workers_draw_what_belongs_to_epoch_share_and_worker() -> None:
    def drawn(loader: DataLoader[Any], epoch: int) -> dict[int, tuple[int, ...]]:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        first: dict[int, tuple[int, ...]] = {}
        for worker, *numbers, _ in loader:
            first.setdefault(int(worker), tuple(map(int, numbers)))
        return first

    def made(share: int) -> DataLoader[Any]:
        return share_of(Drawn(), 1, share, 2, options={"num_workers": 2})

    before = torch.get_rng_state()
    loader = made(0)
    found = [*drawn(loader, 0).values(), *drawn(loader, 1).values(), *drawn(made(1), 0).values()]
    assert len(found) == 6
    for numbers in zip(*found, strict=True):
        assert len(set(numbers)) == 6
    assert list(drawn(made(0), 1).values()) == found[2:4]  # a run that began with epoch 1
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_or_a_start_of_workers_that_is_given_is_used() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    started: list[int] = []
    loader = share_of(range(4), 2, 0, 1, options={"generator": generator, "worker_init_fn": started.append})
    assert loader.worker_init_fn == started.append
    list(loader)
    assert loader.generator is generator
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "make", [TorchDDPPlugin, TorchFSDPPlugin, LowLevelZeroPlugin, GeminiPlugin, lambda: HybridParallelPlugin(tp_size=1)]
)
def test_every_plugin_takes_colossalais_parameters_in_its_order(make: Callable[[], Plugin]) -> None:
    class Told(DistributedSampler[Any]):
        def __init__(self, dataset: Any, **told: Any) -> None:
            assert told == {"num_replicas": 1, "rank": 0, "shuffle": True}
            super().__init__(dataset, **told)

    batches: list[Any] = []
    loader = make().prepare_dataloader(range(7), 2, True, 3, True, False, 0, Told, collate_fn=list)
    Booster().boost(torch.nn.Linear(1, 1), dataloader=loader)
    batches += loader
    assert isinstance(loader.sampler, Told)
    assert len(batches) == len(loader) == 3
    assert all(isinstance(batch, list) for batch in batches)


def test_a_class_made_from_ours_gets_all_settings() -> None:
    class Named(StatefulDistributedSampler):
        pass

    sampler: Any = share_of(range(9), 2, 1, 2, drop_last=True, sampler_class=Named, seed=4).sampler
    assert isinstance(sampler, Named)
    assert (sampler.seed, sampler.drop_last, sampler.micro_batch_size, sampler.batch_size) == (4, True, 2, 4)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    "given_, message",
    [
        ({"dataset": Stream()}, "Stream has no length"),
        ({"dataset": object()}, "object has no length"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size must be an integer, not True"),
        ({"seed": -1}, "seed is -1"),
        ({"sampler": [1]}, "leave sampler out"),
        ({"batch_sampler": [[1]]}, "leave batch_sampler out"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(given_: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"dataset": range(4), "batch_size": 1} | given_
    with pytest.raises(UsageError, match=message):
        TorchDDPPlugin().prepare_dataloader(**arguments)
