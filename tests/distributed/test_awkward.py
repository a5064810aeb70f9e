"""Do two ranks get awkward tensors and optimizers back bit by bit, stored as torch gathers them?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.awkward_program import checks
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("awkward_program.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    outcomes = run_ranks(PROGRAM, 2, timeout_s=180.0, args=[str(tmp_path_factory.mktemp("ranks"))])
    return [outcome.report() for outcome in outcomes]


@pytest.mark.parametrize("name", sorted(checks()))
def test_on_two_ranks(name: str, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"
