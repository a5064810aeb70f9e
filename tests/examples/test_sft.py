"""Does the example train, save, die, resume and reshape as its text says? On a tiny random model.

The oracle of a resumed run is the run that nobody interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shardpoint import Checkpointer, TrainState
from shardpoint.audit import AuditReport, audit_root
from shardpoint.storage import LocalStore

SFT = Path(__file__).parents[2] / "examples" / "sft.py"


def run_sft(root: Path, *options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launch, str(SFT), "--tiny", "--root", str(root), *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(root: Path, *options: str, ranks: int = 1) -> int:
    """Run it to its end; return the step that it resumed from."""
    result = run_sft(root, *options, ranks=ranks)
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if "resumed from step " in line]
    return int(line.rpartition(" ")[2])


def losses_of(root: Path) -> dict[tuple[int, int], float]:
    """Return what counts in the end: a life takes back what came after the checkpoint that it resumed from."""
    losses: dict[tuple[int, int], float] = {}
    for line in map(json.loads, (root / "journal.jsonl").read_text().splitlines()):
        if line["kind"] == "life":
            origin = line["resumed_from"] or {"epoch": 0, "step": 0}
            losses = {at: loss for at, loss in losses.items() if at <= (origin["epoch"], origin["step"])}
        else:
            assert (line["epoch"], line["step"]) not in losses
            losses[line["epoch"], line["step"]] = line["loss"]
    return losses


def audit(root: Path) -> AuditReport:
    return audit_root(LocalStore(root))


def steps_of(root: Path) -> list[int]:
    return [step for _, step in losses_of(root)]


def committed(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/shardpoint.json"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two FSDP ranks, every second one saved."""
    root = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(root, "--plugin", "fsdp", "--steps", "6", "--save-every", "2", ranks=2) == 0
    assert steps_of(root) == [1, 2, 3, 4, 5, 6]
    assert committed(root) == ["epoch-0_step-2", "epoch-0_step-4", "epoch-0_step-6"]
    return root


@pytest.mark.distributed
@pytest.mark.crash
def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_happened(uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    options = ("--plugin", "fsdp", "--steps", "6", "--save-every", "2")
    result = run_sft(root, *options, "--kill", "rank=0,step=4", ranks=2)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert steps_of(root) == [1, 2, 3, 4]
    assert committed(root) == ["epoch-0_step-2"]
    assert not (root / "epoch-0_step-4").exists()
    assert list((root / ".shardpoint").glob("*/*epoch-0_step-4*"))
    alone = shutil.copytree(root, tmp_path / "alone")
    assert train(root, *options, ranks=2) == 2
    assert losses_of(root) == losses_of(uninterrupted)
    report = audit(root)
    assert report.ok
    assert [compared.message for compared in report.comparisons] == ["bit-exact for steps 3-4"]
    assert audit_root(LocalStore(root), LocalStore(uninterrupted)).num_compared == 2 + 6
    assert train(alone, "--steps", "6") == 2
    (compared,) = audit(alone).comparisons
    assert compared.difference is not None
    assert compared.difference.cause == "topology"
    assert "not comparable bit for bit: 2 ranks then, 1 now" in compared.message
    assert compared.largest_relative <= 1e-5
    assert committed(root) == committed(uninterrupted)
    assert not list((root / ".shardpoint").glob("*/*epoch-0_step-4*"))


@pytest.mark.distributed
@pytest.mark.parametrize("plugin, ranks", [("none", 1), ("ddp", 2), ("fsdp", 4)])
def test_a_checkpoint_is_resumed_by_another_plugin_on_other_ranks(
    uninterrupted: Path, tmp_path: Path, plugin: str, ranks: int
) -> None:
    root = tmp_path / "reshaped"
    shutil.copytree(uninterrupted / "epoch-0_step-4", root / "epoch-0_step-4")
    assert train(root, "--plugin", plugin, "--steps", "6", ranks=ranks) == 4
    losses, expected = losses_of(root), losses_of(uninterrupted)
    assert steps_of(root) == [5, 6]
    assert losses == pytest.approx({step: expected[step] for step in losses}, abs=1e-4)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its save of step 8, after one of step 4."""
    root = tmp_path_factory.mktemp("runs") / "killed"
    result = run_sft(root, "--kill", "rank=0,step=8")
    assert result.returncode == -signal.SIGKILL
    assert committed(root) == ["epoch-0_step-4"]
    assert steps_of(root) == [1, 2, 3, 4, 5, 6, 7, 8]
    return root


def draw(state: TrainState) -> None:
    del state
    torch.rand(1)


def reset_optimizer(state: TrainState) -> None:
    assert state.optimizer is not None
    state.optimizer.state.clear()


def forget_moments(state: TrainState) -> None:
    assert state.optimizer is not None
    for values in state.optimizer.state.values():
        values["exp_avg"].zero_()


def raise_learning_rate(state: TrainState) -> None:
    state.lr_scheduler.base_lrs = [rate * 1.001 for rate in state.lr_scheduler.base_lrs]


def reseed(state: TrainState) -> None:
    state.sampler.seed = 1


def change_weights(state: TrainState) -> None:
    with torch.no_grad():
        next(state.model.parameters()).add_(1e-3)


def skip_sample(state: TrainState) -> None:
    share = type(state.sampler).__iter__

    class Skipping(type(state.sampler)):  # type: ignore[misc]
        def __iter__(self) -> Iterator[int]:
            return islice(share(self), 1, None)

    state.sampler.__class__ = Skipping


@pytest.mark.crash
@pytest.mark.parametrize(
    "sabotage, cause, step, text",
    [
        (None, None, 0, "bit-exact for steps 5-8"),
        (draw, "rng", 5, "random state"),
        (reset_optimizer, "optimizer", 5, "5 steps then, 1 now"),
        (forget_moments, "optimizer", 6, "the update after step 5 went another way"),
        (raise_learning_rate, "optimizer", 5, "the learning rate is"),
        (reseed, "data", 5, "the samples ["),
        (skip_sample, "data", 5, "the samples ["),
        (change_weights, "loss", 5, "other weights"),
    ],
    ids=["none", "rng", "reset", "moments", "rate", "seed", "skip", "weights"],
)
def test_the_audit_names_what_a_resume_did_wrong(
    sabotage: Callable[[TrainState], None] | None,
    cause: str | None,
    step: int,
    text: str,
    killed: Path,
    sft: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sabotaged(Checkpointer):
        def resume(self, state: Any, **options: Any) -> Any:
            run = super().resume(state, **options)
            if sabotage is not None:
                sabotage(state)
            return run

    root = shutil.copytree(killed, tmp_path / "root")
    monkeypatch.setattr(sft, "Checkpointer", Sabotaged)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--tiny", "--root", str(root), "--steps", "9"])
    sft.train(sft.parse_arguments())
    report = audit(root)
    (compared,) = report.comparisons
    assert text in compared.message
    assert (compared.first, compared.last) == ((0, 5), (0, 8))
    found = None if compared.difference is None else (compared.difference.cause, compared.difference.step)
    assert found == (None if cause is None else (cause, step))
    assert report.ok == (sabotage is None)
    # The checkpoint itself said which samples would come after it.
    assert any(finding.kind == "next_samples" for finding in report.findings) == (cause == "data")


def test_a_run_resumes_within_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    # 8 samples in each of 4 micro-batches: an epoch of 11 steps
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--micro-batch", "8", "--save-every", "100")
    assert train(whole, *options, "--steps", "25") == 0
    assert committed(whole) == []
    assert train(parts, "--micro-batch", "8", "--save-every", "11", "--steps", "11") == 0
    assert train(parts, "--micro-batch", "8", "--save-every", "3", "--steps", "18") == 11
    assert committed(parts) == ["epoch-0_step-11", "epoch-1_step-3", "epoch-1_step-6"]
    assert train(parts, *options, "--steps", "25") == 17
    assert losses_of(parts) == losses_of(whole)
    report = audit(parts)
    assert report.ok, report.findings
    assert report.num_compared == 1  # step 7 of epoch 1 had no checkpoint
    assert report.notes == [f"epoch {n}: its last 8 samples fill no step, and were left out" for n in (0, 1)]


def test_no_plugin_on_two_ranks_is_refused(tmp_path: Path) -> None:
    result = run_sft(tmp_path / "root", "--plugin", "none", ranks=2)
    assert result.returncode != 0
    assert "--plugin none trains in one process" in result.stderr


def test_it_is_short_enough_to_read() -> None:
    assert len(SFT.read_text().splitlines()) < 200


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("sft_example", SFT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_questions_are_answered_by_the_docstrings(sft: ModuleType) -> None:
    pairs = dict(sft.questions_and_answers())
    assert len(pairs) > 300
    assert pairs["What does `shutil.copytree` do?"] == (
        "Recursively copy a directory tree and return the destination directory."
    )
    assert list(pairs.items()) == sft.questions_and_answers()  # no question twice, the same order again


def test_only_the_answer_is_learned(sft: ModuleType) -> None:
    sample = sft.encode(None, "Why?", "So.")
    assert {name: len(row) for name, row in sample.items()} == dict.fromkeys(sample, sft.NUM_TOKENS)
    assert sample["input_ids"][:9].tolist() == [*b"Why?\nSo.", 0]
    assert sample["labels"][:9].tolist() == [-100] * 5 + [*b"So.", 0]
    assert sample["attention_mask"].sum() == 9
    assert set(sample["labels"][9:].tolist()) == {-100}
    long = sft.encode(None, "Why?", "x" * 200)
    assert {len(row) for row in long.values()} == {sft.NUM_TOKENS}


def test_the_learning_rate_warms_up_and_comes_down(sft: ModuleType) -> None:
    factors = [sft.learning_rate_factor(step) for step in range(300)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
