from __future__ import annotations

import errno
from pathlib import Path

import pytest

from shardpoint.commit import Attempt, RootOwner, acquire_root, committed_checkpoints
from shardpoint.commit.attempt import MAX_NAME_BYTES
from shardpoint.commit.ownership import fence
from shardpoint.errors import AlreadyExistsError, FencedError, NotFoundError, StorageError, UsageError
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\0b", ".shardpoint", ".shardpoint-old", "n" * 201, "\u00fc" * 101]
)
def test_names_that_cannot_be_committed(store: LocalStore, owner: RootOwner, name: str) -> None:
    with pytest.raises(UsageError):
        Attempt.open(store, owner, name)
    assert all(not entry.is_directory for entry in store.entries(owner.key))


def test_the_longest_name_can_be_saved_left_torn_and_taken_over(store: LocalStore) -> None:
    name = "n" * MAX_NAME_BYTES
    owner = acquire_root(store)
    tiny.save(store, owner, name, 1)
    tiny.open_attempt(store, owner, name)  # torn
    owner.release()
    owner = acquire_root(store)
    assert [item.name for item in committed_checkpoints(store)] == [name]
    owner.release()


def test_headers_and_sizes_are_there_before_any_rank_writes(store: LocalStore, owner: RootOwner) -> None:
    attempt = tiny.open_attempt(store, owner, "a")
    assert attempt.directories == ["extra", "modeling"]
    assert attempt.notes == []
    data = store.read_bytes(f"{attempt.key}/{tiny.PATH}")
    assert data == tiny.layout().header + bytes(tiny.NUM_BYTES)


@pytest.mark.parametrize("kind", ["directory", "torn", "file", "link"])
def test_what_is_not_ours_is_refused_and_left(store: LocalStore, owner: RootOwner, kind: str) -> None:
    path = Path(store.local_path("a"))
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if kind == "torn":
            (path / "model.safetensors").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="not a committed"):
        tiny.open_attempt(store, owner, "a")
    assert path.is_symlink() or path.exists()


def test_a_name_that_is_taken_while_the_old_checkpoint_waits_aside_is_refused_at_once(
    store: LocalStore, owner: RootOwner
) -> None:
    tiny.save(store, owner, "a", 1)
    store.rename("a", f"{owner.key}/displaced-{'1' * 32}-{'2' * 32}")
    store.make_directory("a")
    with pytest.raises(AlreadyExistsError):
        tiny.open_attempt(store, owner, "a")


def test_a_full_disk_fails_before_a_byte_moved_and_leaves_nothing(store: LocalStore, owner: RootOwner) -> None:
    for op in ("create_file", "make_directory", "open_writer", "write", "close"):
        with pytest.raises(StorageError) as caught:
            tiny.open_attempt(FaultyStore(store, [Fault(op, nth=1, errno=errno.ENOSPC)]), owner, "a")
        assert caught.value.errno == errno.ENOSPC
        assert not [entry.name for entry in store.entries(owner.key) if entry.is_directory]


def test_an_attempt_that_cannot_be_deleted_says_so_on_the_error(store: LocalStore, owner: RootOwner) -> None:
    with pytest.raises(StorageError) as caught:
        tiny.open_attempt(FaultyStore(store, [Fault("create_file"), Fault("remove_tree")]), owner, "a")
    assert "could not be deleted" in caught.value.__notes__[0]


@pytest.mark.parametrize("op", ["make_directory", "create_file", "open_writer"])
def test_opening_while_the_root_is_lost_is_a_fenced_error(store: LocalStore, op: str) -> None:
    owner = acquire_root(store)
    fault = Fault(op, action="call", then=lambda: fence(store, owner.incarnation))
    with pytest.raises(FencedError):
        tiny.open_attempt(FaultyStore(store, [fault]), owner, "a")
    owner.release()


def test_an_abandoned_attempt_loses_its_manifest_first(store: LocalStore, owner: RootOwner) -> None:
    # A death in the middle must not leave a manifest that makes it look finished.
    attempt = tiny.open_attempt(store, owner, "a")
    store.make_directory(f"{attempt.key}/shardpoint.json.d")
    seen: list[str | None] = []

    class Watching(LocalStore):
        def remove_tree(self, key: str, *, first: str | None = None) -> None:
            seen.append(first)
            super().remove_tree(key, first=first)

    attempt.store = Watching(store.location)
    attempt.abandon(NotFoundError("for a test"))
    attempt.abandon(NotFoundError("a second time"))
    assert seen == ["shardpoint.json"]
