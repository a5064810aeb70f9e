"""What does a run write into its journal, and how does that stand the end of the run?"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from awscrt import checksums

from shardpoint import Checkpointer, TrainState
from shardpoint.errors import FencedError, StorageError, UsageError
from tests.training import flip, net, train


def made() -> TrainState:
    model = net(0)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1 + 0.2))


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "journal.jsonl").read_text().splitlines()]


def test_a_step_is_written_with_what_can_be_seen_of_the_run(tmp_path: Path) -> None:
    state = made()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(state) is None
        assert not (tmp_path / "journal.jsonl").exists()
        assert state.optimizer is not None
        train(state.model, state.optimizer, range(2))
        loss = torch.tensor(1 / 3, dtype=torch.bfloat16)
        checkpointer.journal.record(epoch=0, step=1, loss=loss, grad_norm=1 / 3, samples=torch.tensor([5, 3, 2**40]))
        header, step = lines_of(tmp_path)  # at once, before the run ends
    assert header["world_size"] == 1
    assert header["layout"] == "whole, cpu"
    assert header["resumed_from"] is None
    assert header["versions"]["torch"] == str(torch.__version__)
    assert step.pop("life") == header["life"]
    rng = step.pop("rng")
    assert step == {
        "kind": "step",
        "epoch": 0,
        "step": 1,
        "loss": float(loss),
        "grad_norm": 1 / 3,
        "optimizers": {"": {"learning_rates": [0.30000000000000004], "steps": 2.0}},
        "samples": {
            "count": 3,
            "crc64nvme": f"{checksums.crc64nvme(struct.pack('<3q', 5, 3, 2**40)):016x}",
            "indices": [5, 3, 2**40],
        },
    }
    assert len(rng) == 16


@pytest.mark.parametrize("value", [0.1, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 2.0, 1 / 3, math.nan, -math.inf])
def test_every_bit_of_a_loss_comes_back(value: float, tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.journal.record(epoch=0, step=1, loss=value)
    back = lines_of(tmp_path)[1]["loss"]
    assert float(back).hex() == value.hex()
    assert isinstance(back, str) == (not math.isfinite(value))


def test_each_generator_moves_the_digest_and_recording_moves_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with Checkpointer(tmp_path) as checkpointer:
        before = torch.get_rng_state(), random.getstate()
        legacy = np.random.random
        draws: list[Callable[[], object]] = [
            int,
            lambda: torch.rand(1),
            random.random,
            lambda: random.gauss(0, 1),
            legacy,
        ]
        for number, draw in enumerate(draws):
            draw()
            checkpointer.journal.record(epoch=0, step=number, loss=0.0)
            if number == 0:
                assert torch.equal(torch.get_rng_state(), before[0])
                assert random.getstate() == before[1]
    digests = [line["rng"] for line in lines_of(tmp_path)[1:]]
    assert len(set(digests)) == 5


def test_each_resume_begins_a_life_and_tells_where_it_came_from(tmp_path: Path) -> None:
    state = made()
    with Checkpointer(tmp_path, listener=lambda _: None) as checkpointer:
        for number in (1, 2):
            saved = checkpointer.save(state, epoch=0, step=number, batch_size=1)
        checkpointer.journal.record(epoch=0, step=3, loss=1.0)
        checkpointer.resume(state)
        checkpointer.journal.record(epoch=0, step=3, loss=1.0)
        flip(tmp_path / "epoch-0_step-2" / "running_states.json")
        checkpointer.resume(state)
        checkpointer.journal.record(epoch=0, step=2, loss=1.0)
    assert saved is not None
    headers = [line for line in lines_of(tmp_path) if line["kind"] == "life"]
    assert len({header["life"] for header in headers}) == 3
    assert [header["resumed_from"] and header["resumed_from"]["name"] for header in headers] == [
        None,
        "epoch-0_step-2",
        "epoch-0_step-1",
    ]
    assert headers[1]["resumed_from"]["checkpoint_id"] == saved.result().checkpoint_id
    assert [passed["name"] for passed in headers[2]["passed_over"]] == ["epoch-0_step-2"]


def test_a_journal_keeps_nothing_alive_and_never_matters_to_a_resume(tmp_path: Path) -> None:
    import gc
    import weakref

    with Checkpointer(tmp_path) as checkpointer:
        state = made()
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        checkpointer.journal.record(epoch=0, step=1, loss=1.0)
        model = weakref.ref(state.model)
        (tmp_path / "journal.jsonl").write_text("not a journal at all")
        assert checkpointer.resume(made()) is not None
        del state
        gc.collect()
        assert model() is None
        checkpointer.journal.record(epoch=0, step=2, loss=1.0)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["optimizers"] == {}


def test_wrong_arguments(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        journal = checkpointer.journal
        wrong: list[dict[str, Any]] = [
            {"epoch": -1},
            {"step": True},
            {"step": 1.0},
            {"loss": "low"},
            {"loss": torch.ones(2)},
            {"grad_norm": "low"},
            {"samples": [0.5]},
            {"samples": [2**63]},
            {"samples": ["a"]},
        ]
        for number, change in enumerate(wrong):
            arguments: dict[str, Any] = {"epoch": 0, "step": 10 + number, "loss": 1.0} | change
            with pytest.raises(UsageError):
                journal.record(**arguments)
        journal.record(epoch=0, step=50, loss=1.0, samples=[])
        with pytest.raises(UsageError, match="once, in order"):
            journal.record(epoch=0, step=50, loss=1.0)
        journal.record(epoch=1, step=1, loss=1.0)
    with pytest.raises(UsageError, match="closed"):
        checkpointer.journal.record(epoch=1, step=2, loss=1.0)


def test_many_samples_leave_their_checksum_only(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.journal.record(epoch=0, step=1, loss=1.0, samples=range(4096))
        checkpointer.journal.record(epoch=0, step=2, loss=1.0, samples=range(4097))
    _, listed, counted = lines_of(tmp_path)
    assert listed["samples"]["indices"] == list(range(4096))
    assert counted["samples"]["indices"] is None
    assert counted["samples"]["count"] == 4097


def test_a_run_that_lost_its_root_records_no_more(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.journal.record(epoch=0, step=1, loss=1.0)
        control = tmp_path / ".shardpoint"
        (mine,) = control.glob("inc-*")
        mine.rename(control / f"fenced-{mine.name.removeprefix('inc-')}")
        with pytest.raises(FencedError):
            checkpointer.journal.record(epoch=0, step=2, loss=1.0)
    assert len(lines_of(tmp_path)) == 2


def test_a_full_disk_is_an_error_of_the_step(tmp_path: Path) -> None:

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.journal.record(epoch=0, step=1, loss=1.0)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with patch("os.write", side_effect=full), pytest.raises(StorageError, match="free space"):
            checkpointer.journal.record(epoch=0, step=2, loss=1.0)


@pytest.mark.crash
def test_what_was_recorded_survives_the_death_of_the_process(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from shardpoint import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1])\n"
        "for step in range(1, 4): checkpointer.journal.record(epoch=0, step=step, loss=1 / step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert [line["loss"] for line in lines_of(tmp_path)[1:]] == [1.0, 0.5, 1 / 3]
