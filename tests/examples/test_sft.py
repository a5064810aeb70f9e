"""Does the example train, save, die, resume and reshape as its text says? On a tiny random model.

The oracle of a resumed run is the run that nobody interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def losses_of(root: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(f"{root}.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines}
    assert len(losses) == len(lines)
    return losses


def committed(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/shardpoint.json"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two FSDP ranks, every second one saved."""
    root = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(root, "--plugin", "fsdp", "--steps", "6", "--save-every", "2", ranks=2) == 0
    assert list(losses_of(root)) == [1, 2, 3, 4, 5, 6]
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
    assert list(losses_of(root)) == [1, 2, 3, 4]
    assert committed(root) == ["epoch-0_step-2"]
    assert not (root / "epoch-0_step-4").exists()
    assert list((root / ".shardpoint").glob("*/*epoch-0_step-4*"))
    assert train(root, *options, ranks=2) == 2
    assert losses_of(root) == losses_of(uninterrupted)
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
    assert list(losses) == [5, 6]
    assert losses == pytest.approx({step: expected[step] for step in losses}, abs=1e-4)


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
