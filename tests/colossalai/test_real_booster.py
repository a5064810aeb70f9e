"""Do the four functions work with the real ColossalAI, and does a run of it go on natively?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(scope="module", params=[1, 2])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return [one.report() for one in run_ranks(PROGRAM, request.param, timeout_s=240.0, args=[str(out)])]


CHECKS = [
    *(
        f"{plugin}_{check}"
        for plugin in ("ddp", "zero1", "zero2")
        for check in ("goes_on", "is_all_or_nothing", "refuses_what_would_be_skipped", "goes_on_natively")
    ),
    "what_shardpoint_wrote_is_not_given_to_it",
]


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(name: str, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"


def test_no_check_of_the_program_is_left_out(reports: list[dict[str, str]]) -> None:
    assert [list(report) for report in reports] == [CHECKS] * len(reports)
