"""Does a model that tensor parallelism cuts train as in one process, and do ZeRO's names do what they say?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.hybrid_program import checks
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("hybrid_program.py")
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    outcomes = run_ranks(PROGRAM, 4, timeout_s=TIMEOUT_S, args=[str(tmp_path_factory.mktemp("hybrid"))])
    return [outcome.report() for outcome in outcomes]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", sorted(checks()))
def test_on_ranks(name: str, size: int, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports[:size]):
        told = report.get(f"{name} {size}", "was not reached")
        assert told == "ok", f"rank {rank}: {told}"
