from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from shardpoint import Checkpointer, TrainState
from shardpoint.errors import CheckpointError, CorruptionError, UnsupportedFormatError
from tests.security.attacks import ON_A_DOCUMENT, ON_A_HEADER, ON_THE_MANIFEST, Attack, read_manifest, write_manifest

NAME = "epoch-0_step-1"
MAX_BYTES = 64 * 2**20  # far above what a checkpoint of a kilobyte needs, far below what the attacks ask for

VERIFY_ALL = """
import contextlib, io, json, resource, sys
from shardpoint.cli import main

resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
codes = {}
for path in sys.argv[1:]:
    for command in ("verify", "show", "ls"):
        sys.argv = ["shardpoint", command, path if command != "ls" else path.rpartition("/")[0], "--json"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
        json.loads(out.getvalue())
        codes.setdefault(path, []).append(code)
print(json.dumps(codes))
"""


def fresh_state() -> TrainState:
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 2)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact") / "root"
    state = fresh_state()
    state.model(torch.ones(1, 2)).sum().backward()
    assert state.optimizer is not None
    state.optimizer.step()
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
    return root / NAME


def attacked(intact: Path, directory: Path, attack: Attack) -> Path:
    checkpoint = Path(shutil.copytree(intact, directory / NAME))
    attack(checkpoint)
    return checkpoint


def test_resealing_alone_is_no_attack(intact: Path, tmp_path: Path) -> None:
    """The forged seals and checksums of the other tests are accepted, so that something else must refuse them."""
    checkpoint = attacked(intact, tmp_path, lambda path: write_manifest(path, read_manifest(path)))
    assert (checkpoint / "shardpoint.json").read_bytes() != (intact / "shardpoint.json").read_bytes()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(fresh_state()) is not None


def test_the_command_line_survives_every_attack_in_bounded_memory(intact: Path, tmp_path: Path) -> None:
    attacks = ON_THE_MANIFEST | ON_A_HEADER | ON_A_DOCUMENT
    paths = {str(attacked(intact, tmp_path / name, attack)): name for name, attack in attacks.items()}
    done = subprocess.run(
        [sys.executable, "-c", VERIFY_ALL, *paths], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for path, (verify, show, ls) in json.loads(done.stdout).items():
        name = paths[path]
        assert ls == 0, name
        if name in ON_THE_MANIFEST:
            assert verify in (CorruptionError.exit_code, UnsupportedFormatError.exit_code), name
            assert show == verify, name
        else:
            assert show == 0, name
            assert verify == (CorruptionError.exit_code if name in ON_A_HEADER else 0), name


@pytest.mark.parametrize("name", [*ON_THE_MANIFEST, *ON_A_DOCUMENT])
def test_a_load_refuses_and_changes_nothing(name: str, intact: Path, tmp_path: Path) -> None:
    attacked(intact, tmp_path, (ON_THE_MANIFEST | ON_A_DOCUMENT)[name])
    state = fresh_state()
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    random_state = torch.get_rng_state()
    tracemalloc.start()
    try:
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError) as caught:
            checkpointer.resume(state)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, (CorruptionError, UnsupportedFormatError))
    assert not getattr(caught.value, "target_modified", False)
    assert all(value.equal(before[key]) for key, value in state.model.state_dict().items())
    assert state.optimizer is not None
    assert not state.optimizer.state
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize("name", ON_A_HEADER)
def test_a_load_goes_by_the_manifest_not_by_a_header(name: str, intact: Path, tmp_path: Path) -> None:
    expected, state = fresh_state(), fresh_state()
    attacked(intact, tmp_path / "attacked", ON_A_HEADER[name])
    shutil.copytree(intact, tmp_path / "intact" / NAME)
    for root, target in (("intact", expected), ("attacked", state)):
        with Checkpointer(tmp_path / root) as checkpointer:
            assert checkpointer.resume(target) is not None
    wanted = expected.model.state_dict()
    assert all(value.equal(wanted[key]) for key, value in state.model.state_dict().items())


def test_nothing_outside_is_read_or_deleted_by_a_path_that_leads_there(intact: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("keep")
    checkpoint = attacked(intact, tmp_path / "root", ON_THE_MANIFEST["path-to-the-parent"])
    with Checkpointer(checkpoint.parent) as checkpointer:
        with pytest.raises(CorruptionError):
            checkpointer.resume(fresh_state())
        checkpointer.save(fresh_state(), epoch=0, step=1, batch_size=1)  # over the hostile one
        assert checkpointer.resume(fresh_state()) is not None
    assert secret.read_text() == "keep"
