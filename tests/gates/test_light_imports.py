from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gates.test_layers import contract


def modules_after(code: str, cwd: Path) -> set[str]:
    """Return what `sys.modules` holds after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = modules_after("import shardpoint", tmp_path)
    assert not loaded & {"torch", "numpy", "transformers", "awscrt", "msgspec", "safetensors", "typer", "rich"}
    assert {name for name in loaded if name.startswith("shardpoint")} == {"shardpoint"}


def test_errors_and_policies_load_without_torch_or_numpy(tmp_path: Path) -> None:
    loaded = modules_after("from shardpoint import CheckpointError, Every, Latest, PeerError", tmp_path)
    assert not loaded & {"torch", "numpy"}


@pytest.mark.parametrize("module", contract("forbidden")["source_modules"])
def test_modules_below_the_torch_line_load_without_torch(module: str, tmp_path: Path) -> None:
    assert "torch" not in modules_after(f"import {module}", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ls", "."],
        ["ls", ".", "--json"],
        ["show", "epoch-0_step-1"],
        ["verify", "."],
        ["verify", ".", "--json"],
        ["audit", "."],
    ],
    ids=" ".join,
)
def test_the_command_line_runs_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = {['shardpoint', *arguments]!r}\n"
        "from shardpoint.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    loaded = modules_after(code, tmp_path)
    assert not loaded & {"torch", "transformers"}
