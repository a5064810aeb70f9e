from __future__ import annotations

import errno
from pathlib import Path

import pytest

from shardpoint.storage import LocalStore, Store, syscalls
from shardpoint.testing import FaultyStore, StoreTests


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "some" / "root")


class TestLocalStoreWithoutRenameFlags(StoreTests):
    """As on NFS: renameat2 refuses every flag."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        def refuse(*_: object) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(syscalls, "renameat2", refuse)
        return LocalStore(tmp_path / "root")


class TestFaultyStoreWithoutFaults(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return FaultyStore(LocalStore(tmp_path / "root"))
