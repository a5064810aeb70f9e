from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardpoint.commit import acquire_root, committed_checkpoints
from shardpoint.commit.recovery import discard_fresh
from shardpoint.errors import StorageError
from shardpoint.events import Event
from shardpoint.storage import LocalStore, SyncPoint
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny

OTHER = "f" * 32


def fills(store: LocalStore) -> dict[str, int]:
    return {item.name: tiny.fill_of(Path(store.location) / item.key) for item in committed_checkpoints(store)}


def interrupted(store: LocalStore, *, whole: bool = True) -> None:
    """Leave what a death between the two renames leaves: the name absent, the old aside, the new an attempt."""
    owner = acquire_root(store)
    old = tiny.save(store, owner, "a", 1)
    attempt = tiny.open_attempt(store, owner, "a")
    tiny.write_tensors(attempt, 2)
    for path, data in tiny.documents(2).items():
        Path(store.local_path(f"{attempt.key}/{path}")).write_bytes(data)
    if whole:
        from shardpoint.manifest import encode_manifest

        Path(store.local_path(f"{attempt.key}/shardpoint.json")).write_bytes(encode_manifest(tiny.manifest(attempt, 2)))
    store.rename("a", f"{owner.key}/displaced-{old.attempt_id}-{attempt.attempt_id}")
    owner.release()


def recover(store: LocalStore) -> list[str]:
    events: list[Event] = []
    acquire_root(store, listener=events.append).release()
    return [event.kind for event in events]


def test_a_whole_successor_goes_forward(store: LocalStore) -> None:
    interrupted(store)
    assert fills(store) == {"a": 1}
    assert recover(store) == ["recovered"]
    assert fills(store) == {"a": 2}
    assert recover(store) == []


def test_a_torn_successor_goes_back(store: LocalStore) -> None:
    interrupted(store, whole=False)
    assert recover(store) == ["recovered", "swept"]
    assert fills(store) == {"a": 1}


def test_of_two_finished_attempts_the_one_that_was_on_its_way_goes_forward(store: LocalStore) -> None:
    # An attempt whose commit failed and could not be deleted is whole too, and was reported as not committed.
    owner = acquire_root(store)
    old = tiny.save(store, owner, "a", 1)
    from shardpoint.manifest import encode_manifest

    attempts = []
    for fill in (7, 2):
        attempt = tiny.open_attempt(store, owner, "a")
        tiny.write_tensors(attempt, fill)
        for path, data in tiny.documents(fill).items():
            Path(store.local_path(f"{attempt.key}/{path}")).write_bytes(data)
        Path(store.local_path(f"{attempt.key}/shardpoint.json")).write_bytes(
            encode_manifest(tiny.manifest(attempt, fill))
        )
        attempts.append(attempt)
    for chosen in attempts:
        if chosen is attempts[1]:
            store.rename("a", f"{owner.key}/displaced-{old.attempt_id}-{chosen.attempt_id}")
    owner.release()
    recover(store)
    assert fills(store) == {"a": 2}


def test_of_two_displaced_versions_the_newer_one_counts(store: LocalStore) -> None:
    owner = acquire_root(store)
    kept = []
    for fill in (1, 2):
        attempt = tiny.save(store, owner, "a", fill)
        # The older one sorts last, and first: neither order decides.
        kept.append((attempt, f"{owner.key}/displaced-{'f0'[fill - 1] * 32}-{OTHER}"))
        store.rename("a", kept[-1][1])
    assert fills(store) == {"a": 2}
    owner.release()
    recover(store)
    assert fills(store) == {"a": 2}
    assert store.exists("a")
    recover(store)
    assert fills(store) == {"a": 2}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_name_that_something_else_took_is_left_and_the_old_stays_readable(store: LocalStore, kind: str) -> None:
    interrupted(store)
    path = Path(store.local_path("a"))
    if kind == "directory":
        path.mkdir()
    else:
        path.write_text("mine")
    for _ in range(3):
        assert recover(store) in ([], ["swept"])
        assert fills(store) == {"a": 1}
    assert path.exists()
    path.rmdir() if kind == "directory" else path.unlink()
    recover(store)
    assert fills(store) == {"a": 1}
    assert store.exists("a")


def damage(store: LocalStore, how: str) -> None:
    (old,) = Path(store.location).glob(".shardpoint/*/displaced-*/shardpoint.json")
    text = old.read_text()
    if how == "damaged":
        old.write_text(text[:-40])
        return
    from shardpoint.checksum import crc64, to_hex

    newer = json.loads(text)
    newer["version"] = [9, 0]
    body = text.replace('"version": [1,1]', '"version": [9,0]').rpartition('"manifest_crc64nvme": "')[0]
    body += '"manifest_crc64nvme": "'
    assert "[9,0]" in body
    old.write_text(body + f'{to_hex(crc64(body.encode()))}"\n}}\n')


@pytest.mark.parametrize("how", ["damaged", "newer"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_displaced_checkpoint_that_we_cannot_read_is_kept_unless_replaced(
    store: LocalStore, how: str, whole: bool
) -> None:
    interrupted(store, whole=whole)
    damage(store, how)
    for _ in range(3):
        recover(store)
    left = list(Path(store.location).glob(".shardpoint/*/displaced-*"))
    if whole:
        assert fills(store) == {"a": 2}
        assert left == []
    else:
        assert fills(store) == {}
        assert len(left) == 1
        assert (left[0] / tiny.PATH).exists()


def test_a_displaced_copy_whose_name_holds_a_damaged_one_is_kept(store: LocalStore) -> None:
    owner = acquire_root(store)
    old = tiny.save(store, owner, "a", 1)
    store.rename("a", f"{owner.key}/displaced-{old.attempt_id}-{OTHER}")
    tiny.save(store, owner, "b", 2)
    store.rename("b", "a")
    Path(store.local_path("a/shardpoint.json")).write_text("{}")
    owner.release()
    recover(store)
    assert len(list(Path(store.location).glob(".shardpoint/*/displaced-*"))) == 1


def test_what_lands_in_a_fenced_directory_during_the_sweep_is_not_lost(store: LocalStore) -> None:
    # A rename that was under way when its run was fenced may land after the sweep has listed the directory.
    owner = acquire_root(store)
    old = tiny.save(store, owner, "a", 1)
    tiny.open_attempt(store, owner, "b")
    owner.release()

    class Late(LocalStore):
        landed = False

        def land(self, key: str) -> None:
            if key == ".shardpoint/fenced-000001" and not self.landed:
                self.landed = True
                store.rename("a", f"{key}/displaced-{old.attempt_id}-{OTHER}")

        def remove_directory(self, key: str) -> None:
            self.land(key)
            super().remove_directory(key)

        def remove_tree(self, key: str, *, first: str | None = None) -> None:
            self.land(key)
            super().remove_tree(key, first=first)

    acquire_root(Late(store.location)).release()
    assert fills(store) == {"a": 1}
    recover(store)
    assert store.exists("a")


def test_nothing_is_deleted_before_the_root_is_durable(store: LocalStore) -> None:
    acquire_root(store).release()
    interrupted(store)
    with pytest.raises(StorageError):
        acquire_root(FaultyStore(store, [Fault("sync_directory", path="")]))
    assert len(list(Path(store.location).glob(".shardpoint/*/displaced-*"))) == 1


def test_foreign_things_below_the_control_directory_are_left(store: LocalStore) -> None:
    acquire_root(store).release()
    for name in ("notes", "inc-7", "fenced-x", "new-1"):
        store.make_directory(f".shardpoint/{name}")
    recover(store)
    assert len([entry for entry in store.entries(".shardpoint") if entry.name != "inc-000002"]) == 4


def test_an_incarnation_that_never_came_to_life_is_swept(store: LocalStore) -> None:
    acquire_root(store).release()
    fresh, living = (f".shardpoint/new-{digit * 32}" for digit in "ab")
    for key in (fresh, living):
        store.make_directory(key)
    lock = store.lock(f"{living}/lock")  # its maker is about to finish it
    assert lock is not None
    recover(store)
    assert not store.exists(fresh)
    assert store.exists(living)
    lock.release()
    recover(store)
    assert not store.exists(living)


def test_an_incarnation_that_comes_to_life_while_it_is_swept_is_no_error(store: LocalStore) -> None:
    acquire_root(store).release()
    fresh = f".shardpoint/new-{'a' * 32}"
    store.make_directory(fresh)
    fault = Fault("lock", path=f"{fresh}/lock", action="call", then=lambda: store.rename(fresh, ".shardpoint/moved"))
    acquire_root(FaultyStore(store, [fault])).release()
    assert store.exists(".shardpoint/moved")


def test_a_maker_and_a_sweeper_may_delete_one_incarnation_at_once(store: LocalStore) -> None:
    store.make_root()
    store.make_directory(".shardpoint")
    store.make_directory(".shardpoint/new-0")
    store.write_document(".shardpoint/new-0/lock", b"", SyncPoint.DOCUMENT)

    class Raced(FaultyStore):
        """Between the deletion of the files and that of the directory the other one makes the lock again."""

        def remove_tree(self, key: str, *, first: str | None = None) -> None:
            rmdir = os.rmdir

            def late(path: Any, *, dir_fd: int | None = None) -> None:
                store.write_document(f"{key}/lock", b"", SyncPoint.DOCUMENT)
                rmdir(path, dir_fd=dir_fd)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "rmdir", late)
                super().remove_tree(key, first=first)

    discard_fresh(Raced(store), ".shardpoint/new-0")
    assert store.exists(".shardpoint/new-0/lock"), "the race was not run"
    discard_fresh(store, ".shardpoint/new-0")
    assert not store.exists(".shardpoint/new-0")
    discard_fresh(store, ".shardpoint/new-0")
