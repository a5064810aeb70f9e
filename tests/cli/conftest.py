"""A root with two real checkpoints, made by the engine once for all tests here; each test gets a copy of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("epoch-0_step-4", "epoch-0_step-8")

# In a process of its own: the commands must not need torch, and a run that ended has given its root up.
MAKE = """
import sys
import torch
from shardpoint import Checkpointer, TrainState

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
state = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler)
with Checkpointer(sys.argv[1]) as checkpointer:
    for step in (4, 8):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
        checkpointer.save(state, epoch=0, step=step, batch_size=8, metrics={"loss": 0.5, "odd": float("nan")})
"""


@pytest.fixture(scope="session")
def made_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "root"
    subprocess.run([sys.executable, "-c", MAKE, str(root)], check=True)
    return root


@pytest.fixture
def root(made_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_root, tmp_path / "root"))


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs the command line as the console script does, within this process."""
    from shardpoint.cli import main

    def run_it(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["shardpoint", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return run_it
