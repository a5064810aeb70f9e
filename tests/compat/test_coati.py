"""Is ColossalChat's import path there for who wants it, and are the functions behind it the original's?"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardpoint import ckpt_io

ORIGINAL = {
    "load_json": ["file_path"],
    "save_json": ["data", "file_path"],
    "save_checkpoint": [
        "save_dir",
        "booster",
        "model",
        "optimizer",
        "lr_scheduler",
        "epoch",
        "step",
        "batch_size",
        "coordinator",
    ],
    "load_checkpoint": ["load_dir", "booster", "model", "optimizer", "lr_scheduler"],
}
PROGRAM = """
import json
import coati.utils, coati.utils.ckpt_io as original
from coati.utils.ckpt_io import load_checkpoint, load_json, save_checkpoint, save_json
import shardpoint
print(json.dumps({
    "exported": sorted(coati.utils.__all__), "names": sorted(original.__all__), "file": original.__file__,
    "same": all(getattr(original, name) is getattr(shardpoint, name) for name in original.__all__)
            and coati.utils.save_checkpoint is save_checkpoint,
}))
"""


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_the_parameters_are_the_originals(name: str) -> None:
    parameters = inspect.signature(getattr(ckpt_io, name)).parameters.values()
    assert [parameter.name for parameter in parameters] == ORIGINAL[name]
    assert all(parameter.default is parameter.empty for parameter in parameters)
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)


def test_the_distribution_installs_offline_and_serves_the_original_path(repo_root: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--target", str(target)]
    source = repo_root / "compat" / "coati"
    subprocess.run([sys.executable, "-m", *install, str(source)], check=True, cwd=tmp_path)
    program = f"import sys; sys.path.insert(0, {str(target)!r})\n{PROGRAM}"
    printed = subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(printed.stdout)
    assert told.pop("file").startswith(str(target))
    assert told == {"exported": ["load_checkpoint", "save_checkpoint"], "names": sorted(ORIGINAL), "same": True}
