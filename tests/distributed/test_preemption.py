"""Do both ranks save and leave together when a signal says that they will be killed?"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardpoint import Checkpointer, RunState, TrainState
from tests.distributed.launch import run_ranks
from tests.distributed.preemption_program import checks
from tests.training import OPTIMIZERS, net

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("preemption_program.py")
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("ranks")
    outcomes = run_ranks(PROGRAM, 2, timeout_s=TIMEOUT_S, args=[str(out), *checks()])
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    return [outcome.report() for outcome in outcomes]


@pytest.mark.parametrize("name", sorted(checks()))
def test_on_two_ranks(name: str, launched: list[dict[str, str]]) -> None:
    for rank, report in enumerate(launched):
        assert report.get(name, "not reached").startswith("ok"), f"rank {rank}: {report.get(name, report)}"


def test_torchrun_that_is_told_to_end_gives_its_ranks_time_to_save(tmp_path: Path) -> None:
    outcomes = run_ranks(PROGRAM, 2, timeout_s=TIMEOUT_S, torchrun=True, args=[str(tmp_path), "torchrun"])
    left_at = outcomes[0].report()["left_at"]
    assert outcomes[1].report() == {"left_at": left_at}
    assert [path.name for path in tmp_path.glob("epoch-*")] == [f"epoch-0_step-{left_at}"]
    model = net(7)
    state = TrainState(model=model, optimizer=OPTIMIZERS["adamw"](model.parameters()))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(state) == RunState(0, left_at, 8 * left_at)
