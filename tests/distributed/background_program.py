"""What two ranks check of saves behind the training; started by `test_saving_behind_training.py`."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardpoint import Booster, Checkpointer, Latest, PendingSave, RunState, TrainState
from shardpoint.booster import TorchDDPPlugin, TorchFSDPPlugin
from shardpoint.engine import background
from shardpoint.engine.writing import stage_chunk
from shardpoint.errors import MismatchError, PeerError, SaveCancelledError, TornSnapshotError, UsageError
from shardpoint.events import Event
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.distributed.reporting import run_and_report
from tests.training import on_disk, optimizer_state, same_bits, weights

E = TypeVar("E", bound=BaseException)
WAIT_S = 60.0
WIDTH = 255  # two ranks cannot halve it, and half a square of floats is more than what is copied at once
PLUGINS: dict[str, Callable[[], Any]] = {"ddp": TorchDDPPlugin, "fsdp": TorchFSDPPlugin}
RANK = 0


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def made(plugin: str, seed: int = 0, **options: Any) -> TrainState:
    torch.manual_seed(seed)
    model: nn.Module = Wide()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    model, optimizer, *_ = Booster(plugin=PLUGINS[plugin]()).boost(model, optimizer)
    return TrainState(model=model, optimizer=optimizer)


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2 * number + RANK))
    state.model(batch).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    states = optimizer_state(state.model, state.optimizer)
    return weights(state.model) | {f"opt.{k}": v for k, v in states.items() if v.dim()}


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    return on_disk(checkpoint / "modeling") | {f"opt.{k}": v for k, v in on_disk(checkpoint / "optimizer").items()}


def save(checkpointer: Checkpointer, state: TrainState, number: int) -> PendingSave:
    pending = checkpointer.save(state, epoch=0, step=number, batch_size=8)
    assert pending is not None
    return pending


def raises(kind: type[E], work: Callable[[], Any]) -> E:
    with pytest.raises(kind) as caught:
        work()
    assert type(caught.value) is kind, repr(caught.value)
    return caught.value


def names(root: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in root.iterdir() if path.name != ".shardpoint")


@contextmanager
def gated() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold this rank's staging up; give (reached, opened)."""
    reached, opened = threading.Event(), threading.Event()

    def wait_and_stage(*args: Any) -> Any:
        reached.set()
        assert opened.wait(WAIT_S)
        return stage_chunk(*args)

    with patch.object(background, "stage_chunk", wait_and_stage):
        try:
            yield reached, opened
        finally:
            opened.set()


def check_every_save_holds_its_moment(out: Path) -> None:
    for plugin in PLUGINS:
        for options in ({}, {"fused": True}):
            root = out / f"{plugin}-{len(options)}"
            state, expected = made(plugin, **options), {}
            with Checkpointer(root, async_save=True, keep=[Latest(3)], budget_bytes=4 * 2**20) as checkpointer:
                for number in range(1, 6):
                    step(state, number)
                    expected[number] = everything(state)
                    save(checkpointer, state, number)
                    step(state, 100 + number)
            for number in (3, 4, 5):
                assert same_bits(stored(root / f"epoch-0_step-{number}"), expected[number])
            assert names(root) == [f"epoch-0_step-{number}" for number in (3, 4, 5)]
            other = made(plugin, 7, **options)
            with Checkpointer(root, async_save=True) as checkpointer:
                assert checkpointer.resume(other) == RunState(0, 5, 40)
            assert same_bits(everything(other), expected[5])


def check_what_is_not_trained_is_linked(out: Path) -> None:
    """A first layer that is frozen, and a base under adapters that one of the layers' adapters trains."""
    peft = pytest.importorskip("peft")

    def partly(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = Wide()
        model.layers[0].requires_grad_(requires_grad=False)
        return model

    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = peft.get_peft_model(Wide(), peft.LoraConfig(r=2, target_modules=["layers.1"]))
        return model

    for plugin, other_plugin in (("ddp", "fsdp"), ("fsdp", "ddp")):
        for kind, still in ((partly, WIDTH * WIDTH * 4), (adapted, 3 * (WIDTH + 1) * WIDTH * 4)):
            root = out / f"{plugin}-{kind.__name__}"

            def run(name: str, seed: int, kind: Callable[[int], nn.Module] = kind) -> TrainState:
                model = kind(seed)
                optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
                model, optimizer, *_ = Booster(plugin=PLUGINS[name]()).boost(model, optimizer)
                return TrainState(model=model, optimizer=optimizer)

            state, linked, expected = run(plugin, 1), [], {}
            with Checkpointer(root, async_save=True, keep=[Latest(2)]) as checkpointer:
                for number in range(1, 6):
                    step(state, number)
                    expected[number] = everything(state)
                    pending = save(checkpointer, state, number)
                    step(state, 100 + number)
                    linked.append(pending.result(WAIT_S).linked_bytes >= still)
            assert linked == ([False, True, True, True, True] if kind is adapted else [False, False, True, True, True])
            assert names(root) == ["epoch-0_step-4", "epoch-0_step-5"]
            if kind is partly:
                assert same_bits(stored(root / "epoch-0_step-5"), expected[5])
            dist.barrier()
            if RANK == 0:
                shutil.rmtree(root / "epoch-0_step-4")
            dist.barrier()
            other = run(other_plugin, 7)
            with Checkpointer(root) as checkpointer:
                assert checkpointer.resume(other) == RunState(0, 5, 40)
            assert same_bits(everything(other), expected[5])


def check_a_step_waits_on_the_rank_that_stages(out: Path) -> None:
    state = made("fsdp")
    step(state, 0)
    expected = everything(state)
    with Checkpointer(out, async_save=True) as checkpointer, gated() as (reached, opened):
        if RANK == 0:
            opened.set()
        pending = save(checkpointer, state, 1)
        assert reached.wait(WAIT_S)
        timer = threading.Timer(0.3, opened.set)
        timer.start()
        began = time.monotonic()
        step(state, 1)
        # The other rank's backward of the next step waits for this one's step, whichever of the two is held up.
        step(state, 2)
        assert time.monotonic() - began > 0.2
        pending.result(WAIT_S)
    assert same_bits(stored(out / "epoch-0_step-1"), expected)


def check_an_error_of_one_ranks_writer_is_everyones(out: Path) -> None:
    state, events = made("fsdp"), list[Event]()
    step(state, 0)
    for number, op in enumerate(("write", "sync", "close", "open_writer"), start=1):
        root = out / op
        faults = [Fault(op, f"*attempt-epoch-0_step-{number}-*")] if RANK == 1 else []
        store = FaultyStore(LocalStore(root), faults)
        with Checkpointer(root, async_save=True, store=store, listener=events.append) as checkpointer:
            failing = save(checkpointer, state, number)
            step(state, number)
            error = raises(PeerError, partial(failing.result, WAIT_S))
            assert list(error.failures) == [1]
            assert error.failures[1].type == "StorageError"
            expected = everything(state)
            good = save(checkpointer, state, 10)
            step(state, 50)
            good.result(WAIT_S)
        assert names(root) == ["epoch-0_step-10"]
        assert same_bits(stored(root / "epoch-0_step-10"), expected)
        assert not list((root / ".shardpoint").rglob("attempt-*"))
    assert [event.kind for event in events].count("save_failed") == (4 if RANK == 0 else 0)


def check_a_torn_snapshot_of_one_rank_is_everyones(out: Path) -> None:
    state = made("fsdp", fused=True)
    step(state, 0)
    with Checkpointer(out, async_save=True) as checkpointer:
        with gated() as (reached, opened):
            if RANK == 0:
                opened.set()
            pending = save(checkpointer, state, 1)
            assert reached.wait(WAIT_S)
            if RANK == 1:
                for parameter in state.model.parameters():
                    parameter.data.to_local().mul_(1.01)  # type: ignore[attr-defined]  # a DTensor
            opened.set()
            raises(TornSnapshotError, lambda: pending.result(WAIT_S))
        save(checkpointer, state, 2).result(WAIT_S)
    assert names(out) == ["epoch-0_step-2"]


def check_cancelled_by_one_rank(out: Path) -> None:
    state = made("fsdp")
    with Checkpointer(out, async_save=True) as checkpointer:
        with gated() as (reached, opened):
            pending = save(checkpointer, state, 1)
            assert reached.wait(WAIT_S)
            if RANK == 1:
                assert pending.cancel()
            opened.set()
            raises(SaveCancelledError, lambda: pending.result(WAIT_S))
        save(checkpointer, state, 2).result(WAIT_S)
    assert names(out) == ["epoch-0_step-2"]


def check_too_many_under_way_on_one_rank_are_too_many(out: Path) -> None:
    state, events = made("fsdp"), list[Event]()
    with (
        Checkpointer(out, async_save=True, max_in_flight=1, when_busy="skip", listener=events.append) as checkpointer,
        gated() as (_, opened),
    ):
        if RANK == 0:
            opened.set()
        first = save(checkpointer, state, 1)
        assert checkpointer.save(state, epoch=0, step=2, batch_size=8) is None
        opened.set()
        first.result(WAIT_S)
        dist.barrier()
        save(checkpointer, state, 3).result(WAIT_S)
    assert names(out) == ["epoch-0_step-1", "epoch-0_step-3"]
    assert [event.key for event in events if event.kind == "save_skipped"] == ["epoch-0_step-2"] * (RANK == 0)


def check_ranks_that_ask_for_different_saves(out: Path) -> None:
    state = made("fsdp")
    with Checkpointer(out, async_save=True) as checkpointer:
        error = raises(UsageError, lambda: save(checkpointer, state, 1 + RANK).result(WAIT_S))
        assert "different saves" in str(error)
        bad = TrainState(model=nn.Linear(2, 2, device="meta")) if RANK == 1 else state
        assert raises(PeerError, lambda: save(checkpointer, bad, 3).result(WAIT_S)).failures[1].type == "UsageError"
        save(checkpointer, state, 4).result(WAIT_S)
        other = TrainState(model=nn.Linear(3, 3))
        raises(MismatchError, lambda: checkpointer.resume(other))
    assert names(out) == ["epoch-0_step-4"]


def check_a_file_for_each_writer(out: Path) -> None:
    state = made("fsdp")
    step(state, 0)
    store = LocalStore(out, shared_files=False)
    expected = {}
    with Checkpointer(out, async_save=True, store=store, budget_bytes=2 * 2**20) as checkpointer:
        for number in (1, 2, 3):
            expected[number] = everything(state)
            save(checkpointer, state, number)
            step(state, number)
    for number, values in expected.items():
        assert same_bits(stored(out / f"epoch-0_step-{number}"), values)


def kill(out: Path) -> None:
    """Both ranks die while a save is under way behind the training."""
    state = made("fsdp")
    step(state, 0)
    fault = Fault("write", "*attempt-epoch-0_step-2*", action="kill", nth=2)
    with Checkpointer(out, async_save=True, store=FaultyStore(LocalStore(out), [fault])) as checkpointer:
        save(checkpointer, state, 1).result(WAIT_S)
        save(checkpointer, state, 2)
        for number in range(1000):
            step(state, number)
    os._exit(3)


def checks() -> dict[str, Callable[[Path], None]]:
    """Return the checks by name."""
    return {name.removeprefix("check_"): value for name, value in globals().items() if name.startswith("check_")}


def main() -> None:
    global RANK  # noqa: PLW0603 - the checks are functions of the rank that runs them
    out, wanted = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    if wanted == ["kill"]:
        kill(out)
    run_and_report({name: checks()[name] for name in wanted}, lambda name: out / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
