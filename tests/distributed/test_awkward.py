"""Do awkward tensors, parameters and optimizers come back bit by bit on two ranks, stored as torch gathers them?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import awkward_parameters
from tests.distributed.awkward_program import checks
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("awkward_program.py")


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the awkward parameters, saved by one process."""
    directory = tmp_path_factory.mktemp("ranks") / "parameters"
    awkward_parameters.save_first(directory)
    return directory


@pytest.fixture(scope="module")
def reports(parameters: Path) -> list[dict[str, str]]:
    outcomes = run_ranks(PROGRAM, 2, timeout_s=180.0, args=[str(parameters.parent)])
    return [outcome.report() for outcome in outcomes]


@pytest.mark.parametrize("name", sorted(checks()))
def test_on_two_ranks(name: str, reports: list[dict[str, str]]) -> None:
    for rank, report in enumerate(reports):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("source", ["plain-3", "ddp-6", "fsdp-9"])
def test_parameters_of_each_in_one_process(source: str, parameters: Path) -> None:
    awkward_parameters.go_on(parameters, "plain", source)
