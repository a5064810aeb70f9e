"""Are dropout and sampled tokens after a resume in the middle of an epoch those of the run that was not interrupted?

The oracle is that run. A life is the loop of a user; its numbers are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from shardpoint import Booster, Checkpointer, TrainState
from shardpoint.data import StatefulDistributedSampler, with_own_generator
from shardpoint.events import Event

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS = 24, 4, 3
STEPS_PER_EPOCH = NUM_SAMPLES // BATCH_SIZE
SAMPLES = torch.randn(NUM_SAMPLES, 5, generator=torch.Generator().manual_seed(1))

Make = Callable[[StatefulDistributedSampler, int], Any]

PLAIN: dict[str, Make] = {
    "own generator": lambda sampler, workers: with_own_generator(opened(DataLoader, sampler, workers)),
    "boosted": lambda sampler, workers: Booster().boost(nn.Identity(), dataloader=opened(DataLoader, sampler, workers))[
        3
    ],
    "generator=": lambda sampler, workers: opened(DataLoader, sampler, workers, generator=torch.Generator()),
}


def opened(kind: Any, sampler: StatefulDistributedSampler, num_workers: int, **options: Any) -> Any:
    return kind(SAMPLES, batch_size=BATCH_SIZE, sampler=sampler, num_workers=num_workers, **options)


def life(
    root: Path, make: Make, num_workers: int, until: tuple[int, int], *, told: list[Event], skips: bool = False
) -> list[Any]:
    """Train up to a step of an epoch and save there; return what every step drew, and the weights after it.

    `skips`: whether the loop leaves out an epoch that was finished, instead of opening its loader over nothing.
    """
    torch.manual_seed(len(told) + until[1])  # a new process: its random state is none of the old one's
    first_layer = nn.Linear(5, 8)
    model = nn.Sequential(first_layer, nn.Dropout(0.5), nn.Linear(8, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = StatefulDistributedSampler(SAMPLES, 1, 0, micro_batch_size=BATCH_SIZE, drop_last=True)
    loader = make(sampler, num_workers)
    keeps = loader if isinstance(loader, StatefulDataLoader) else sampler
    state = TrainState(model=model, optimizer=optimizer, sampler=keeps)
    drawn: list[Any] = []
    with Checkpointer(root, listener=told.append) as checkpointer:
        run = checkpointer.resume(state)
        if run is None:
            torch.manual_seed(77)
        finished = skips and run is not None and run.step == STEPS_PER_EPOCH
        for epoch in range(run.epoch + finished if run else 0, NUM_EPOCHS):
            sampler.set_epoch(epoch)
            first = run.step if run and epoch == run.epoch else 0
            for step, batch in enumerate(loader, start=first + 1):
                logits = model(batch)
                tokens = torch.multinomial(logits.softmax(-1), 2)
                nn.functional.cross_entropy(logits, tokens[:, 0]).backward()
                optimizer.step()
                optimizer.zero_grad()
                weight = first_layer.weight.detach().numpy().tobytes()
                drawn.append((epoch, step, batch.tolist(), tokens.tolist(), weight))
                if keeps is sampler:
                    sampler.set_start_index(step * BATCH_SIZE)
                if (epoch, step) == until:
                    checkpointer.save(state, epoch=epoch, step=step, batch_size=BATCH_SIZE)
                    return drawn
    return drawn


def shifts(told: list[Event]) -> list[Event]:
    return [event for event in told if event.kind == "rng_shifted"]


def both(
    tmp_path: Path, make: Make, num_workers: int, stop: tuple[int, int], *, skips: bool = False
) -> tuple[list[Any], list[Any], int]:
    """Return what one life drew, what two lives with a resume between them drew, and how often a shift was told."""
    end, told = (NUM_EPOCHS - 1, STEPS_PER_EPOCH), list[Event]()
    whole = life(tmp_path / "whole", make, num_workers, end, told=told)
    assert [(epoch, step) for epoch, step, *_ in whole] == [
        (epoch, step) for epoch in range(NUM_EPOCHS) for step in range(1, STEPS_PER_EPOCH + 1)
    ]
    first = life(tmp_path / "killed", make, num_workers, stop, told=told)
    assert not shifts(told)
    second = life(tmp_path / "killed", make, num_workers, end, told=told, skips=skips)
    return whole, first + second, len(shifts(told))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_with_a_loader_over_our_sampler(kind: str, num_workers: int, tmp_path: Path) -> None:
    whole, resumed, num_told = both(tmp_path, PLAIN[kind], num_workers, (1, 2))
    assert resumed == whole
    assert num_told == 0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [(1, 2), (0, STEPS_PER_EPOCH)], ids=["in the middle", "behind the last step"])
def test_with_torchdatas_loader(num_workers: int, stop: tuple[int, int], tmp_path: Path) -> None:
    # Without a generator: it draws from the global random state, and the resume sees to it that it draws as often.
    whole, resumed, _ = both(tmp_path, lambda *given: opened(StatefulDataLoader, *given), num_workers, stop)
    assert resumed == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_draws_from_the_restored_random_state_is_told(num_workers: int, tmp_path: Path) -> None:
    whole, resumed, num_told = both(tmp_path, lambda *given: opened(DataLoader, *given), num_workers, (1, 2))
    assert [entry[:3] for entry in resumed] == [entry[:3] for entry in whole]  # the samples are right all the same
    assert resumed != whole, "torch does not draw any more: with_own_generator can go"
    assert num_told == 1


@pytest.mark.parametrize("skips", [True, False])
def test_at_the_end_of_an_epoch_a_loader_opens_the_next_one_as_ever(*, skips: bool, tmp_path: Path) -> None:
    # Without a generator. Opening the finished epoch as well draws once more than the uninterrupted run: that is told.
    make, stop = (lambda *given: opened(DataLoader, *given)), (1, STEPS_PER_EPOCH)
    whole, resumed, num_told = both(tmp_path, make, 0, stop, skips=skips)
    assert (resumed == whole) is skips
    assert num_told == (not skips)
