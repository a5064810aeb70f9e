from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shardpoint.commit import (
    Attempt,
    RootOwner,
    acquire_root,
    committed_checkpoints,
    find_committed,
    publish,
    publish_file,
)
from shardpoint.container import layout_file
from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    CommitUnknownError,
    ManifestError,
    NotFoundError,
    StorageError,
)
from shardpoint.storage import LocalStore, SyncPoint
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny


@pytest.fixture(params=["exchange", "two"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two":
        monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    return str(request.param)


def fills(store: LocalStore) -> dict[str, int]:
    return {item.name: tiny.fill_of(Path(store.location) / item.key) for item in committed_checkpoints(store)}


def ready(store: FaultyStore | LocalStore, owner: RootOwner, name: str, fill: int) -> Attempt:
    attempt = tiny.open_attempt(store, owner, name)
    tiny.write_tensors(attempt, fill)
    return attempt


def commit(attempt: Attempt, fill: int) -> None:
    publish(attempt, tiny.documents(fill), tiny.manifest(attempt, fill))


def inside(store: LocalStore, owner: RootOwner) -> list[str]:
    return [entry.name for entry in store.entries(owner.key) if entry.is_directory]


def test_a_commit_shows_everything_and_leaves_nothing(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    assert fills(store) == {"a": 1}
    assert inside(store, owner) == []


def test_a_replacement_leaves_only_the_new(store: LocalStore, owner: RootOwner, renames: str) -> None:
    first = tiny.save(store, owner, "a", 1)
    second = tiny.save(store, owner, "a", 2)
    assert second.replaces == first.attempt_id
    assert fills(store) == {"a": 2}
    assert inside(store, owner) == [], renames


@pytest.mark.parametrize("renames", ["exchange", "two"], indirect=True)
@pytest.mark.parametrize("replacing", [False, True])
def test_the_order_of_syncs(store: LocalStore, owner: RootOwner, renames: str, replacing: bool) -> None:
    if replacing:
        tiny.save(store, owner, "a", 1)
    faulty = FaultyStore(store)
    attempt = ready(faulty, owner, "a", 2)
    start = len(faulty.log)
    commit(attempt, 2)
    key = attempt.key
    ops = [(op, path.removeprefix(key)) for op, path in faulty.log[start:] if op != "read"]
    visible = {
        (False, "exchange"): [("rename", "")],
        (False, "two"): [("rename", "")],
        (True, "exchange"): [("exchange", "")],
        (True, "two"): [("exchange", ""), ("rename", "a"), ("rename", "")],
    }[replacing, renames]
    assert (
        ops[:-1]
        == [
            ("write_document", "/running_states.json"),
            ("write_document", "/extra/note.json"),
            ("write_document", "/shardpoint.json"),
            ("sync_directory", "/modeling"),
            ("sync_directory", "/extra"),
            ("sync_directory", ""),
            *visible,
            ("sync_directory", ""),
            ("sync_directory", owner.key),
        ][: len(ops) - 1]
    )
    assert ops[-1][0] == ("remove_tree" if replacing else "sync_directory")


def test_an_error_at_any_operation_keeps_the_old_or_says_unknown(
    store: LocalStore, owner: RootOwner, renames: str
) -> None:
    tiny.save(store, owner, "a", 1)
    current, nth = 1, 0
    while True:
        nth += 1
        fill = current + 1
        faulty = FaultyStore(store, [Fault("*", nth=nth)])
        try:
            attempt = ready(faulty, owner, "a", fill)
        except StorageError:
            assert fills(store) == {"a": current}
            continue
        try:
            commit(attempt, fill)
        except CommitUnknownError as error:
            assert error.attempt_id == attempt.attempt_id  # noqa: PT017 - one of several outcomes
            assert fills(store) in ({"a": current}, {"a": fill})
        except StorageError as error:
            attempt.abandon(error)
            assert fills(store) == {"a": current}
        else:
            assert fills(store) == {"a": fill}
            if len(faulty.log) < nth:  # it did not fire
                current = fill
                break
        (current,) = fills(store).values()
    assert nth > 20, renames
    owner.release()
    acquire_root(store).release()
    assert fills(store) == {"a": current}


def test_what_could_not_be_deleted_is_a_note_and_the_commit_stands(
    store: LocalStore, owner: RootOwner, renames: str
) -> None:
    tiny.save(store, owner, "a", 1)
    attempt = ready(FaultyStore(store, [Fault("remove_tree")]), owner, "a", 2)
    commit(attempt, 2)
    assert "could not be deleted" in attempt.notes[-1]
    assert fills(store) == {"a": 2}, renames


def test_a_root_that_cannot_be_fsynced_is_unknown_and_the_old_is_kept(
    store: LocalStore, owner: RootOwner, renames: str
) -> None:
    tiny.save(store, owner, "a", 1)
    attempt = ready(FaultyStore(store, [Fault("sync_directory", path="")]), owner, "a", 2)
    with pytest.raises(CommitUnknownError, match=attempt.attempt_id):
        commit(attempt, 2)
    (kept,) = inside(store, owner)
    assert tiny.fill_of(Path(store.location) / owner.key / kept) == 1, renames


def test_after_an_exchange_a_manifest_that_cannot_be_read_is_unknown(store: LocalStore, owner: RootOwner) -> None:
    # Not an error that says "nothing was committed": the attempt's place now holds the old checkpoint.
    tiny.save(store, owner, "a", 1)
    faults: list[Fault] = []
    faulty = FaultyStore(store, faults)
    attempt = ready(faulty, owner, "a", 2)
    reads = sum(op == "read" for op, _ in faulty.log)
    attempt.store = FaultyStore(store, [Fault("read", path="a/shardpoint.json", nth=2)])
    assert reads == 1
    with pytest.raises(CommitUnknownError):
        commit(attempt, 2)
    assert fills(store) == {"a": 2}


def test_abandoning_after_an_exchange_does_not_delete_the_old(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)

    def interrupt() -> None:
        raise KeyboardInterrupt

    attempt = ready(
        FaultyStore(store, [Fault("sync_directory", path="", action="call", then=interrupt)]), owner, "a", 2
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        commit(attempt, 2)
    attempt.abandon(caught.value)
    assert tiny.fill_of(Path(store.local_path(attempt.key))) == 1


class Retransmitting(LocalStore):
    """A file server whose answer was lost: a rename is done, and reported as failed."""

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        if not source.startswith(".shardpoint/new-") and "fenced" not in target:
            raise NotFoundError("rename: the source does not exist")

    def replace_file(self, source: str, target: str) -> None:
        super().replace_file(source, target)
        raise NotFoundError("rename: the source does not exist")


def test_a_rename_that_was_done_but_reported_as_failed_is_a_commit(
    store: LocalStore, owner: RootOwner, renames: str
) -> None:
    lying = Retransmitting(store.location)
    tiny.save(lying, owner, "a", 1)
    tiny.save(lying, owner, "a", 2)
    assert fills(store) == {"a": 2}
    assert inside(store, owner) == [], renames


def test_a_file_that_was_moved_but_reported_as_not_is_unknown(store: LocalStore, owner: RootOwner) -> None:
    lying = Retransmitting(store.location)
    attempt = Attempt.open(lying, owner, "w", files={"w": layout_file([])}, replace_file=True)
    with pytest.raises(CommitUnknownError):
        publish_file(attempt, "w")


def test_a_manifest_that_no_reader_would_take_is_never_committed(store: LocalStore, owner: RootOwner) -> None:
    attempt = ready(store, owner, "a", 1)
    good = tiny.manifest(attempt, 1)
    bad = type(good)(**{name: getattr(good, name) for name in good.__struct_fields__} | {"files": [*good.files] * 2})
    with pytest.raises(ManifestError):
        publish(attempt, tiny.documents(1), bad)
    assert fills(store) == {}


def test_a_name_that_somebody_took_meanwhile_is_not_replaced(store: LocalStore, owner: RootOwner) -> None:
    attempt = ready(store, owner, "a", 1)
    store.make_directory("a")
    with pytest.raises(AlreadyExistsError):
        commit(attempt, 1)
    assert store.entries("a") == []


def test_a_replacement_that_fails_between_its_renames_is_undone(
    store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    tiny.save(store, owner, "a", 1)
    attempt = ready(FaultyStore(store, [Fault("rename", nth=2)]), owner, "a", 2)
    with pytest.raises(StorageError):
        commit(attempt, 2)
    assert fills(store) == {"a": 1}
    assert find_committed(store, "a") is not None
    assert store.exists("a")


def test_where_even_undoing_fails_readers_and_the_next_save_find_the_old(
    store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    tiny.save(store, owner, "a", 1)
    attempt = ready(FaultyStore(store, [Fault("rename", nth=2), Fault("rename", nth=3)]), owner, "a", 2)
    with pytest.raises(StorageError) as caught:
        commit(attempt, 2)
    attempt.abandon(caught.value)
    assert "the old checkpoint waits" in caught.value.__notes__[0]
    assert not store.exists("a")
    assert fills(store) == {"a": 1}
    tiny.save(store, owner, "a", 3)
    assert fills(store) == {"a": 3}
    assert inside(store, owner) == []


def test_a_file_replaces_a_file(store: LocalStore, owner: RootOwner) -> None:
    for text in (b"one", b"two"):
        layout = layout_file([("w", "U8", (3,))])
        attempt = Attempt.open(store, owner, "w.safetensors", files={"w": layout}, replace_file=True)
        writer = store.open_writer(f"{attempt.key}/w")
        writer.write_at(text, len(layout.header))
        writer.sync(SyncPoint.TENSOR_FILE)
        writer.close()
        publish_file(attempt, "w")
        assert store.read_bytes("w.safetensors").endswith(text)
    assert inside(store, owner) == []


def test_a_file_never_replaces_a_directory(store: LocalStore, owner: RootOwner) -> None:
    tiny.save(store, owner, "a", 1)
    store.make_directory("b")
    for name in ("a", "b"):
        with pytest.raises(AlreadyExistsError):
            Attempt.open(store, owner, name, files={"w": layout_file([])}, replace_file=True)
    attempt = Attempt.open(store, owner, "c", files={"w": layout_file([])}, replace_file=True)
    store.make_directory("c")
    with pytest.raises(CheckpointError):
        publish_file(attempt, "w")
    assert store.entries("c") == []


def test_a_reader_never_misses_a_step_that_is_being_replaced(store: LocalStore, owner: RootOwner, renames: str) -> None:
    tiny.save(store, owner, "a", 1)
    tiny.save(store, owner, "b", 1)
    stop, missed, listings = threading.Event(), [], 0

    def read() -> None:
        nonlocal listings
        while not stop.is_set():
            seen = {item.name for item in committed_checkpoints(store)}
            alone = find_committed(store, "a")
            if seen != {"a", "b"} or alone is None:
                missed.append((seen, alone))
            listings += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for fill in range(2, 80):
            tiny.save(store, owner, "a", fill)
    finally:
        stop.set()
        reader.join()
    assert not missed, (renames, missed[:3])
    assert listings > 20
