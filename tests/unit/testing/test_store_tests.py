from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardpoint.errors import CheckpointError
from shardpoint.storage import DirectoryEntry, LocalStore, Store
from shardpoint.storage.local import LocalLock
from shardpoint.testing import StoreTests


class Replaces(LocalStore):
    def rename(self, source: str, target: str) -> None:
        Path(self.local_path(source)).replace(self.local_path(target))


class Unsorted(LocalStore):
    def entries(self, key: str) -> list[DirectoryEntry]:
        return super().entries(key)[::-1]


class Truncates(LocalStore):
    def open_writer(self, key: str) -> Any:
        Path(self.local_path(key)).write_bytes(b"")
        return super().open_writer(key)


class Shared(LocalStore):
    def lock(self, key: str) -> LocalLock | None:
        return super().lock(f"{key}{id(object())}{len(self.entries(''))}")


class HalfExchange(LocalStore):
    def exchange(self, first: str, second: str) -> bool:
        super().exchange(first, second)
        return False


class RemovesAll(LocalStore):
    def remove_directory(self, key: str) -> None:
        self.remove_tree(key)


class ForeignErrors(LocalStore):
    def read_bytes(self, key: str) -> bytes:
        return Path(self.local_path(key)).read_bytes()


class Escapes(LocalStore):
    def local_path(self, key: str) -> str:
        return f"{self.location}/{key}"


def failures(store_class: Callable[[Path], Store], directory: Path) -> set[str]:
    failed: set[str] = set()
    for name, test in inspect.getmembers(StoreTests, inspect.isfunction):
        if name.startswith("test_"):
            try:
                test(StoreTests(), store_class(directory / name))
            except (AssertionError, CheckpointError, OSError, ValueError):
                failed.add(name)
    return failed


def test_the_local_store_passes(tmp_path: Path) -> None:
    assert failures(LocalStore, tmp_path) == set()


@pytest.mark.parametrize(
    "broken", [Replaces, Unsorted, Truncates, Shared, HalfExchange, RemovesAll, ForeignErrors, Escapes]
)
def test_a_broken_store_fails(broken: Callable[[Path], Store], tmp_path: Path) -> None:
    assert failures(broken, tmp_path)
