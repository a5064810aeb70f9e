from __future__ import annotations

import ast

from tests.gates.sources import PACKAGE, package_files, place, references

SYNCS = {"os.fsync", "os.fdatasync", "os.sync"}


def test_durability_is_decided_in_storage_only() -> None:
    bad = [
        f"{place(path, node)}: {name}"
        for path in package_files()
        if not path.is_relative_to(PACKAGE / "storage")
        for name, node in references(ast.parse(path.read_text(encoding="utf-8")))
        if name in SYNCS
    ]
    assert not bad, "only shardpoint/storage may sync:\n" + "\n".join(bad)


def test_storage_does_sync() -> None:
    found = {
        name
        for path in sorted((PACKAGE / "storage").rglob("*.py"))
        for name, _ in references(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found & SYNCS
