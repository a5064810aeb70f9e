from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.crash


def deaths(scenario: str, renames: str, directory: Path, repo_root: Path) -> int:
    command = [sys.executable, "-m", "tests.crash.lives", scenario, renames, str(directory)]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert not result["problems"], "\n".join(result["problems"])
    return int(result["deaths"])


@pytest.mark.parametrize("renames", ["exchange", "two"])
@pytest.mark.parametrize("scenario", ["first", "second", "replace", "prune", "file"])
def test_a_death_at_every_change_leaves_the_old_or_the_new(
    scenario: str, renames: str, tmp_path: Path, repo_root: Path
) -> None:
    assert deaths(scenario, renames, tmp_path, repo_root) > 20


@pytest.mark.parametrize("renames", ["exchange", "two"])
def test_a_death_at_every_change_of_the_repair_is_repaired_too(renames: str, tmp_path: Path, repo_root: Path) -> None:
    assert deaths("repair", renames, tmp_path, repo_root) > 200
