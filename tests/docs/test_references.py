"""Do the documents name things that are there: linked files, tests, and functions where they are said to be?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_code_blocks import FENCE
from tests.gates.sources import PACKAGE, ROOT

DOCUMENTS = sorted(
    [path for path in ROOT.glob("*.md") if path.name != "LICENSE"]
    + list((ROOT / "docs").rglob("*.md"))
    + list((ROOT / "changes").glob("*.md"))
    + [ROOT / "examples" / "README.md"]
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(tests/[\w./-]+)(?:::(\w+))?`")
# "`name` (place.py ..." or "`name`, place.py": a function, class or method, and its file relative to the package.
NAMED = re.compile(r"`(?:\w+\.)?(\w+)`[ \n]\(([\w/]+\.py)|`(?:\w+\.)?(\w+)`, ([\w/]+\.py)")


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_tests_exist(path: Path) -> None:
    text = prose(path)
    lost = [target for target in LINK.findall(text) if not (path.parent / target).exists()]
    for file, name in TEST.findall(text):
        if not (ROOT / file).exists():
            lost.append(file)
        elif name and f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8"):
            lost.append(f"{file}::{name}")
    assert not lost


def test_what_architecture_names_is_where_it_says() -> None:
    found = [
        (name or other, file or place) for name, file, other, place in NAMED.findall(prose(ROOT / "ARCHITECTURE.md"))
    ]
    assert len(found) > 20
    wrong = [
        f"{name} ({file})"
        for name, file in found
        if not re.search(rf"(def|class) {name}\b", (PACKAGE / file).read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_every_decision_is_in_the_list() -> None:
    adr = ROOT / "docs" / "adr"
    files = sorted(path.name for path in adr.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d[^)]*)\)", (adr / "README.md").read_text(encoding="utf-8")) == files
    numbers = [int(name[:4]) for name in files]
    assert numbers == list(range(1, len(files) + 1))
    for name in files:
        text = (adr / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {int(name[:4])}. ")
        assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
