from __future__ import annotations

from tests.gates.sources import ROOT, package_files

MAX_LINES = 500


def test_no_file_of_the_package_is_longer_than_the_wall() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in package_files()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"a file answers one question in at most {MAX_LINES} lines; split these: {long}"
