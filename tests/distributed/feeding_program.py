"""What each rank of tests/distributed/test_feeding.py does: live one life of a job, and report which samples it saw.

feeding_program.py OUT LIFE    LIFE is "first" (save in the middle, then go on to the end) or "resumed"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from shardpoint import Checkpointer, MismatchError, TrainState
from shardpoint.data import StatefulDistributedSampler, with_own_generator

NUM_SAMPLES, NUM_EPOCHS, BATCH_SIZE, MICRO_BATCH_SIZE = 40, 2, 12, 2
SAMPLES = list(range(NUM_SAMPLES))
# name -> whether the end of the epoch is left out, num_workers, whether the loader is what is saved, when it is saved
CASES: dict[str, tuple[bool, int, bool, tuple[int, int]]] = {
    "sampler": (True, 0, False, (0, 2)),
    "sampler-workers": (True, 2, False, (1, 1)),
    "sampler-keep-last": (False, 0, False, (0, 3)),
    "sampler-end-of-epoch": (True, 0, False, (0, 3)),
    "sampler-end-of-last": (False, 0, False, (0, 4)),
    "loader": (True, 0, True, (0, 1)),
    "loader-keep-last": (False, 0, True, (1, 2)),
    "loader-end-of-epoch": (True, 0, True, (0, 3)),
}

Steps = list[tuple[int, int, list[int]]]


def steps_per_epoch(*, drop_last: bool) -> int:
    return NUM_SAMPLES // BATCH_SIZE if drop_last else -(-NUM_SAMPLES // BATCH_SIZE)


def live(root: Path, name: str, rank: int, world_size: int) -> Steps:
    """Train from the last checkpoint to the end, saving once, where the case says; return what this rank saw."""
    drop_last, num_workers, saves_loader, stop = CASES[name]
    batching: Any = {"micro_batch_size": MICRO_BATCH_SIZE, "batch_size": BATCH_SIZE, "drop_last": drop_last, "seed": 9}
    sampler = StatefulDistributedSampler(SAMPLES, world_size, rank, **batching)
    kind: Any = StatefulDataLoader if saves_loader else DataLoader
    loader = kind(SAMPLES, batch_size=MICRO_BATCH_SIZE, sampler=sampler, num_workers=num_workers)
    loader = loader if saves_loader else with_own_generator(loader)
    state = TrainState(model=torch.nn.Linear(1, 1), sampler=loader if saves_loader else sampler)
    seen: Steps = []
    with Checkpointer(root / name) as checkpointer:
        run = checkpointer.resume(state)
        for epoch in range(run.epoch if run else 0, NUM_EPOCHS):
            sampler.set_epoch(epoch)
            first = run.step if run and run.epoch == epoch else 0
            if not saves_loader:
                sampler.expect(steps_per_epoch(drop_last=drop_last) - first)
            batches = iter(loader)
            for step in range(first + 1, steps_per_epoch(drop_last=drop_last) + 1):
                samples: list[int] = []
                for _ in range(BATCH_SIZE // MICRO_BATCH_SIZE // world_size):
                    batch = next(batches, None)
                    samples += [] if batch is None else batch.tolist()
                seen.append((epoch, step, samples))
                if not saves_loader:
                    sampler.set_start_index(min(step * BATCH_SIZE, NUM_SAMPLES))
                if (epoch, step) == stop and run is None:
                    checkpointer.save(state, epoch=epoch, step=step, batch_size=BATCH_SIZE)
            assert next(batches, None) is None
    return seen


def refusals(root: Path, rank: int, world_size: int, *, save: bool) -> dict[str, str]:
    """Save loaders whose states are those of one rank; or return why each of them is not resumed here."""
    theirs: Any = torch.utils.data.DistributedSampler(SAMPLES, world_size, rank)  # type: ignore[arg-type]
    ours = StatefulDistributedSampler(SAMPLES, world_size, rank)
    loaders = {
        "equal states": StatefulDataLoader(SAMPLES, sampler=theirs),
        "workers": with_own_generator(StatefulDataLoader(SAMPLES, sampler=ours, num_workers=2)),
    }
    found: dict[str, str] = {}
    for name, loader in loaders.items():
        model = torch.nn.Linear(1, 1)
        before = model.weight.tolist()
        with Checkpointer(root / name) as checkpointer:
            if save:
                next(iter(loader))
                checkpointer.save(TrainState(model=model, sampler=loader), epoch=0, step=1, batch_size=1)
                continue
            try:
                checkpointer.resume(TrainState(model=model, sampler=loader))
            except MismatchError as error:
                found[name] = str(error)
            assert model.weight.tolist() == before
    return found


def report(out: Path, which: str, rank: int, world_size: int) -> dict[str, Any]:
    """Live every case once; return what this rank saw and what it was refused."""
    seen = {name: live(out, name, rank, world_size) for name in CASES}
    return {"seen": seen, "refused": refusals(out, rank, world_size, save=which == "first")}


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    print(json.dumps(report(Path(sys.argv[1]), sys.argv[2], rank, world_size)), flush=True)  # noqa: T201 - for the test
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
