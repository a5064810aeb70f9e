"""Is a state that looks wrong (replicas that differ, NaN) named on every rank, and passed over by a resume?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.suspect_program import checks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("suspect_program.py")
TIMEOUT_S = 200.0
Reports = dict[int, list[dict[str, str]]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    out = tmp_path_factory.mktemp("ranks")
    return {
        world_size: [
            outcome.report()
            for outcome in run_ranks(PROGRAM, world_size, timeout_s=TIMEOUT_S, args=[str(out / str(world_size))])
        ]
        for world_size in (2, 4)
    }


@pytest.mark.parametrize("world_size,name", [(world, name) for world in (2, 4) for name in checks(world)])
def test_on_several_ranks(world_size: int, name: str, launched: Reports) -> None:
    for rank, report in enumerate(launched[world_size]):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"
