from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gates.sources import ROOT

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)[ ]*$", re.MULTILINE | re.DOTALL)

# Blocks that may be marked `python no-run`: (file, the block's first line). Each gives its reason here.
NO_RUN: frozenset[tuple[str, str]] = frozenset()

COMMANDS = {"ls", "show", "verify", "pin", "unpin", "audit", "export", "import"}


@dataclass(frozen=True)
class Block:
    file: str
    line: int  # of the block's first line of code
    info: str  # what stands after the opening fence: "python", "python no-run", "console"
    body: str


def blocks_of(markdown: str, file: str) -> list[Block]:
    """Return a document's fenced blocks."""
    return [
        Block(file, markdown.count("\n", 0, match.start("body")) + 1, match["info"].strip(), match["body"])
        for match in FENCE.finditer(markdown)
    ]


def documents() -> dict[str, list[Block]]:
    """Return every document with its blocks."""
    paths = [ROOT / "README.md", ROOT / "compat/coati/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    paths += [ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")]
    names = {str(path.relative_to(ROOT)): path for path in paths if path.is_file()}
    return {name: blocks_of(path.read_text(encoding="utf-8"), name) for name, path in names.items()}


DOCUMENTS = documents()

# Runs the blocks in order in one namespace, so that a later one may use an earlier one's names. The empty lines in
# front make a traceback name the line in the document.
RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
for file, line, body in json.load(sys.stdin):
    exec(compile("\\n" * (line - 1) + body, file, "exec"), namespace)
"""


def environment() -> dict[str, str]:
    coati = next((path.parent for path in (ROOT / "compat").rglob("coati") if (path / "utils").is_dir()), None)
    search = [str(coati)] if coati else []
    search += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: Sequence[str | Path], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(), input=stdin, capture_output=True, text=True, timeout=240, check=False
    )


def console_lines(block: Block, program: str) -> list[list[str]]:
    """Return the words of each `$ program ...` line; a `#` begins a comment."""
    lines = [line[2:] for line in block.body.splitlines() if line.startswith(f"$ {program}")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("file", [file for file, blocks in DOCUMENTS.items() if blocks])
def test_every_block_runs(file: str, tmp_path: Path) -> None:
    import json

    blocks = [block for block in DOCUMENTS[file] if block.info == "python"]
    if blocks:
        done = run(
            [sys.executable, "-c", RUNNER],
            tmp_path,
            json.dumps([(block.file, block.line, block.body) for block in blocks]),
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for block in DOCUMENTS[file]:
        for words in console_lines(block, "shardpoint") if block.info == "console" else []:
            check_command(words, tmp_path, f"{block.file}:{block.line}")


def check_command(words: list[str], cwd: Path, where: str) -> None:
    """Run a command where the document's Python blocks have made what it names; else compare it with its own help."""
    program = [sys.executable, "-c", "from shardpoint.cli import main; main()"]
    arguments = words[1:]
    if arguments and not arguments[0].startswith("-"):
        assert arguments[0] in COMMANDS, f"{where}: shardpoint has no command {arguments[0]!r}"
        paths = [argument for argument in arguments[1:] if not argument.startswith("-")]
        assert paths, f"{where}: {shlex.join(words)} names no checkpoint or root"
        if not all((cwd / path).exists() for path in paths):
            helped = run([*program, arguments[0], "--help"], cwd)
            assert helped.returncode == 0, f"{where}: {helped.stderr}"
            unknown = [a for a in arguments if a.startswith("-") and a.partition("=")[0] not in helped.stdout]
            assert not unknown, f"{where}: {arguments[0]} has no option {unknown}"
            return
    done = run([*program, *arguments], cwd)
    assert done.returncode == 0, f"{where}: {shlex.join(words)} exits {done.returncode}\n{done.stdout}{done.stderr}"


def test_marks_are_known_and_reasoned() -> None:
    blocks = [block for blocks in DOCUMENTS.values() for block in blocks]
    odd = [
        f"{block.file}:{block.line}: {block.info}"
        for block in blocks
        if block.info not in {"python", "python no-run"} and re.match(r"py|Py", block.info)
    ]
    assert not odd, f"write `python` (or `python no-run`, with a place in the list): {odd}"
    unrun = {(block.file, block.body.splitlines()[0]) for block in blocks if block.info == "python no-run"}
    assert unrun == NO_RUN


def test_every_make_target_that_a_document_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = {
        word
        for blocks in DOCUMENTS.values()
        for block in blocks
        if block.info in {"console", "sh", "bash", "shell"}
        for words in console_lines(block, "make")
        for word in words[1:]
        if "=" not in word and not word.startswith("-")
    }
    assert not named - targets


def test_the_readme_shows_python_that_runs() -> None:
    assert [block for block in DOCUMENTS.get("README.md", []) if block.info == "python"]


def test_a_blocks_line_is_the_documents() -> None:
    text = (
        "# t\n\n```python\nx = 1\ny = 2\n```\n\n````markdown\n```python\nno\n```\n````\n```console\n$ make test\n```\n"
    )
    assert [(block.line, block.info) for block in blocks_of(text, "f")] == [
        (4, "python"),
        (9, "markdown"),
        (14, "console"),
    ]
