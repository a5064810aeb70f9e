from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardpoint.commit import RootOwner, acquire_root
from shardpoint.storage import LocalStore
from tests.unit.commit.run import Run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture
def owner(store: LocalStore) -> Iterator[RootOwner]:
    held = acquire_root(store)
    yield held
    held.release()


@pytest.fixture
def start_run(store: LocalStore, repo_root: Path) -> Iterator[Callable[[], Run]]:
    started: list[Run] = []

    def start() -> Run:
        started.append(Run(Path(store.location), repo_root))
        return started[-1]

    yield start
    for run in started:
        run.close()
