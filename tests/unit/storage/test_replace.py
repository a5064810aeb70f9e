from __future__ import annotations

from pathlib import Path

import pytest

from shardpoint.errors import NotFoundError, StorageError
from shardpoint.storage import LocalStore, replace_document
from shardpoint.testing import Fault, FaultyStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.mark.parametrize("key", ["f.json", "d/f.json"])
def test_a_file_is_made_and_replaced(store: LocalStore, key: str) -> None:
    store.make_directory("d")
    for text in (b"one", b"second"):
        faulty = FaultyStore(store)
        replace_document(faulty, key, text)
        assert store.read_bytes(key) == text
        assert [op for op, _ in faulty.log] == ["write_document", "replace_file", "sync_directory"]
        assert faulty.log[-1][1] == key.rpartition("/")[0]
    assert len(store.entries(key.rpartition("/")[0])) == (2 if key == "f.json" else 1)


@pytest.mark.parametrize("op", ["write_document", "replace_file"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(store: LocalStore, op: str) -> None:
    replace_document(store, "f", b"old")
    with pytest.raises(StorageError):
        replace_document(FaultyStore(store, [Fault(op)]), "f", b"new")
    assert store.read_bytes("f") == b"old"
    assert [entry.name for entry in store.entries("")] == ["f"]


def test_what_cannot_be_tidied_up_is_told_on_the_error(store: LocalStore) -> None:
    with pytest.raises(StorageError, match="replace_file") as caught:
        replace_document(FaultyStore(store, [Fault("replace_file"), Fault("remove_tree")]), "f", b"new")
    assert "could not be deleted" in caught.value.__notes__[0]


def test_a_missing_directory_is_not_made(store: LocalStore) -> None:
    with pytest.raises(NotFoundError):
        replace_document(store, "d/f", b"")
