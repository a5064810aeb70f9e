from __future__ import annotations

import difflib
import re

import pytest

from tests.gates.sources import PACKAGE, ROOT

FIRST_LINE = "src/shardpoint/"
LINE = re.compile(r"(?P<indent>(?:  )+)(?P<name>[\w.]+/?)(?: {2,}(?P<comment>\S.*))?")


def told_tree(markdown: str) -> list[str]:
    """Read the paths out of the fenced block whose first line is `src/shardpoint/`.

    Each further line is one path component (a folder's ends in "/"), indented by two spaces for each level, then at
    least two spaces and a comment of one line.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if block.split(maxsplit=1)[:1] == [FIRST_LINE]]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        match = LINE.fullmatch(line.rstrip())
        assert match, f"not a line of the tree: {line!r}"
        assert match["comment"], f"say in a word what it is: {line!r}"
        depth = len(match["indent"]) // 2 - 1
        assert depth <= len(folders), f"indented too far: {line!r}"
        del folders[depth:]
        name = match["name"]
        paths.append("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    return paths


def real_tree() -> list[str]:
    """List the package's files and folders. A folder's line speaks for its `__init__.py` too."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    told = {path for path in files if path.name != "__init__.py" or path.parent == PACKAGE}
    folders = {path.parent for path in files} - {PACKAGE}
    return [path.relative_to(PACKAGE).as_posix() for path in told] + [
        path.relative_to(PACKAGE).as_posix() + "/" for path in folders
    ]


def test_the_tree_in_architecture_is_the_tree_of_the_files() -> None:
    told = told_tree((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    difference = list(
        difflib.unified_diff(sorted(told), sorted(real_tree()), "ARCHITECTURE.md", "files", lineterm="", n=1)
    )
    assert not difference, "the tree in ARCHITECTURE.md is not the files':\n" + "\n".join(difference)


EXAMPLE = """
```python
x = 1
```
```
src/shardpoint/
  __init__.py      the public names
  storage/         bytes
    local.py       a local file system
  errors.py        the errors
```
"""


def test_the_reader_of_the_tree() -> None:
    assert told_tree(EXAMPLE) == ["__init__.py", "storage/", "storage/local.py", "errors.py"]


@pytest.mark.parametrize("line", ["  bare.py", "   odd.py  x", "        deep.py  x", "  a b.py  x"])
def test_the_reader_refuses(line: str) -> None:
    with pytest.raises(AssertionError):
        told_tree(f"```\nsrc/shardpoint/\n{line}\n```\n")
