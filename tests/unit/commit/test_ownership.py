from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shardpoint.commit import RootOwner, acquire_root, committed_checkpoints, owned_root, ownership, prune, publish
from shardpoint.commit.ownership import fence
from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    FencedError,
    RootBusyError,
    StorageError,
)
from shardpoint.events import Event
from shardpoint.storage import LocalStore, SyncPoint, syscalls
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny
from tests.unit.commit.run import Run


def names(store: LocalStore) -> list[str]:
    return sorted(item.name for item in committed_checkpoints(store))


def control(store: LocalStore) -> list[str]:
    return sorted(entry.name for entry in store.entries(".shardpoint"))


def test_a_living_owner_keeps_others_out_and_a_killed_one_does_not(
    store: LocalStore, start_run: Callable[[], Run]
) -> None:
    run = start_run()
    assert run.ask("acquire") == "done"
    with pytest.raises(RootBusyError, match=rf"process {run.process.pid} on {socket.gethostname()}"):
        acquire_root(store)
    assert run.ask("save", "a", 1) == "done"
    run.kill()
    owner = acquire_root(store)
    assert owner.incarnation == 2
    assert names(store) == ["a"]
    assert control(store) == ["inc-000002"]
    owner.release()


def test_a_released_root_is_free_at_once(store: LocalStore, start_run: Callable[[], Run]) -> None:
    run = start_run()
    for _ in range(3):
        acquire_root(store).release()
        assert run.ask("acquire") == "done"
        with pytest.raises(RootBusyError):
            acquire_root(store)
        assert run.ask("release") == "done"


def test_one_process_shares_its_hold(store: LocalStore, start_run: Callable[[], Run]) -> None:
    first, second = acquire_root(store), acquire_root(LocalStore(store.location))
    assert first is second is owned_root(store)
    first.release()
    assert owned_root(store) is first
    tiny.save(store, second, "a", 1)
    run = start_run()
    assert run.ask("acquire")[0] == "RootBusyError"
    second.release()
    assert owned_root(store) is None
    assert run.ask("acquire") == "done"


def test_a_second_spelling_of_a_root_is_told_as_what_it_is(store: LocalStore, owner: RootOwner, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.location)
    with pytest.raises(RootBusyError, match="under another path"):
        acquire_root(LocalStore(tmp_path / "link"))
    tiny.save(store, owner, "a", 1)


def test_a_forked_child_owns_nothing_and_takes_nothing(store: LocalStore, repo_root: Path) -> None:
    code = (
        "import os, sys\n"
        "from shardpoint.commit import acquire_root\n"
        "from shardpoint.errors import RootBusyError\n"
        "from shardpoint.storage import LocalStore\n"
        "from tests.crash import tiny\n"
        "store = LocalStore(sys.argv[1])\n"
        "lock = acquire_root(store)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        acquire_root(store)\n"
        "    except RootBusyError:\n"
        "        lock.release()\n"  # what a forked Checkpointer's `with` would do
        "        os._exit(7)\n"
        "    os._exit(1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "print('forked', flush=True)\n"
        "sys.stdin.readline()\n"
        "tiny.save(store, lock, 'a', 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, store.location],
        cwd=repo_root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "forked\n"
        with pytest.raises(RootBusyError):
            acquire_root(store)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
    assert names(store) == ["a"]


@pytest.fixture
def asleep(store: LocalStore, monkeypatch: pytest.MonkeyPatch, start_run: Callable[[], Run]) -> RootOwner:
    """Own a root, then be taken over by a run on another machine, whose locks do not reach us: we do not hear of it."""
    monkeypatch.setattr(ownership, "kernel_id", lambda: "another-kernel")
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    owner._lock.release()
    run = start_run()
    assert run.ask("acquire", "this-kernel", 0.2) == "done"
    return owner


def test_a_counter_that_moves_is_a_living_owner(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, start_run: Callable[[], Run]
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(ownership, "kernel_id", lambda: "another-kernel")
    owner = acquire_root(store)
    owner._lock.release()  # as if the lock did not reach the other machine
    run = start_run()
    assert run.ask("acquire", "this-kernel", 30.0)[0] == "RootBusyError"
    tiny.save(store, owner, "a", 1)
    owner.release()
    assert run.ask("acquire", "this-kernel", 0.3) == "done"


def test_on_one_kernel_nobody_watches_a_counter(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, start_run: Callable[[], Run]
) -> None:
    run = start_run()
    assert run.ask("acquire") == "done"
    run.kill()
    monkeypatch.setattr(ownership, "_counter_moves", lambda *_: pytest.fail("watched"))
    acquire_root(store).release()


def test_a_fenced_run_can_do_nothing_more(store: LocalStore, asleep: RootOwner) -> None:
    for act in (
        lambda: tiny.save(store, asleep, "a", 2),
        lambda: tiny.save(store, asleep, "b", 2),
        lambda: prune(store, asleep, "a"),
        lambda: acquire_root(store),
    ):
        with pytest.raises(FencedError, match="took over"):
            act()
    assert names(store) == ["a"]
    assert tiny.fill_of(Path(store.location) / "a") == 1
    assert [entry.name for entry in store.entries("")] == [".shardpoint", "a"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_run_fenced_in_the_middle_of_a_save_commits_nothing(
    store: LocalStore,
    name: str,
    exchange: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    if not exchange:
        monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    attempt = tiny.open_attempt(store, owner, name)
    tiny.write_tensors(attempt, 2)
    fence(store, owner.incarnation)
    with pytest.raises(FencedError):
        publish(attempt, tiny.documents(2), tiny.manifest(attempt, 2))
    attempt.abandon(FencedError("as the engine does"))
    assert names(store) == ["a"]
    assert tiny.fill_of(Path(store.location) / "a") == 1
    owner.release()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("op", ["rename", "exchange"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_run_fenced_right_before_a_rename_is_told_so(
    store: LocalStore, exchange: bool, op: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(LocalStore, "exchange", lambda *_: False)
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    faulty = FaultyStore(store, [Fault(op, nth=nth, action="call", then=lambda: fence(store, owner.incarnation))])
    attempt = tiny.open_attempt(faulty, owner, "a")
    tiny.write_tensors(attempt, 2)
    fires = [("rename", False, 1), ("rename", False, 2), ("exchange", True, 1), ("exchange", False, 1)]
    if (op, exchange, nth) not in fires:
        publish(attempt, tiny.documents(2), tiny.manifest(attempt, 2))
        assert tiny.fill_of(Path(store.location) / "a") == 2
    else:
        with pytest.raises(FencedError):
            publish(attempt, tiny.documents(2), tiny.manifest(attempt, 2))
        (item,) = committed_checkpoints(store)
        assert (item.name, tiny.fill_of(Path(store.location) / item.key)) == ("a", 1)
    owner.release()
    again = acquire_root(store)
    assert names(store) == ["a"]
    again.release()


def test_a_run_that_lost_its_root_does_not_come_back_by_itself(store: LocalStore, asleep: RootOwner) -> None:
    # Even when the run that took the root is gone: two timelines would mix.
    with pytest.raises(FencedError):
        acquire_root(store)
    asleep.release()
    with pytest.raises(RootBusyError):
        acquire_root(store)  # held by the other run, which lives


def test_releasing_a_lost_hold_keeps_the_new_one(store: LocalStore) -> None:
    lost = acquire_root(store)
    fence(store, lost.incarnation)
    ownership._owners.clear()  # as after the last release
    fresh = acquire_root(store)
    lost.release()
    assert owned_root(store) is fresh
    fresh.release()
    assert owned_root(store) is None


@pytest.mark.parametrize("op", ["rename", "exchange"])
def test_a_commit_that_had_found_its_directory_before_the_fence_finds_nothing_in_it(store: LocalStore, op: str) -> None:
    # A descriptor of the incarnation stands for a rename(2) that is under way and has resolved its parent.
    owner = acquire_root(store)
    tiny.save(store, owner, "a", 1)
    attempt = tiny.open_attempt(store, owner, "b" if op == "rename" else "a")
    parent = os.open(store.local_path(owner.key), os.O_RDONLY)
    fence(store, owner.incarnation)
    name = attempt.key.rpartition("/")[2]
    target, flag = ("b", syscalls.RENAME_NOREPLACE) if op == "rename" else ("a", syscalls.RENAME_EXCHANGE)
    with pytest.raises(FileNotFoundError):
        syscalls.renameat2(f"/proc/self/fd/{parent}/{name}", store.local_path(target), flag)
    os.close(parent)
    assert names(store) == ["a"]
    owner.release()


ZOMBIE = """
import ctypes, os, sys
rename = ctypes.CDLL(None).renameat2
root = sys.argv[1].encode()
for line in sys.stdin:
    source, target = (root + b"/" + word.encode() for word in line.split())
    print("going", flush=True)
    count = 0
    while rename(-100, source, -100, target, 2) == 0:
        count += 1
    print(count, flush=True)
"""


def test_a_late_commit_never_lands_after_the_fence(store: LocalStore) -> None:
    # Another process commits by exchange as fast as it can: nearly always one is under way when it is fenced. The
    # fence does not wait for a disk here, which would give a late one time to land before anybody looks.
    class Quick(LocalStore):
        def sync_directory(self, key: str, point: SyncPoint) -> None:
            pass

    quick = Quick(store.location)
    store.make_root()
    for key in (".shardpoint", "a"):
        store.make_directory(key)
    process = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, store.location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    cut_short = 0
    for number in range(900000, 900300):
        attempt = f".shardpoint/inc-{number}/attempt"
        store.make_directory(attempt.rpartition("/")[0])
        store.make_directory(attempt)
        process.stdin.write(f"{attempt} a\n")
        process.stdin.flush()
        assert process.stdout.readline() == "going\n"
        fence(quick, number)
        fenced_at = Path(store.local_path("a")).stat().st_ino
        cut_short += int(process.stdout.readline()) > 0
        assert Path(store.local_path("a")).stat().st_ino == fenced_at
        store.remove_tree(f".shardpoint/fenced-{number}")
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0
    assert cut_short > 20, "the race was not run"


def test_of_several_contenders_exactly_one_wins(store: LocalStore, start_run: Callable[[], Run]) -> None:
    runs = [start_run() for _ in range(4)]
    for round_number in range(25):
        for run in runs:
            run.tell("acquire")
        answers = [run.answer() for run in runs]
        winners = [run for run, answer in zip(runs, answers, strict=True) if answer == "done"]
        assert len(winners) == 1, answers
        assert all(answer == "done" or answer[0] == "RootBusyError" for answer in answers), answers
        assert [name[:4] for name in control(store)] == ["inc-"]
        assert winners[0].ask("save", f"round-{round_number}", round_number) == "done"
        if round_number % 5 == 4:
            winners[0].kill()
            runs[runs.index(winners[0])] = start_run()
        else:
            assert winners[0].ask("release") == "done"
    assert len(names(store)) == 25


def test_a_contender_that_comes_late_with_an_old_number_withdraws(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, start_run: Callable[[], Run]
) -> None:
    # It listed the numbers, slept, and meanwhile a rival made the same number, was fenced, and its successor lives.
    run = start_run()
    acquire_root(store).release()
    real, first = ownership._new_incarnation, threading.Event()

    def late(inner: LocalStore, number: int) -> object:
        if not first.is_set():
            first.set()
            for _ in range(2):
                assert run.ask("acquire") == "done"
                assert run.ask("release") == "done"
            assert run.ask("acquire") == "done"
        return real(inner, number)

    monkeypatch.setattr(ownership, "_new_incarnation", late)
    with pytest.raises(RootBusyError):
        acquire_root(store)
    assert run.ask("save", "a", 1) == "done"
    assert len(control(store)) == 1


def test_every_dead_incarnation_is_fenced_not_only_the_newest(store: LocalStore) -> None:
    owner = acquire_root(store)
    store.make_directory(".shardpoint/inc-000007")
    owner.release()
    owner = acquire_root(store, watch_s=0.0)
    assert control(store) == ["inc-000008"]
    owner.release()


def test_a_fence_that_was_interrupted_is_finished(store: LocalStore) -> None:
    owner = acquire_root(store)
    attempt = tiny.open_attempt(store, owner, "a")
    owner.release()
    store.rename(owner.key, ".shardpoint/fenced-000001")
    seen: list[list[str]] = []

    def look(event: Event) -> None:
        if event.kind == "swept":
            seen.append([event.key])

    acquire_root(store, listener=look).release()
    assert seen == [[f".shardpoint/fenced-000001/{attempt.key.rpartition('/')[2]}.fenced"]]


def test_an_incarnation_without_its_documents_is_dead(store: LocalStore) -> None:
    for name in ("owner.json", "heartbeat"):
        owner = acquire_root(store)
        owner.release()
        store.remove_tree(f"{owner.key}/{name}")
        acquire_root(store, watch_s=0.0).release()


def test_a_control_directory_that_is_a_file_is_refused(store: LocalStore) -> None:
    store.make_root()
    Path(store.local_path(".shardpoint")).write_text("mine")
    with pytest.raises(AlreadyExistsError, match="is a file"):
        acquire_root(store)


def test_a_control_directory_that_cannot_be_read_is_an_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire_root(store).release()
    real = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/.shardpoint"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="permissions"):
        acquire_root(store)


def test_a_takeover_that_fails_gives_the_root_back(store: LocalStore) -> None:
    with pytest.raises(StorageError, match="injected"):
        acquire_root(FaultyStore(store, [Fault("sync_directory", nth=4)]))
    assert owned_root(store) is None
    acquire_root(store).release()


def test_a_counter_that_cannot_be_renewed_fails_the_next_save_until_it_can(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.005)
    broken, beaten = threading.Event(), threading.Semaphore(0)
    real = LocalStore.open_writer

    def open_writer(self: LocalStore, key: str) -> object:
        if key.endswith("heartbeat"):
            beaten.release()
            if broken.is_set():
                raise StorageError("pwrite failed", key=key, op="pwrite", errno=5)
        return real(self, key)

    monkeypatch.setattr(LocalStore, "open_writer", open_writer)

    def beats(count: int) -> None:
        for _ in range(count):
            assert beaten.acquire(timeout=30)

    owner = acquire_root(store)
    broken.set()
    beats(3)
    with pytest.raises(StorageError, match="counter"):
        tiny.save(store, owner, "a", 1)
    broken.clear()
    beats(3)
    tiny.save(store, owner, "a", 1)
    owner.release()


def test_the_heartbeat_ends_with_the_hold_and_with_the_fence(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.005)

    def beating() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "shardpoint-root-heartbeat"]

    before = set(beating())  # of other tests: they may end meanwhile
    owner = acquire_root(store)
    (thread,) = set(beating()) - before
    fence(store, owner.incarnation)
    thread.join(30)
    assert not thread.is_alive()
    owner.release()
    again = acquire_root(store)
    thread = beating()[-1]
    again.release()
    thread.join(30)
    assert not thread.is_alive()


def test_sequence_numbers_are_taken_once(owner: RootOwner) -> None:
    taken: list[int] = []
    threads = [
        threading.Thread(target=lambda: taken.extend(owner.take_sequence() for _ in range(500))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 2001))


def test_the_sequence_goes_on_where_the_last_commit_was(store: LocalStore) -> None:
    for expected in (1, 2, 3):
        owner = acquire_root(store)
        assert tiny.save(store, owner, f"s{expected}", expected).sequence == expected
        owner.release()


def test_errors_are_ours(store: LocalStore) -> None:
    Path(store.location).write_text("a file")
    with pytest.raises(CheckpointError):
        acquire_root(store)
