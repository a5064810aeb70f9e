"""Is every sample of every epoch seen exactly once, in its step, whatever number of ranks a job is resumed on?

The oracle is a plain list of the job's steps; a job is a loop as a user writes it, with one list per rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.data import StatefulDistributedSampler

Step = tuple[int, int, list[int]]  # epoch, the step in it, the samples


def order_of(num_samples: int, seed: int, epoch: int) -> list[int]:
    """Return an epoch's order, as one rank that starts there sees it."""
    sampler = StatefulDistributedSampler(range(num_samples), 1, 0, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def planned(num_samples: int, seed: int, epochs: range, batch_size: int, *, drop_last: bool) -> list[Step]:
    """Write down every step of a job that is never interrupted."""
    steps: list[Step] = []
    for epoch in epochs:
        order = order_of(num_samples, seed, epoch)
        batches = [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        if drop_last and len(batches[-1]) < batch_size:
            batches.pop()
        steps += [(epoch, number, batch) for number, batch in enumerate(batches)]
    return steps


def job(ranks: list[StatefulDistributedSampler], epochs: range, batch_size: int) -> Iterator[Step]:
    """Train as a loop does that was just resumed; yield what all ranks together saw in each step."""
    for epoch in epochs:
        for sampler in ranks:
            sampler.set_epoch(epoch)
        number = math.ceil(ranks[0].start_index / batch_size)  # a last batch may have been smaller
        readers = [iter(sampler) for sampler in ranks]
        while True:
            shares = [list(islice(reader, batch_size // len(ranks))) for reader in readers]
            samples = [sample for share in shares for sample in share]
            if not samples:
                break
            number += 1
            for sampler in ranks:
                sampler.set_start_index(min(number * batch_size, sampler.num_samples))
            yield epoch, number - 1, samples


def made(num_samples: int, num_ranks: int, **options: Any) -> list[StatefulDistributedSampler]:
    return [StatefulDistributedSampler(range(num_samples), num_ranks, rank, **options) for rank in range(num_ranks)]


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a data set, a number of ranks for each life of the job, and how many steps each life lasts."""
    worlds = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    micro_batch_size = draw(st.integers(1, 3))
    batch_size = micro_batch_size * math.lcm(*worlds) * draw(st.integers(1, 2))
    first_epoch = draw(st.integers(0, 3))
    return {
        "num_samples": draw(st.integers(batch_size, 4 * batch_size + 3)),
        "worlds": worlds,
        "lives": [draw(st.integers(0, 6)) for _ in worlds[:-1]],
        "epochs": range(first_epoch, first_epoch + draw(st.integers(1, 3))),
        "seed": draw(st.integers(0, 2**40)),
        "options": {"micro_batch_size": micro_batch_size, "batch_size": batch_size, "drop_last": draw(st.booleans())},
    }


@given(jobs())
def test_every_step_sees_its_samples_over_any_number_of_resumes(drawn: dict[str, Any]) -> None:
    options, epochs = drawn["options"], drawn["epochs"]
    batch_size, drop_last = options["batch_size"], options["drop_last"]
    steps: list[Step] = []
    states: list[dict[str, Any]] = []
    for life, num_ranks in enumerate(drawn["worlds"]):
        # The seed is not given again: it is part of the position.
        ranks = made(drawn["num_samples"], num_ranks, **options, seed=0 if states else drawn["seed"])
        for sampler in ranks:
            if states:
                sampler.load_state_dict(states[-1])
            else:
                sampler.set_epoch(epochs.start)
        left = range(ranks[0].epoch, epochs.stop)
        lasts = drawn["lives"][life] if life < len(drawn["lives"]) else None
        steps += list(islice(job(ranks, left, batch_size), lasts))
        states.append(ranks[-1].state_dict())
        assert all(sampler.state_dict() == states[-1] for sampler in ranks)
    expected = planned(drawn["num_samples"], drawn["seed"], epochs, batch_size, drop_last=drop_last)
    assert [(epoch, number, sorted(samples)) for epoch, number, samples in steps] == [
        (epoch, number, sorted(samples)) for epoch, number, samples in expected
    ]
    for epoch in epochs:
        seen = [sample for one, _, samples in steps if one == epoch for sample in samples]
        assert len(seen) == len(set(seen)) == drawn["num_samples"] // batch_size * batch_size or not drop_last
        assert drop_last or sorted(seen) == list(range(drawn["num_samples"]))


@given(
    num_samples=st.integers(12, 60),
    stopped_after=st.integers(0, 4),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    drop_last=st.booleans(),
)
def test_a_batch_size_that_follows_the_ranks_repeats_nothing(
    num_samples: int, stopped_after: int, worlds: tuple[int, int], *, drop_last: bool
) -> None:
    # By default a batch has one micro-batch of each rank, so that another number of ranks is another batch size.
    before, after = (3 * num_ranks for num_ranks in worlds)
    options: dict[str, Any] = {"micro_batch_size": 3, "drop_last": drop_last, "seed": 5}
    ranks = made(num_samples, worlds[0], **options)
    seen: list[int] = []
    for _, _, samples in islice(job(ranks, range(1), before), min(stopped_after, num_samples // before)):
        seen += samples
    state = ranks[0].state_dict()
    ranks = made(num_samples, worlds[1], **options)
    shares = []
    for sampler in ranks:
        sampler.load_state_dict(state)
        sampler.set_epoch(0)
        shares.append(list(sampler))
        if drop_last:  # batches are counted from where it was loaded
            sampler.set_start_index(state["start_index"] + len(sampler) // 3 * after)
            assert len(sampler) == 0
    seen += [sample for share in shares for sample in share]
    assert len(seen) == len(set(seen))
    left_out = num_samples - len(seen)
    assert left_out == ((num_samples - state["start_index"]) % after if drop_last else 0)
    if drop_last:
        assert len({len(share) for share in shares}) == 1


@given(jobs(), st.integers(0, 5), st.integers(0, 40))
def test_peek_is_what_the_job_consumes_next(drawn: dict[str, Any], steps: int, wanted: int) -> None:
    options, seed = drawn["options"], drawn["seed"]
    batch_size = options["batch_size"]
    num_samples, first = drawn["num_samples"], drawn["epochs"].start
    steps_per_epoch = num_samples // batch_size
    steps = min(steps, steps_per_epoch)  # up to the end of the epoch: the next samples are those of the next one
    many = range(first, first + 2 + wanted // batch_size)
    flat = planned(num_samples, seed, many, batch_size, drop_last=options["drop_last"])
    following = [sample for _, _, samples in flat for sample in samples][steps * batch_size :][:wanted]
    assert len(following) == wanted
    for num_ranks in drawn["worlds"]:
        for sampler in made(num_samples, num_ranks, **options, seed=seed):
            sampler.set_epoch(first)
            sampler.set_start_index(steps * batch_size)
            state, random_state = copy.deepcopy(sampler.state_dict()), torch.get_rng_state()
            assert sampler.peek(wanted) == following
            assert sampler.peek(wanted) == following
            assert sampler.state_dict() == state
            assert torch.equal(torch.get_rng_state(), random_state)
            if steps < steps_per_epoch:
                rest = len(list(sampler))
                sampler.peek(wanted)
                assert len(list(sampler)) == rest == len(sampler)
