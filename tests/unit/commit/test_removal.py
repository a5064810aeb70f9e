from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardpoint.commit import RootOwner, acquire_root, committed_checkpoints, prune
from shardpoint.errors import NotFoundError, StorageError, UsageError
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny


def names(store: LocalStore) -> list[str]:
    return sorted(item.name for item in committed_checkpoints(store))


def test_a_pruned_checkpoint_is_gone(store: LocalStore, owner: RootOwner) -> None:
    for fill, name in enumerate("ab"):
        tiny.save(store, owner, name, fill)
    faulty = FaultyStore(store)
    prune(faulty, owner, "a")
    assert names(store) == ["b"]
    assert [op for op, _ in faulty.log if op != "read"] == ["rename", "sync_directory", "remove_tree"]
    assert not [entry.name for entry in store.entries(owner.key) if entry.is_directory]


@pytest.mark.parametrize("kind", ["absent", "directory", "file", "control"])
def test_only_committed_checkpoints_are_deleted(store: LocalStore, owner: RootOwner, kind: str) -> None:
    name = {"control": ".shardpoint"}.get(kind, "a")
    if kind == "directory":
        store.make_directory("a")
    if kind == "file":
        Path(store.local_path("a")).write_text("mine")
    with pytest.raises(NotFoundError):
        prune(store, owner, name)
    assert store.exists(name) == (kind != "absent")


@pytest.mark.parametrize("how", ["copy", "move", "link"])
def test_what_a_user_copied_moved_or_linked_is_theirs(store: LocalStore, owner: RootOwner, how: str) -> None:
    tiny.save(store, owner, "a", 1)
    source, target = Path(store.local_path("a")), Path(store.local_path("best"))
    if how == "copy":
        shutil.copytree(source, target)
    elif how == "move":
        source.rename(target)
    else:
        target.symlink_to("a")
    with pytest.raises(UsageError, match="committed as a"):
        prune(store, owner, "best")
    assert tiny.fill_of(target) == 1


def test_a_linked_checkpoint_is_unlinked_not_followed(store: LocalStore, owner: RootOwner, tmp_path: Path) -> None:
    tiny.save(store, owner, "a", 1)
    Path(store.local_path("a")).rename(tmp_path / "elsewhere")
    Path(store.local_path("a")).symlink_to(tmp_path / "elsewhere")
    prune(store, owner, "a")
    assert names(store) == []
    assert tiny.fill_of(tmp_path / "elsewhere") == 1


def test_a_replaced_version_does_not_come_back_when_its_successor_is_pruned(
    store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    tiny.save(store, owner, "a", 1)
    tiny.save(FaultyStore(store, [Fault("remove_tree")]), owner, "a", 2)  # the old one waits to be swept
    prune(store, owner, "a")
    assert names(store) == []
    owner.release()
    acquire_root(store)
    assert names(store) == []


@pytest.mark.parametrize("op", ["rename", "sync_directory", "remove_tree"])
def test_a_failed_prune_hides_all_or_nothing_and_is_swept(store: LocalStore, op: str) -> None:
    owner = acquire_root(store)
    for fill, name in enumerate("ab"):
        tiny.save(store, owner, name, fill)
    with pytest.raises(StorageError):
        prune(FaultyStore(store, [Fault(op)]), owner, "a")
    assert names(store) == (["a", "b"] if op == "rename" else ["b"])
    owner.release()
    owner = acquire_root(store)
    assert names(store) == (["a", "b"] if op == "rename" else ["b"])
    assert [entry.name for entry in store.entries(".shardpoint")] == ["inc-000002"]
    owner.release()


def test_pruning_again_what_a_user_restored(store: LocalStore, owner: RootOwner, tmp_path: Path) -> None:
    tiny.save(store, owner, "a", 1)
    shutil.copytree(store.local_path("a"), tmp_path / "backup")
    with pytest.raises(StorageError):
        prune(FaultyStore(store, [Fault("remove_tree")]), owner, "a")
    shutil.copytree(tmp_path / "backup", store.local_path("a"))
    prune(store, owner, "a")
    assert names(store) == []
