"""Does every rank get its share of an epoch, from any position, and does a position survive a change of ranks?

The oracle is a plain list: the epoch's order, dealt out by hand.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shardpoint.data import StatefulDistributedSampler
from shardpoint.errors import UsageError


def deal(left: list[int], micro_batch_size: int, num_ranks: int) -> list[list[int]]:
    """Deal micro-batches out to ranks in turn, as one deals cards."""
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    turn = 0
    while left:
        hand, left = left[:micro_batch_size], left[micro_batch_size:]
        hands[turn % num_ranks] += hand
        turn += 1
    return hands


def ranks_of(num_samples: int, num_ranks: int, **options: Any) -> list[StatefulDistributedSampler]:
    return [StatefulDistributedSampler(range(num_samples), num_ranks, rank, **options) for rank in range(num_ranks)]


@given(
    num_samples=st.integers(1, 60),
    num_ranks=st.integers(1, 5),
    micro_batch_size=st.integers(1, 4),
    where=st.floats(0, 1),
)
def test_ranks_get_what_is_dealt_to_them(num_samples: int, num_ranks: int, micro_batch_size: int, where: float) -> None:
    start = int(where * num_samples)
    expected = deal(list(range(start, num_samples)), micro_batch_size, num_ranks)
    samplers = ranks_of(num_samples, num_ranks, micro_batch_size=micro_batch_size, shuffle=False)
    for sampler, hand in zip(samplers, expected, strict=True):
        sampler.set_epoch(0)
        sampler.set_start_index(start)
        assert len(sampler) == len(hand)
        assert list(sampler) == hand


@given(
    num_samples=st.integers(1, 60),
    steps=st.integers(0, 8),
    ranks_before=st.integers(1, 4),
    ranks_after=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
)
def test_each_sample_is_seen_once_over_a_resume_on_other_ranks(
    num_samples: int, steps: int, ranks_before: int, ranks_after: int, seed: int, epoch: int
) -> None:
    batch_size = 12  # divisible by every number of ranks here
    before = ranks_of(num_samples, ranks_before, seed=seed, batch_size=batch_size)
    consumed = min(steps * batch_size, num_samples)
    seen: list[int] = []
    for sampler in before:
        sampler.set_epoch(epoch)
        share = list(sampler)
        seen += share[: steps * batch_size // ranks_before]
        sampler.set_start_index(consumed)
    (state,) = {tuple(sorted(sampler.state_dict().items())) for sampler in before}  # equal on every rank
    for sampler in ranks_of(num_samples, ranks_after, batch_size=batch_size):
        sampler.load_state_dict(dict(state))
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert sorted(seen) == list(range(num_samples))


@given(num_samples=st.integers(12, 60), num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), steps=st.integers(0, 5))
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(num_samples: int, num_ranks: int, steps: int) -> None:
    batch_size = 12
    (alone,) = ranks_of(num_samples, 1, seed=3)
    order = list(alone)
    start = min(steps, num_samples // batch_size) * batch_size
    whole_batches = (num_samples - start) // batch_size
    shares = []
    for sampler in ranks_of(num_samples, num_ranks, seed=3, batch_size=batch_size, drop_last=True):
        sampler.set_epoch(0)
        sampler.set_start_index(start)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == whole_batches * batch_size // num_ranks
    own = batch_size // num_ranks
    for step in range(whole_batches):
        together = sorted(sample for share in shares for sample in share[step * own : (step + 1) * own])
        assert together == sorted(order[start + step * batch_size : start + (step + 1) * batch_size])


def test_the_order_depends_on_seed_and_epoch_and_stays_what_it_was() -> None:
    orders = {}
    for seed in range(4):
        for epoch in range(4):
            (sampler,) = ranks_of(40, 1, seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
            assert sorted(sampler) == list(range(40))
    assert len(set(orders.values())) == len(orders)  # seed 0, epoch 1 is not seed 1, epoch 0
    (sampler,) = ranks_of(10, 1)
    assert list(sampler) == [3, 8, 7, 5, 0, 1, 2, 4, 6, 9]  # a resumed epoch must go on in the order that it began


def global_random_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  (the global state is what is looked at)
    assert isinstance(numpy_state, dict)
    return random.getstate(), numpy_state["state"]["key"].tolist(), torch.get_rng_state().tolist()


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    (sampler,) = ranks_of(40, 1)
    before = global_random_state()
    first = list(sampler)
    assert global_random_state() == before
    torch.rand(1)
    assert list(sampler) == first


def test_a_loader_that_reads_ahead_does_not_move_the_position() -> None:
    (sampler,) = ranks_of(12, 1, shuffle=False)
    batches = iter(DataLoader(range(12), batch_size=4, sampler=sampler, collate_fn=list))  # type: ignore[arg-type]
    assert next(batches) == [0, 1, 2, 3]
    sampler.set_start_index(4)
    assert sampler.state_dict()["start_index"] == 4
    assert next(batches) == [4, 5, 6, 7]  # the iteration under way goes on
    assert list(sampler) == list(range(4, 12))


def test_a_start_index_belongs_to_one_epoch() -> None:
    (sampler,) = ranks_of(10, 1, shuffle=False)
    sampler.set_start_index(6)
    sampler.set_epoch(3)  # a resume may give the index first
    assert list(sampler) == [6, 7, 8, 9]
    sampler.set_epoch(3)
    assert list(sampler) == [6, 7, 8, 9]
    sampler.set_epoch(4)
    assert list(sampler) == list(range(10))


def test_a_loaded_position_is_kept_by_the_loop_that_follows() -> None:
    (sampler,) = ranks_of(10, 1, shuffle=False)
    assert len(list(sampler)) == 10
    sampler.load_state_dict({"seed": 5, "epoch": 2, "start_index": 8, "num_samples": 10, "shuffle": False})
    sampler.set_epoch(2)
    assert (sampler.seed, sampler.epoch, list(sampler)) == (5, 2, [8, 9])


def test_a_loaded_position_is_that_of_its_epoch() -> None:
    end_of_epoch_2 = {"seed": 0, "epoch": 2, "start_index": 10, "num_samples": 10, "shuffle": False}
    (sampler,) = ranks_of(10, 1, shuffle=False)
    sampler.load_state_dict(end_of_epoch_2)
    sampler.set_epoch(3)  # a loop that knows that epoch 2 was finished: it must not find epoch 3 finished too
    assert list(sampler) == list(range(10))
    sampler.load_state_dict(end_of_epoch_2)
    for epoch, expected in ((2, []), (3, list(range(10)))):  # a loop that does not know it
        sampler.set_epoch(epoch)
        assert list(sampler) == expected
    (sampler,) = ranks_of(10, 1, shuffle=False)
    sampler.set_epoch(3)
    sampler.set_start_index(4)
    sampler.set_epoch(4)
    assert list(sampler) == list(range(10))


def test_training_on_nothing_is_refused() -> None:
    (sampler,) = ranks_of(10, 1)
    assert len(list(sampler)) == 10
    sampler.set_start_index(10)
    with pytest.raises(
        UsageError, match=r"nothing is left .* epoch 0 has 10 samples .* start_index is 10; .* set_epoch\(1\)"
    ):
        next(iter(sampler))  # a loop without set_epoch
    sampler.load_state_dict(sampler.state_dict())
    loader: Any = DataLoader(range(10), batch_size=4, sampler=sampler)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing is left"):
        list(loader)
    sampler.set_epoch(1)
    assert len(list(loader)) == 3
    for num_samples, drop_last, why in (
        (0, False, "0 samples is empty"),
        (5, True, "fills no batch of 6 with drop_last"),
    ):
        (sampler,) = ranks_of(num_samples, 1, drop_last=drop_last, batch_size=6)
        sampler.set_epoch(1)
        with pytest.raises(UsageError, match=why):
            list(sampler)
        with pytest.raises(UsageError, match=why):
            sampler.peek(1)
        assert sampler.peek(0) == []


@pytest.mark.parametrize("drop_last, left", [(True, 2), (False, 3)])
def test_steps_that_were_planned_and_are_not_left_are_refused(*, drop_last: bool, left: int) -> None:
    for sampler in ranks_of(21, 2, drop_last=drop_last, batch_size=4):
        sampler.set_start_index(12)
        for planned in range(left + 1):
            sampler.expect(planned)
        with pytest.raises(
            UsageError, match=f"{left + 1} steps were planned and {left} are left: .* start_index is 12"
        ):
            sampler.expect(left + 1)
        assert sampler.start_index == 12


def test_with_drop_last_a_batch_begins_at_the_start_index() -> None:
    (sampler,) = ranks_of(50, 1, drop_last=True, batch_size=8, shuffle=False)
    sampler.set_start_index(16)
    with pytest.raises(UsageError, match=r"begin at multiples of 8: give step .* whole job"):
        sampler.set_start_index(20)
    assert sampler.start_index == 16
    sampler.set_start_index(20, other_batch_size=True)
    assert list(sampler) == list(range(20, 44))
    sampler.set_start_index(28)
    for index in (24, 12):
        with pytest.raises(UsageError, match="multiples of 8, from 20 on"):
            sampler.set_start_index(index)
    sampler.set_start_index(0)
    sampler.set_start_index(8)
    sampler.load_state_dict(sampler.state_dict() | {"start_index": 30})  # a state says where it was, in any batches
    assert list(sampler) == list(range(30, 46))
    sampler.set_start_index(38)
    with pytest.raises(UsageError, match="from 30 on"):
        sampler.set_start_index(40)
    sampler.set_epoch(1)
    sampler.set_start_index(40)
    (sampler,) = ranks_of(50, 1, batch_size=8, shuffle=False)
    sampler.set_start_index(45)  # without drop_last any sample can be the next
    assert list(sampler) == list(range(45, 50))


def test_an_iterator_goes_on_where_another_was() -> None:
    samplers = ranks_of(40, 2, micro_batch_size=2, seed=1)
    halves = [iter(sampler) for sampler in samplers]
    seen = [next(half) for half in halves for _ in range(6)]
    states = [half.state_dict() for half in halves]  # type: ignore[attr-defined]
    assert states[0] == states[1]
    for num_ranks, micro_batch_size in ((2, 2), (1, 4), (4, 1)):
        rest: list[int] = []
        for sampler in ranks_of(40, num_ranks, micro_batch_size=micro_batch_size):
            iterator = iter(sampler)
            iterator.load_state_dict(states[0])  # type: ignore[attr-defined]
            rest += iterator
        assert sorted(seen + rest) == list(range(40))
    (sampler,) = ranks_of(40, 1, micro_batch_size=2)
    with pytest.raises(UsageError, match="after 5 samples of each of 2 ranks, in the middle of a micro-batch of 2"):
        sampler.check_iteration(states[0] | {"num_yielded": 5})
    with pytest.raises(UsageError, match="iteration's state has the fields"):
        sampler.check_iteration({"yielded": 5})
    with pytest.raises(UsageError, match="num_replicas is 0"):
        sampler.check_iteration(states[0] | {"num_replicas": 0})


def test_defaults_are_one_process_without_torch_distributed() -> None:
    sampler = StatefulDistributedSampler(range(5))
    assert (sampler.num_replicas, sampler.rank, sorted(sampler)) == (1, 0, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_replicas": 0}, "num_replicas is 0; it must be at least 1"),
        ({"num_replicas": 2, "rank": 2}, "rank is 2; it must be from 0 to 1"),
        ({"rank": -1}, "rank is -1; it must be from 0 to 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, "seed must be an integer, not 1.0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"batch_size": True}, "batch_size must be an integer, not True"),
        ({"num_replicas": 3, "micro_batch_size": 2, "batch_size": 8}, "make it a multiple of 6"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StatefulDistributedSampler(range(10), **options)


class NumpyLike:
    """An integer that is none of Python's, as ColossalAI's plugins give for a rank."""

    def __index__(self) -> int:
        return 1


def test_another_librarys_integers_become_pythons() -> None:
    rank: Any = NumpyLike()
    sampler = StatefulDistributedSampler(range(6), num_replicas=2, rank=rank, shuffle=False)
    assert list(sampler) == [1, 3, 5]
    assert type(sampler.rank) is int


@pytest.mark.parametrize("index", [-1, 11, 2.0, None])
def test_a_start_index_outside_the_data_is_refused(index: Any) -> None:
    (sampler,) = ranks_of(10, 1)
    sampler.set_start_index(10)  # the end is a position too
    with pytest.raises(UsageError, match="start_index"):
        sampler.set_start_index(index)
    with pytest.raises(UsageError, match="epoch"):
        sampler.set_epoch(index if index != 11 else -2)
    with pytest.raises(UsageError, match="num_samples"):
        sampler.peek(index if index != 11 else -2)
    with pytest.raises(UsageError, match="num_steps"):
        sampler.expect(index if index != 11 else -2)
    assert (sampler.start_index, sampler.epoch) == (10, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_samples": 9}, "num_samples=9 and this sampler 10"),
        ({"shuffle": False}, "shuffle=False and this sampler True"),
        ({"start_index": 11}, "start_index is 11"),
        ({"seed": "7"}, "seed must be an integer"),
        ({"epoch": -1}, "epoch is -1"),
        ({"rank": 0}, "has the fields"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    (sampler,) = ranks_of(10, 1)
    before = sampler.state_dict()
    wanted = {"seed": 7, "epoch": 1, "start_index": 4, "num_samples": 10, "shuffle": True}
    with pytest.raises(UsageError, match=message):
        sampler.load_state_dict(wanted | change)
    assert sampler.state_dict() == before
    sampler.load_state_dict(wanted)
    assert sampler.state_dict() == wanted
