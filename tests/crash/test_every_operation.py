from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.crash

MEMORY = Path("/dev/shm")  # noqa: S108 - only ever a fresh directory in it


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Give a directory in memory where there is one: thousands of small trees are copied and deleted."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            yield Path(name)
    else:
        yield tmp_path


def deaths(scenario: str, renames: str, directory: Path, repo_root: Path) -> int:
    command = [sys.executable, "-m", "tests.crash.lives", scenario, renames, str(directory)]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert not result["problems"], "\n".join(result["problems"])
    return int(result["deaths"])


@pytest.mark.parametrize("renames", ["exchange", "two"])
@pytest.mark.parametrize("scenario", ["first", "second", "replace", "linked", "replace_linked", "prune", "file"])
def test_a_death_at_every_change_leaves_the_old_or_the_new(
    scenario: str, renames: str, directory: Path, repo_root: Path
) -> None:
    assert deaths(scenario, renames, directory, repo_root) > 20


@pytest.mark.parametrize("renames", ["exchange", "two"])
def test_a_death_at_every_change_of_the_repair_is_repaired_too(renames: str, directory: Path, repo_root: Path) -> None:
    assert deaths("repair", renames, directory, repo_root) > 200
