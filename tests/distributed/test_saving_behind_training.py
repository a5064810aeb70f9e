"""Do two ranks save behind the training what each moment was, and fail alike?"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardpoint import Checkpointer
from tests.distributed.background_program import checks
from tests.distributed.launch import run_ranks

PROGRAM = Path(__file__).with_name("background_program.py")
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("ranks")
    return [outcome.report() for outcome in run_ranks(PROGRAM, 2, timeout_s=TIMEOUT_S, args=[str(out), *checks()])]


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(checks()))
def test_on_two_ranks(name: str, launched: list[dict[str, str]]) -> None:
    for rank, report in enumerate(launched):
        assert report.get(name, "not reached").startswith("ok"), f"rank {rank}: {report.get(name, report)}"


@pytest.mark.distributed
@pytest.mark.crash
def test_a_kill_behind_the_training_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    outcomes = run_ranks(PROGRAM, 2, timeout_s=120.0, args=[str(tmp_path), "kill"])
    assert -9 in [outcome.returncode for outcome in outcomes]
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-1"]
    with Checkpointer(tmp_path):  # its owner is dead: what it left is swept
        assert not list((tmp_path / ".shardpoint").rglob("attempt-*"))
