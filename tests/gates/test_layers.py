from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.gates.sources import ROOT, module_name, package_files, place, references


def contract(kind: str) -> dict[str, Any]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = [c for c in config["tool"]["importlinter"]["contracts"] if c["type"] == kind]
    return dict(found)


def test_imports_keep_the_floors() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_everything_below_adapters_and_the_cli_is_kept_from_torch() -> None:
    floors = [[name.strip(" ()") for name in layer.split("|")] for layer in contract("layers")["layers"]]
    line = next(index for index, floor in enumerate(floors) if "adapters" in floor)
    below = {f"shardpoint.{name}" for floor in floors[line + 1 :] for name in floor}
    assert set(contract("forbidden")["source_modules"]) == below | {
        "shardpoint.audit",
        "shardpoint.catalog",
        "shardpoint.cli",
    }


def test_the_package_takes_names_from_where_they_are_defined() -> None:
    # The contracts do not see through the package's lazy exports, so no module of the package may use them.
    import ast

    modules = {module_name(path) for path in package_files()}
    bad = [
        f"{place(path, node)}: {name}"
        for path in package_files()
        if module_name(path) != "shardpoint"
        for name, node in references(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "shardpoint"
        if name not in modules | {"shardpoint.__version__"}
    ]
    assert not bad, "import these from the modules that define them:\n" + "\n".join(bad)
