"""What one pool of four ranks checks of every pair of layouts: saved by one, resumed on the other.

The ranks live through one world after another: first each layout saves, then each layout resumes what all of its family
have saved. Started by `test_reshard_matrix.py`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from shardpoint import Checkpointer, RunState, TrainState
from tests.distributed.reshard_layouts import FAMILIES, Layout
from tests.training import on_disk, same_bits

STEPS_BEFORE, STEPS_AFTER = 2, 3
LOSSES = "losses"


class Pool:
    """The processes, and the world that some of them make up at a time."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
        address, port = os.environ.pop("MASTER_ADDR"), int(os.environ.pop("MASTER_PORT"))
        timeout = timedelta(seconds=200)
        self.store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, self.size, is_master=self.rank == 0, timeout=timeout
        )
        self.num_worlds = 0

    def enter(self, size: int) -> bool:
        """Make a world of the first ranks; tell whether this process is one of them."""
        self.num_worlds += 1
        if self.rank < size and size > 1:
            store = dist.PrefixStore(f"world{self.num_worlds}", self.store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=size)
        return self.rank < size

    def leave(self) -> None:
        """End the world, once all processes are here."""
        gc.collect()  # a DDP module that outlives its group can hang
        if dist.is_initialized():
            dist.destroy_process_group()
        self.meet(f"left{self.num_worlds}")

    def meet(self, name: str) -> None:
        """Wait for all processes."""
        if self.store.add(name, 1) == self.size:
            self.store.set(f"{name}/all", "1")
        self.store.wait([f"{name}/all"])


def save_and_go_on(layout: Layout, out: Path) -> None:
    """Train, save, look at the files, and train on: what every resume is compared with."""
    run = layout.make(0)
    run.train(range(STEPS_BEFORE))
    with Checkpointer(out / "root") as checkpointer:
        checkpointer.save(TrainState(model=run.model, optimizer=run.optimizer), epoch=0, step=2, batch_size=4)
    saved = run.gathered()
    directory = out / "root" / "epoch-0_step-2"
    stored = on_disk(directory / "modeling") | {f"opt.{k}": v for k, v in on_disk(directory / "optimizer").items()}
    expected = {name: tensor for name, tensor in saved.items() if not name.startswith("opt.") or tensor.dim()}
    assert same_bits(stored, expected), "what is on disk is not what torch gathers"
    losses = run.train(range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    later = run.gathered()
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(saved, out / "saved.safetensors")
        save_file(later | {LOSSES: torch.tensor(losses, dtype=torch.float64)}, out / "later.safetensors")


def resume_and_go_on(source: Layout, target: Layout, out: Path) -> None:
    """Resume on another layout, and compare with what the source had, and with how it went on."""
    run = target.make(1)
    run.train(range(20, 21))
    saved, later = load_file(out / "saved.safetensors"), load_file(out / "later.safetensors")
    before = run.gathered()
    assert any(not torch.equal(before[name], saved[name]) for name in saved), "the target is to differ before"
    how = [(group["foreach"], group["fused"]) for group in run.optimizer.param_groups]
    with Checkpointer(out / "root") as checkpointer:
        assert checkpointer.resume(TrainState(model=run.model, optimizer=run.optimizer)) == RunState(0, 2, 8)
    assert same_bits(run.gathered(), saved), "what was resumed is not what was saved"
    assert how == [(group["foreach"], group["fused"]) for group in run.optimizer.param_groups]
    losses = torch.tensor(run.train(range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)), dtype=torch.float64)
    found = run.gathered()
    if source.arithmetic == target.arithmetic:
        assert losses.tolist() == later.pop(LOSSES).tolist(), "the steps after it differ in their losses"
        assert same_bits(found, later), "the steps after it differ"
        return
    torch.testing.assert_close(losses, later.pop(LOSSES), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found, later, rtol=2e-4, atol=2e-5)


def attempt(report: dict[str, str], name: str, work: Any, *args: Any) -> None:
    """Run one check and note what came of it."""
    try:
        work(*args)
        report[name] = "ok"
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - told to the test, which fails with it
        report[name] = traceback.format_exc()
        print(f"{name}\n{report[name]}", file=sys.stderr, flush=True)  # noqa: T201 - the test shows it


def main() -> None:
    """Go through all families; the last line printed is the report."""
    out, wanted = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    pool, report = Pool(), dict[str, str]()
    for family in wanted:
        layouts = FAMILIES[family]
        for layout in layouts:
            place = out / family / layout.name
            place.mkdir(parents=True, exist_ok=True)
            if pool.enter(layout.size):
                attempt(report, f"{family}: {layout.name} saves", save_and_go_on, layout, place)
            pool.leave()
        for target in layouts:
            if pool.enter(target.size):
                for source in layouts:
                    name = f"{family}: {source.name} -> {target.name}"
                    attempt(report, name, resume_and_go_on, source, target, out / family / source.name)
            pool.leave()
    print(json.dumps(report), flush=True)  # noqa: T201 - the test reads it
    pool.meet("the end")


if __name__ == "__main__":
    main()
