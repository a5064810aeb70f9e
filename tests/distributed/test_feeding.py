"""Does a job that goes on on one or three ranks see what two ranks had left, each sample once and in its step?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shardpoint.data import StatefulDistributedSampler
from tests.distributed import feeding_program
from tests.distributed.feeding_program import BATCH_SIZE, CASES, NUM_EPOCHS, NUM_SAMPLES
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(feeding_program.__file__)
TIMEOUT_S = 240.0


def reports(out: Path, life: str, world_size: int) -> list[dict[str, Any]]:
    return [outcome.report() for outcome in run_ranks(PROGRAM, world_size, timeout_s=TIMEOUT_S, args=[str(out), life])]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return, by number of ranks, what each rank reports: two ranks from the start, one and three from their saves."""
    out = tmp_path_factory.mktemp("two")
    found = {2: reports(out, "first", 2)}
    shutil.copytree(out, out.with_name("three"))
    found[3] = reports(out.with_name("three"), "resumed", 3)
    found[1] = [feeding_program.report(out, "resumed", 0, 1)]
    return found


def planned(*, drop_last: bool) -> list[tuple[int, int, list[int]]]:
    """Write down what every step of the job sees, from the epochs' orders alone."""
    steps = []
    for epoch in range(NUM_EPOCHS):
        sampler = StatefulDistributedSampler(range(NUM_SAMPLES), 1, 0, seed=9)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(NUM_SAMPLES))
        batches = [order[i : i + BATCH_SIZE] for i in range(0, NUM_SAMPLES, BATCH_SIZE)]
        kept = [batch for batch in batches if len(batch) == BATCH_SIZE or not drop_last]
        steps += [(epoch, number, sorted(batch)) for number, batch in enumerate(kept, start=1)]
    return steps


def together(ranks: Sequence[dict[str, Any]], name: str) -> list[tuple[int, int, list[int]]]:
    """Return what each step saw on all ranks."""
    joined: dict[tuple[int, int], list[int]] = {}
    for rank in ranks:
        for epoch, step, samples in rank["seen"][name]:
            joined.setdefault((epoch, step), []).extend(samples)
    return [(epoch, step, sorted(samples)) for (epoch, step), samples in sorted(joined.items())]


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_was_left_is_seen_once(name: str, lives: dict[int, list[dict[str, Any]]]) -> None:
    drop_last, _, _, stop = CASES[name]
    whole = planned(drop_last=drop_last)
    assert together(lives[2], name) == whole
    rest = [step for step in whole if step[:2] > stop]
    assert rest
    for world_size in (1, 3):
        assert together(lives[world_size], name) == rest, f"on {world_size} ranks"


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_counts_for_one_rank_is_refused_on_others(world_size: int, lives: dict[int, list[dict[str, Any]]]) -> None:
    for rank in lives[world_size]:
        assert "counts the batches of one rank: resume on 2 ranks" in rank["refused"]["equal states"]
        assert "saved by 2 ranks whose states differ" in rank["refused"]["workers"]
