"""Is what any layout saved exactly what any other resumes, and does training go on as it would have?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.reshard_layouts import FAMILIES

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("reshard_program.py")
TIMEOUT_S = 300.0

SAVES = [(family, layout.name, layout.size) for family, layouts in FAMILIES.items() for layout in layouts]
PAIRS = [
    (family, source.name, target.name, target.size)
    for family, layouts in FAMILIES.items()
    for source in layouts
    for target in layouts
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    outcomes = run_ranks(PROGRAM, 4, timeout_s=TIMEOUT_S, args=[str(tmp_path_factory.mktemp("reshard")), *FAMILIES])
    return [outcome.report() for outcome in outcomes]


def check(reports: list[dict[str, str]], name: str, size: int) -> None:
    for rank, report in enumerate(reports[:size]):
        assert report.get(name) == "ok", f"rank {rank}: {report.get(name, 'was not reached')}"


@pytest.mark.parametrize("family, name, size", SAVES, ids=[f"{family}-{name}" for family, name, _ in SAVES])
def test_on_disk_is_what_torch_gathers(family: str, name: str, size: int, reports: list[dict[str, str]]) -> None:
    check(reports, f"{family}: {name} saves", size)


@pytest.mark.parametrize(
    "family, source, target, size",
    PAIRS,
    ids=[f"{family}-{source}-to-{target}" for family, source, target, _ in PAIRS],
)
def test_resumed_bit_for_bit(family: str, source: str, target: str, size: int, reports: list[dict[str, str]]) -> None:
    check(reports, f"{family}: {source} -> {target}", size)
