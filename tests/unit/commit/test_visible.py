from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shardpoint.commit import RootOwner, acquire_root, committed_checkpoints, find_committed, read_manifest
from shardpoint.errors import ChecksumError, NotFoundError, StorageError, TruncatedError
from shardpoint.storage import DirectoryEntry, LocalStore
from tests.crash import tiny


def test_the_order_is_that_of_the_commits_not_of_names_or_steps(store: LocalStore, owner: RootOwner) -> None:
    for name, step in (("z", 9), ("m", 12), ("a", 3)):
        tiny.save(store, owner, name, step)
    assert [item.name for item in committed_checkpoints(store)] == ["z", "m", "a"]
    tiny.save(store, owner, "z", 9)
    assert [item.name for item in committed_checkpoints(store)] == ["m", "a", "z"]


def test_foreign_things_are_no_checkpoints(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    root = Path(store.location)
    (root / "torn/modeling").mkdir(parents=True)
    (root / "file").write_text("x")
    (root / "dangling").symlink_to("nowhere")
    (root / "odd").mkdir()
    (root / "odd/shardpoint.json").mkdir()
    (root / "odd/shardpoint.json").rmdir()
    assert [item.name for item in committed_checkpoints(store)] == ["a"]
    for name in ("torn", "file", "dangling", "odd", "absent", ".shardpoint"):
        assert find_committed(store, name) is None


def test_a_damaged_manifest_is_listed_first_with_its_problem(store: LocalStore, owner: RootOwner) -> None:
    for name in "abc":
        tiny.save(store, owner, name, 1)
    root = Path(store.location)
    text = (root / "b/shardpoint.json").read_bytes()
    (root / "b/shardpoint.json").write_bytes(text[:-5])
    (root / "c/shardpoint.json").write_bytes(text.replace(b'"step": 1', b'"step": 2'))
    found = committed_checkpoints(store)
    assert [item.name for item in found] == ["b", "c", "a"]
    assert [type(item.problem) for item in found] == [TruncatedError, ChecksumError, type(None)]
    with pytest.raises(TruncatedError):
        read_manifest(store, "b")


def test_a_copy_is_shown_under_its_own_name(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    shutil.copytree(store.local_path("a"), store.local_path("copy"))
    assert [item.key for item in committed_checkpoints(store)] == ["a", "copy"]


def test_a_root_without_a_control_directory_is_read(store: LocalStore, owner: RootOwner, tmp_path: Path) -> None:
    tiny.save(store, owner, "a", 1)
    (tmp_path / "other").mkdir()
    shutil.copytree(store.local_path("a"), tmp_path / "other/a")
    assert [item.name for item in committed_checkpoints(LocalStore(tmp_path / "other"))] == ["a"]
    with pytest.raises(NotFoundError):
        committed_checkpoints(LocalStore(tmp_path / "absent"))


def test_lost_and_found_does_not_stop_a_run(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # mkfs makes it at the top of every ext volume, closed to all but the superuser.
    store.make_root()
    store.make_directory("lost+found")
    store.make_directory("private")
    real = Path.read_bytes
    closed = {"lost+found"}

    def read_bytes(path: Path) -> bytes:
        if path.parent.name in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    assert [item.name for item in committed_checkpoints(store)] == ["a"]
    # Of any other directory it cannot be told whether it is a checkpoint, so a listing would be a guess.
    closed.add("private")
    with pytest.raises(StorageError):
        committed_checkpoints(store)
    owner.release()


@pytest.mark.parametrize("absent_at", [0, 1])
def test_a_replacement_that_begins_and_ends_between_two_looks_is_not_missed(
    store: LocalStore, owner: RootOwner, absent_at: int
) -> None:
    tiny.save(store, owner, "a", 1)
    aside = f"{owner.key}/displaced-{'1' * 32}-{'2' * 32}"

    class Replacing(LocalStore):
        looks = 0

        def entries(self, key: str) -> list[DirectoryEntry]:
            self.looks += key == ""
            if key == "" and self.looks - 1 == absent_at:
                store.rename("a", aside)
                found = super().entries(key)
                store.rename(aside, "a")
                return found
            return super().entries(key)

        def read_bytes(self, key: str) -> bytes:
            if key == "a/shardpoint.json" and self.looks == 0:
                self.looks = 1
                raise NotFoundError("between the two renames")
            return super().read_bytes(key)

    assert [item.name for item in committed_checkpoints(Replacing(store.location))] == ["a"]
    assert find_committed(Replacing(store.location), "a") is not None
