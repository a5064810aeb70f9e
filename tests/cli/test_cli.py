from __future__ import annotations

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awscrt import checksums

from shardpoint.catalog import Problem
from tests.cli.conftest import NAMES, Outcome, Run

TENSOR = "0.weight"
FILE = "modeling/model-00001-of-00001.safetensors"

SUMMARY_FIELDS = {
    "name": str,
    "epoch": int,
    "step": int,
    "sample_start_index": int,
    "sequence": int,
    "checkpoint_id": str,
    "created_utc": str,
    "world_size": int,
    "roles": list,
    "num_bytes": int,
    "num_files": int,
    "num_tensors": int,
    "metrics": dict,
    "library": str,
    "format": str,
    "suspect": type(None),
    "pinned": bool,
}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def flip_tensor(checkpoint: Path, tensor: str = TENSOR) -> None:
    """Flip a byte of a tensor, found through the file's own header."""
    path = checkpoint / FILE
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    flip(path, 8 + length + (begin + end) // 2)


def reseal(checkpoint: Path, old: str, new: str) -> None:
    """Change a text in a manifest, and give the manifest the checksum that fits again."""
    path = checkpoint / "shardpoint.json"
    text = path.read_text()
    assert text.count(old) == 1
    body = text.replace(old, new)[: -len('0123456789abcdef"\n}\n')].encode()
    path.write_bytes(body + f'{checksums.crc64nvme(body):016x}"\n}}\n'.encode())


def parsed(outcome: Outcome) -> Any:
    return json.loads(outcome.out)


# ---- ls


def test_ls_lists_every_checkpoint_in_the_order_of_its_commit(root: Path, run: Run) -> None:
    outcome = run("ls", root)
    assert outcome.code == 0
    heading, *lines = outcome.out.splitlines()
    assert heading.split()[:3] == ["checkpoint", "epoch", "step"]
    assert [line.split()[:4] for line in lines] == [[NAMES[0], "0", "4", "32"], [NAMES[1], "0", "8", "64"]]


def test_ls_cuts_nothing_where_there_is_no_terminal(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "epoch-0_step-8" + "x" * 150
    (root / NAMES[1]).rename(root / long)
    monkeypatch.setenv("COLUMNS", "40")
    outcome = run("ls", root)
    line = next(line for line in outcome.out.splitlines() if line.startswith(long))
    dates = [item["created_utc"] for item in parsed(run("ls", root, "--json"))["checkpoints"]]
    assert dates[1] in line
    assert "\N{HORIZONTAL ELLIPSIS}" not in outcome.out


def test_ls_loses_nothing_on_a_narrow_terminal(root: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", "from shardpoint.cli import main; main()", "ls", str(root)]
    environment = {**os.environ, "TERM": "dumb"}  # 80 columns
    process = subprocess.Popen(command, stdout=follower, env=environment)
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 4096):
            text += chunk
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(leader)
    assert process.wait() == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in text.decode()
    assert max(map(len, text.decode().splitlines())) <= 80
    date = json.loads((root / NAMES[1] / "shardpoint.json").read_text())["created_utc"]
    letters = "".join(text.decode().split())
    assert all(part in letters for part in (date[:10], date[-4:], NAMES[1]))


def test_ls_as_json(root: Path, run: Run) -> None:
    outcome = run("ls", root, "--json")
    assert outcome.code == 0
    listed = parsed(outcome)
    assert set(listed) == {"root", "checkpoints"}
    assert listed["root"] == str(root)
    for item, name, sequence in zip(listed["checkpoints"], NAMES, (1, 2), strict=True):
        assert {key: type(value) for key, value in item.items()} == SUMMARY_FIELDS
        assert (item["name"], item["sequence"], item["format"]) == (name, sequence, "1.1")
        assert item["metrics"] == {"loss": 0.5, "odd": "nan"}
        files = [path for path in (root / name).rglob("*") if path.is_file() and path.name != "shardpoint.json"]
        assert item["num_bytes"] == sum(path.stat().st_size for path in files)
        assert item["num_files"] == len(files)


def test_ls_of_a_root_without_checkpoints(root: Path, run: Run) -> None:
    for name in NAMES:
        shutil.rmtree(root / name)
    outcome = run("ls", root)
    assert (outcome.code, outcome.out) == (0, f"{root} has no committed checkpoint\n")
    assert parsed(run("ls", root, "--json"))["checkpoints"] == []


def test_ls_shows_a_damaged_manifest_beside_the_intact_ones(root: Path, run: Run) -> None:
    flip(root / NAMES[0] / "shardpoint.json", 40)
    outcome = run("ls", root)
    assert outcome.code == 0
    assert any(line.startswith(f"{NAMES[0]}: ") and "checksum" in line for line in outcome.out.splitlines())
    assert any(line.split()[:3] == [NAMES[1], "0", "8"] for line in outcome.out.splitlines())
    damaged, intact = parsed(run("ls", root, "--json"))["checkpoints"]
    assert set(damaged) == {"name", "problem"}
    assert intact["name"] == NAMES[1]


def test_ls_does_not_show_a_torn_save(root: Path, run: Run) -> None:
    (root / NAMES[1] / "shardpoint.json").unlink()
    assert [item["name"] for item in parsed(run("ls", root, "--json"))["checkpoints"]] == [NAMES[0]]


def mark(checkpoint: Path) -> None:
    """Mark a checkpoint as suspect, as the format says it."""
    holders = '[{"ranks":[0,2],"num_ranks":2},{"ranks":[1],"num_ranks":1}]'
    fields = f'"part":"modeling","fqn":"{TENSOR}","state":null,"holders":{holders},"num_bytes":48'
    finding = '{"kind":"replicas_differ",' + fields + "}"
    suspect = f'"suspect": {{"num_findings":1,"findings":[{finding}]}}'
    reseal(checkpoint, '\n "manifest_crc', f'\n {suspect},\n "manifest_crc')


def test_a_suspect_checkpoint_is_marked(root: Path, run: Run) -> None:
    assert "suspect" not in run("ls", root).out
    mark(root / NAMES[1])
    healthy, marked = (line for line in run("ls", root).out.splitlines() if line.startswith("epoch"))
    assert (marked.split()[-1], healthy.split()[-1]) == ("suspect", "1")
    assert parsed(run("ls", root, "--json"))["checkpoints"][1]["suspect"]["num_findings"] == 1
    shown = run("show", root / NAMES[1]).out
    assert f"modeling: {TENSOR} differs between its replicas: ranks 0, 2 / rank 1\n" in shown
    (finding,) = parsed(run("show", root / NAMES[1], "--json"))["suspect"]["findings"]
    assert (finding["kind"], finding["fqn"]) == ("replicas_differ", TENSOR)
    assert [holders["ranks"] for holders in finding["holders"]] == [[0, 2], [1]]
    assert run("verify", root).code == 0  # its bytes are those that were committed


# ---- show


def test_show_tells_what_the_manifest_says(root: Path, run: Run) -> None:
    outcome = run("show", root / NAMES[0], "--tensors")
    assert outcome.code == 0
    assert f"name                {NAMES[0]}" in outcome.out
    assert FILE in outcome.out
    assert "optimizer: 0.weight [exp_avg]" in outcome.out
    assert "[exp_avg]" not in run("show", root / NAMES[0]).out


def test_show_as_json_agrees_with_the_files_own_headers(root: Path, run: Run) -> None:
    from safetensors import safe_open

    shown = parsed(run("show", root / NAMES[0], "--json"))
    assert set(shown) == {*SUMMARY_FIELDS, "files", "tensors"}
    for entry in shown["files"]:
        assert set(entry) == {"path", "size_bytes", "crc64nvme"}
        data = (root / NAMES[0] / entry["path"]).read_bytes()
        assert (entry["size_bytes"], entry["crc64nvme"]) == (len(data), f"{checksums.crc64nvme(data):016x}")
    for tensor in shown["tensors"]:
        fields = {"part", "fqn", "state", "dtype", "shape", "file", "byte_offset", "num_bytes", "crc64nvme"}
        assert set(tensor) == fields
        name = tensor["fqn"] if tensor["state"] is None else f"{tensor['fqn']}.{tensor['state']}"
        with safe_open(root / NAMES[0] / tensor["file"], framework="numpy") as file:
            assert file.get_slice(name).get_shape() == tensor["shape"]
            data = file.get_tensor(name).tobytes()
        assert tensor["crc64nvme"] == f"{checksums.crc64nvme(data):016x}"


# ---- verify


def test_verify_of_an_intact_checkpoint_and_root(root: Path, run: Run) -> None:
    outcome = run("verify", root / NAMES[1])
    assert outcome.code == 0
    assert outcome.out.startswith(f"ok       {NAMES[1]}: ")
    report = parsed(run("verify", root, "--json"))
    assert report["ok"] is True
    assert [item["name"] for item in report["checkpoints"]] == list(NAMES)
    listed = parsed(run("ls", root, "--json"))["checkpoints"]
    for item, summary in zip(report["checkpoints"], listed, strict=True):
        assert item["ok"] is True
        assert item["problems"] == []
        assert all(item[key] == summary[key] for key in ("num_bytes", "num_files", "num_tensors"))


@pytest.mark.parametrize("whole_root", [False, True])
def test_verify_names_the_file_and_the_tensor_of_a_flipped_byte(root: Path, run: Run, whole_root: bool) -> None:
    flip_tensor(root / NAMES[1])
    path = root if whole_root else root / NAMES[1]
    outcome = run("verify", path)
    assert outcome.code == 20
    assert f"CORRUPT  {NAMES[1]}: " in outcome.out
    assert f"tensor {TENSOR} in {FILE} is damaged" in outcome.out
    report = parsed(run("verify", path, "--json"))
    assert report["ok"] is False
    (damaged,) = [item for item in report["checkpoints"] if not item["ok"]]
    (problem,) = damaged["problems"]
    assert set(problem) == {"key", "kind", "message"}
    assert (damaged["name"], problem["key"], problem["kind"]) == (NAMES[1], f"{FILE}#{TENSOR}", "checksum")
    assert len(report["checkpoints"]) == (2 if whole_root else 1)


def test_verify_reports_every_problem_of_every_checkpoint(root: Path, run: Run) -> None:
    flip_tensor(root / NAMES[0])
    (root / NAMES[0] / "running_states.json").unlink()
    (root / NAMES[1] / "lr_scheduler.json").write_bytes(b"{}")
    (root / NAMES[1] / "modeling" / "model.safetensors").write_bytes(b"stale")
    outcome = run("verify", root, "--json")
    assert outcome.code == 20
    found = [[(p["kind"], p["key"]) for p in item["problems"]] for item in parsed(outcome)["checkpoints"]]
    assert found == [
        [("checksum", f"{FILE}#{TENSOR}"), ("missing", "running_states.json")],
        [("size", "lr_scheduler.json"), ("unexpected", "modeling/model.safetensors")],
    ]


def test_verify_of_a_root_goes_on_after_a_checkpoint_of_a_newer_format(root: Path, run: Run) -> None:
    reseal(root / NAMES[0], '"version": [1,1]', '"version": [2,0]')
    outcome = run("verify", root)
    assert outcome.code == 21
    assert f"UNKNOWN  {NAMES[0]}" in outcome.out
    assert f"ok       {NAMES[1]}" in outcome.out
    flip_tensor(root / NAMES[1])
    assert run("verify", root).code == 20


def test_verify_of_a_root_without_checkpoints(root: Path, run: Run) -> None:
    for name in NAMES:
        shutil.rmtree(root / name)
    outcome = run("verify", root)
    assert (outcome.code, outcome.out) == (0, f"{root} has no committed checkpoint\n")
    assert parsed(run("verify", root, "--json")) == {"ok": True, "checkpoints": []}


# ---- errors


def test_exit_codes(root: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    torn, newer, damaged = (tmp_path / name for name in ("torn", "newer", "damaged"))
    for copy in (torn, newer, damaged):
        shutil.copytree(root / NAMES[0], copy)
    (torn / "shardpoint.json").unlink()
    reseal(newer, '"version": [1,1]', '"version": [1,2]')
    os.truncate(damaged / "shardpoint.json", 900)
    expected = {
        ("ls", tmp_path / "none"): (10, "NotFoundError"),
        ("ls", file): (2, "UsageError"),
        ("ls", root / NAMES[0]): (2, "UsageError"),
        ("show", tmp_path / "none"): (10, "NotFoundError"),
        ("show", file): (2, "UsageError"),
        ("show", root): (2, "UsageError"),
        ("show", torn): (12, "TornCheckpointError"),
        ("show", newer): (21, "UnsupportedFormatError"),
        ("show", damaged): (20, "TruncatedError"),
        ("verify", tmp_path / "none"): (10, "NotFoundError"),
        ("verify", file): (2, "UsageError"),
        ("verify", torn): (12, "TornCheckpointError"),
        ("verify", newer): (21, "UnsupportedFormatError"),
    }
    for arguments, (code, name) in expected.items():
        outcome = run(*arguments)
        assert (outcome.code, outcome.out) == (code, ""), arguments
        assert outcome.err.startswith(f"{name}: "), arguments
        assert str(arguments[1]) in outcome.err or arguments[1].name in outcome.err
        as_json = run(*arguments, "--json")
        assert (as_json.code, as_json.err) == (code, ""), arguments
        assert parsed(as_json)["error"] == name
        assert parsed(as_json)["message"] == outcome.err.removeprefix(f"{name}: ").rstrip("\n")
    # A damaged manifest is a finding of `verify`, not an error of it.
    outcome = run("verify", damaged, "--json")
    assert outcome.code == 20
    assert [p["kind"] for p in parsed(outcome)["checkpoints"][0]["problems"]] == ["manifest"]


@pytest.mark.parametrize("arguments", [["ls"], ["ls", ".", "--bogus"], ["prune", "."], ["show", "a", "b"], []])
def test_usage_errors_exit_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).code == 2


def test_a_strangers_names_do_not_reach_the_terminal_raw(root: Path, run: Run) -> None:
    reseal(root / NAMES[1], '"library": "shardpoint 0.1.0"', '"library": "\\u001b]0;owned\\u0007"')
    name = "\x1b[31m[red]x"
    (root / NAMES[1]).rename(root / name)
    for arguments in (["ls", root], ["show", root / name], ["verify", root], ["show", root / f"{name}y"]):
        outcome = run(*arguments)
        assert "\x1b" not in outcome.out + outcome.err
        assert "\x07" not in outcome.out + outcome.err
        assert r"\x1b[31m[red]x" in outcome.out + outcome.err


def test_a_path_that_is_no_text_is_printed_all_the_same(root: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\xfe"
    (root / NAMES[1]).rename(root / "\N{LATIN SMALL LETTER E WITH ACUTE}poque")
    os.rename(root, odd)  # noqa: PTH104 - pathlib takes no bytes
    command: list[str | bytes] = [sys.executable, "-c", "from shardpoint.cli import main; main()", "ls", odd]
    for extra in ([], ["--json"]):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run([*command, *extra], capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        assert NAMES[0].encode() in done.stdout
        assert rb"poque" in done.stdout
    command[-1] = odd + b"x"
    assert subprocess.run(command, capture_output=True, check=False, env=environment).returncode == 10


def test_the_console_script(root: Path) -> None:
    script = Path(sys.executable).parent / "shardpoint"
    done = subprocess.run([script, "verify", root / NAMES[0]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok ")


def test_the_reference_tells_the_codes_and_the_fields(repo_root: Path) -> None:
    from shardpoint import errors

    text = (repo_root / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+) \| `(\w+)`", text, re.MULTILINE)
    assert len(codes) == 10
    assert all(getattr(errors, name).exit_code == int(code) for code, name in codes)
    others = re.search(r"other classes' codes \(([\d, ]+);", text)
    assert others is not None
    told = {0, *(int(code) for code, _ in codes), *(int(code) for code in others[1].split(", "))}
    assert told == {0, *(cls.exit_code for cls in errors.error_classes().values())}
    summary = text.partition("A *summary* has ")[2].partition(".\n")[0]
    assert re.findall(r"`(\w+)`", summary) == list(SUMMARY_FIELDS)
    kinds = re.findall(r"^\| `(\w+)` \|", text.partition("| kind | meaning |")[2], re.MULTILINE)
    assert Problem.__doc__ is not None
    assert sorted(kinds) == sorted(re.findall(r'`"(\w+)"`', Problem.__doc__))


# ---- audit


def write_journal(root: Path, second_loss: float) -> None:
    header = {
        "kind": "life", "version": 1, "incarnation": 1, "library": "", "started_utc": "", "host": "", "world_size": 1,
        "layout": "", "versions": {},
    }  # fmt: skip
    origin = {"name": "epoch-0_step-1", "checkpoint_id": "", "epoch": 0, "step": 1}
    lines: list[dict[str, Any]] = [{**header, "life": "a"}]
    lines += [{"kind": "step", "life": "a", "epoch": 0, "step": step, "loss": 0.5, "samples": None} for step in (1, 2)]
    lines += [{**header, "life": "b", "resumed_from": origin}]
    lines += [{"kind": "step", "life": "b", "epoch": 0, "step": 2, "loss": second_loss}]
    (root / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_audit_of_a_true_resume(root: Path, run: Run) -> None:
    write_journal(root, 0.5)
    outcome = run("audit", root)
    assert outcome.code == 0
    assert "life 2 against life 1: bit-exact for step 2\n" in outcome.out
    told = parsed(run("audit", root, "--json"))
    assert set(told) == {"root", "ok", "num_compared", "lives", "comparisons", "findings", "notes"}
    assert (told["ok"], told["num_compared"]) == (True, 1)
    assert set(told["lives"][1]) == {
        "number", "num_steps", "first", "last", "resumed_from", "world_size", "layout",
    }  # fmt: skip


def test_audit_of_another_loss(root: Path, run: Run) -> None:
    write_journal(root, float(np.nextafter(0.5, 1)))
    outcome = run("audit", root)
    assert outcome.code == 1
    assert "differs first in step 2: loss: the loss is 0.5 then, 0.5000000000000001 now" in outcome.out
    assert outcome.out.splitlines()[-1] == "NOT PROVEN: 1 thing to explain"
    outcome = run("audit", root, "--json")
    assert outcome.code == 1
    (compared,) = parsed(outcome)["comparisons"]
    assert set(compared) == {
        "now", "then", "first", "last", "num_steps", "difference", "largest_relative", "message",
    }  # fmt: skip
    assert set(compared["difference"]) == {"cause", "epoch", "step", "field", "then", "now", "message"}
    assert compared["difference"]["cause"] == "loss"


def test_audit_against_another_root(root: Path, tmp_path: Path, run: Run) -> None:
    write_journal(root, 0.5)
    other = tmp_path / "other"
    other.mkdir()
    write_journal(other, 0.25)
    outcome = run("audit", root, "--against", other)
    assert outcome.code == 1
    assert f"life 2 against life 2 of {other}: differs first in step 2" in outcome.out


def test_audit_without_a_journal(root: Path, run: Run) -> None:
    outcome = run("audit", root)
    assert outcome.code == 10
    assert "NotFoundError: there is no journal.jsonl" in outcome.err


# ---- pin, unpin


def test_pin_and_unpin(root: Path, run: Run) -> None:
    assert run("pin", root / NAMES[0]) == Outcome(0, f"{NAMES[0]} is pinned: no run prunes it\n", "")
    assert parsed(run("pin", root / NAMES[0], "--json")) == {"name": NAMES[0], "pinned": True}
    assert [item["pinned"] for item in parsed(run("ls", root, "--json"))["checkpoints"]] == [True, False]
    assert run("ls", root).out.splitlines()[3:] == [f"{NAMES[0]}: pinned"]
    assert parsed(run("show", root / NAMES[0], "--json"))["pinned"] is True
    assert run("verify", root).code == 0
    assert (root / ".shardpoint" / "pins" / NAMES[0]).read_bytes() == b""
    assert parsed(run("unpin", root / NAMES[0], "--json")) == {"name": NAMES[0], "pinned": False}
    assert not any(item["pinned"] for item in parsed(run("ls", root, "--json"))["checkpoints"])


def test_pin_and_unpin_of_what_is_not_there(root: Path, run: Run, tmp_path: Path) -> None:
    assert run("pin", root / "epoch-0_step-5").code == 10
    assert run("unpin", root / NAMES[0]).code == 10
    (root / "mine").mkdir()
    assert run("pin", root / "mine").code == 12
    assert run("pin", root).code == 2
    assert run("pin", tmp_path / "nowhere" / "x").code == 10
    assert not (tmp_path / "nowhere").exists()
    error = parsed(run("unpin", root / "epoch-0_step-5", "--json"))
    assert error["error"] == "NotFoundError"
    # A pin of what was deleted by hand can be taken away.
    run("pin", root / NAMES[0])
    shutil.rmtree(root / NAMES[0])
    assert run("unpin", root / NAMES[0]).code == 0
