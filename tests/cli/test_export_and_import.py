"""Do `export` and `import` do what the functions do, and say with their exit codes what was wrong?"""

from __future__ import annotations

import json
from pathlib import Path

from shardpoint.integrations.dcp_metadata import read_metadata
from tests.cli.conftest import NAMES, Run
from tests.training import on_disk, same_bits

POSITION = ("--epoch", "0", "--step", "8", "--batch-size", "8")


def test_there_and_back(root: Path, tmp_path: Path, run: Run) -> None:
    checkpoint = root / NAMES[1]
    outcome = run("export", checkpoint, tmp_path / "dcp", "--to", "dcp")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("exported ")
    assert "model.0.weight" in read_metadata(tmp_path / "dcp")
    outcome = run(
        "import", tmp_path / "dcp", tmp_path / "new", "--from", "dcp", *POSITION, "--optimizer-class=AdamW", "--json"
    )
    assert outcome.code == 0
    told = json.loads(outcome.out)
    assert told["from"] == "dcp"
    assert told["path"] == str(tmp_path / "new" / NAMES[1])
    assert run("verify", tmp_path / "new").code == 0
    for part in ("modeling", "optimizer"):
        assert same_bits(on_disk(tmp_path / "new" / NAMES[1] / part), on_disk(checkpoint / part))


def test_the_keys_and_the_forms(root: Path, tmp_path: Path, run: Run) -> None:
    options = (
        "--flatten-optimizer",
        "--model-key",
        "",
        "--optimizer-key",
        "optim",
        "--tied",
        "tied.weight=0.weight",
        "--json",
    )
    outcome = run("export", root / NAMES[1], tmp_path / "dcp", "--to=dcp", *options)
    assert json.loads(outcome.out)["num_tensors"] > 0
    found = read_metadata(tmp_path / "dcp")
    assert {"0.weight", "tied.weight", "optim.state.0.weight.exp_avg", "optim.param_groups.0.weight.lr"} <= found.keys()


def test_what_is_wrong_is_told_by_the_code(root: Path, tmp_path: Path, run: Run) -> None:
    made = tmp_path / "dcp"
    assert run("export", root / "absent", made, "--to", "dcp").code == 10
    assert run("export", root / NAMES[1], made, "--to", "dcp", "--role", "actor").code == 2
    assert run("export", root / NAMES[1], made, "--to", "dcp", "--tied", "alias").code == 2
    assert run("export", root / NAMES[1], made, "--to", "other").code == 2
    assert not made.exists()
    assert run("export", root / NAMES[1], made, "--to", "dcp", "--without-optimizer").code == 0
    assert run("export", root / NAMES[1], made, "--to", "dcp").code == 11
    source = ("import", made, tmp_path / "new", "--from", "dcp", *POSITION)
    assert run(*source).code == 2
    assert run(*source, "--optimizer-class", "AdamW", "--without-optimizer").code == 2
    assert run(*source, "--optimizer-class", "AdamW").code == 22
    assert run(*source, "--without-optimizer").code == 0
    assert run(*source, "--without-optimizer").code == 11
    (made / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert run("import", made, tmp_path / "other", "--from", "dcp", *POSITION, "--without-optimizer").code == 21
