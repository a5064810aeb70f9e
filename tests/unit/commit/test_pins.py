from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardpoint.catalog import training_checkpoints, verify_root
from shardpoint.commit import RootOwner, acquire_root, committed_checkpoints, is_pinned, pin, pinned_names, prune, unpin
from shardpoint.errors import NotFoundError, StorageError
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny


def names(store: LocalStore) -> list[str]:
    return sorted(item.name for item in committed_checkpoints(store))


def test_what_is_pinned_is_not_pruned_until_it_is_unpinned(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    tiny.save(store, owner, "b", 2)
    assert pinned_names(store) == frozenset()
    pin(store, "a")
    pin(store, "a")
    assert pinned_names(store) == {"a"}
    assert not prune(store, owner, "a")
    assert prune(store, owner, "b")
    assert names(store) == ["a"]
    assert [(info.name, info.is_pinned) for info in training_checkpoints(store)] == [("a", True)]
    unpin(store, "a")
    assert not is_pinned(store, "a")
    assert prune(store, owner, "a")
    assert names(store) == []


def test_a_pin_survives_the_owner_and_a_replacement_and_is_no_finding(store: LocalStore) -> None:
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    pin(store, "a")
    owner.release()
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 2)
    assert not prune(store, owner, "a")
    assert pinned_names(store) == {"a"}
    assert [(report.name, report.ok) for report in verify_root(store)] == [("a", True)]
    owner.release()


def test_a_root_that_no_run_owns_and_that_was_copied_without_its_control_directory(
    store: LocalStore, owner: RootOwner, tmp_path: Path
) -> None:
    tiny.save(store, owner, "a", 1)
    (tmp_path / "copy").mkdir()
    shutil.copytree(store.local_path("a"), tmp_path / "copy" / "a")
    copied = LocalStore(tmp_path / "copy")
    pin(copied, "a")
    second = acquire_root(copied)
    assert not prune(copied, second, "a")
    second.release()


@pytest.mark.parametrize("kind", ["absent", "directory", "file"])
def test_only_checkpoints_are_pinned(store: LocalStore, owner: RootOwner, kind: str) -> None:
    del owner
    if kind == "directory":
        store.make_directory("a")
    if kind == "file":
        Path(store.local_path("a")).write_text("mine")
    with pytest.raises(NotFoundError, match="nothing to pin"):
        pin(store, "a")
    with pytest.raises(NotFoundError, match="not pinned"):
        unpin(store, "a")


def test_a_pin_of_what_is_gone_can_be_taken_away(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    pin(store, "a")
    shutil.rmtree(store.local_path("a"))
    assert pinned_names(store) == {"a"}
    unpin(store, "a")
    assert pinned_names(store) == frozenset()


def test_pinned_while_it_is_being_pruned_it_comes_back(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    late = Fault("rename", "a", action="call", then=lambda: pin(store, "a"))
    assert not prune(FaultyStore(store, [late]), owner, "a")
    assert names(store) == ["a"]
    assert tiny.fill_of(Path(store.local_path("a"))) == 1


def test_who_pins_what_is_pruned_in_this_moment_is_told(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)

    def prune_it() -> None:
        assert prune(store, owner, "a")

    first = Fault("write_document", "*pins/a", action="call", then=prune_it)
    with pytest.raises(NotFoundError, match="nothing to pin"):
        pin(FaultyStore(store, [first]), "a")
    assert pinned_names(store) == frozenset()


def test_a_pin_is_durable_when_it_is_told(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    faulty = FaultyStore(store)
    pin(faulty, "a")
    changes = [(op, key) for op, key in faulty.log if op != "read"]
    at = changes.index(("write_document", ".shardpoint/pins/a"))
    assert changes[at + 1 :] == [("sync_directory", ".shardpoint/pins")]
    assert ("sync_directory", ".shardpoint") in changes[:at]
    with pytest.raises(StorageError):
        unpin(FaultyStore(store, [Fault("sync_directory", ".shardpoint/pins")]), "a")
