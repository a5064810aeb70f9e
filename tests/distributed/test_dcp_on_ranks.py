"""Do two FSDP2 ranks go on from what torch's DCP saved, and does torch's DCP load on them what is exported?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.dcp_program import checks
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("dcp_program.py")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("ranks")
    return [outcome.report() for outcome in run_ranks(PROGRAM, 2, timeout_s=200.0, args=[str(out)])]


@pytest.mark.parametrize("name", checks())
def test_on_two_ranks(name: str, launched: list[dict[str, str]]) -> None:
    for rank, report in enumerate(launched):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"
