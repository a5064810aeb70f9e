from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from tests.gates.sources import ROOT

# A file of this name would answer no question.
NO_QUESTION = {"utils", "util", "common", "core", "helpers", "helper", "misc"}

FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~$}])/(?:work|home|root|Users|tmp/sp)/"),
    "a package index": re.compile(r"pypi\.org|pythonhosted|download\.pytorch\.org|--(?:extra-)?index-url|--find-links"),
    "an emoji": re.compile("[\U0001f000-\U0001faff]"),
}


def repo_files() -> list[Path]:
    """Return what git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()})


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a binary file


def normal(name: str) -> str:
    """Spell a distribution's name as every other spelling of it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_names_a_machine_or_a_package_index() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {what}: {line.strip()[:100]}"
        for path in repo_files()
        if path != Path(__file__).resolve()
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        for what, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]
    assert not bad, "\n".join(bad)


def test_no_module_is_a_drawer() -> None:
    # compat/ gives modules their original import paths, `coati.utils` among them.
    bad = [
        str(path.relative_to(ROOT))
        for path in repo_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "compat"
        if NO_QUESTION & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not bad, f"name these after the question that they answer: {bad}"


def test_every_requirement_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    names = {normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted} - {"shardpoint"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    inexact = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin)]
    assert not inexact, "pin one exact version, without a local suffix, a URL or a range"
    assert not names - {normal(pin.partition("==")[0]) for pin in pins}


def test_every_ruff_ignore_and_dependency_gives_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    entry = re.compile(r'\s+"[A-Za-z0-9-]+(?:>=[0-9.]+)?",(?P<reason>\s+# \S.*)?')
    missing = [
        line
        for line in lines
        if (match := entry.fullmatch(line)) and not match["reason"] and re.search(r'"[A-Z]+[0-9]+"|>=', line)
    ]
    assert not missing, missing
