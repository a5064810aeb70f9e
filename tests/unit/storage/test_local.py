from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UsageError,
)
from shardpoint.storage import LocalStore, SyncPoint, local, syscalls, writer


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "root")
    store.make_root()
    return store


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "number,kind",
    [
        (errno.ENOENT, NotFoundError),
        (errno.ESTALE, NotFoundError),
        (errno.ENOTDIR, NotFoundError),
        (errno.EEXIST, AlreadyExistsError),
        (errno.ENOTEMPTY, AlreadyExistsError),
        (errno.EIO, StorageError),
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EROFS, StorageError),
        (errno.EACCES, StorageError),
        (errno.ENAMETOOLONG, StorageError),
    ],
)
def test_every_error_of_the_system_is_translated_once(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CheckpointError]
) -> None:
    store.create_file("f", 4)
    store.make_directory("d")
    monkeypatch.setattr(syscalls, "renameat2", failing(number))
    for name in ("open", "scandir", "lstat", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, failing(number))
    for call in (
        lambda: store.open_writer("f"),
        lambda: store.open_reader("f"),
        lambda: store.create_file("g", 4),
        lambda: store.entries("d"),
        lambda: store.make_directory("e"),
        lambda: store.remove_directory("d"),
        lambda: store.rename("f", "g"),
        lambda: store.exchange("f", "d"),
        lambda: store.sync_directory("d", SyncPoint.ROOT),
        lambda: store.write_document("h", b"", SyncPoint.DOCUMENT),
        lambda: store.lock("lock"),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value.__cause__, OSError)
        assert store.location in str(caught.value)
        if isinstance(caught.value, StorageError):
            assert caught.value.errno == number
            assert caught.value.key
            assert caught.value.op


def test_the_advice_is_in_the_message(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"create of x in .* failed: No space left on device \(free space"):
        store.create_file("x", 1)


def test_a_stat_that_fails_is_not_taken_for_absence(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "lstat", failing(errno.EIO))
    with pytest.raises(StorageError):
        store.exists("x")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOENT, errno.ESTALE])
def test_a_failed_fsync_is_final_whatever_its_number(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Not "not found": the commit would take that for a root that moved, and look at the name.
    store.create_file("f", 1)
    writer = store.open_writer("f")
    monkeypatch.setattr(os, "fsync", failing(number))
    syncs: list[Callable[[], object]] = [
        lambda: writer.sync(SyncPoint.TENSOR_FILE),
        lambda: store.sync_directory("", SyncPoint.ROOT),
        lambda: store.sync_file("f", SyncPoint.TENSOR_FILE),
        lambda: store.write_document("g", b"1", SyncPoint.MANIFEST),
    ]
    for sync in syncs:
        with pytest.raises(StorageError, match="fsync") as caught:
            sync()
        assert caught.value.retryable is False
    writer.close()


def test_a_file_that_lost_its_name_is_not_durable(store: LocalStore) -> None:
    store.create_file("f", 1)
    writer = store.open_writer("f")
    store.remove_tree("f")
    with pytest.raises(StorageError, match="deleted while"):
        writer.sync(SyncPoint.TENSOR_FILE)
    writer.close()


def test_an_error_on_closing_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_file("f", 1)
    writer = store.open_writer("f")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing(errno.EDQUOT))
        with pytest.raises(StorageError, match="close") as caught:
            writer.close()
    assert caught.value.retryable is False
    writer.close()  # closed once, whatever the system said


# -------------------------------------------------------------------------------------------------- reading and writing


def test_short_writes_and_reads_go_on(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:2]], offset))
    store.create_file("f", 12)
    writer = store.open_writer("f")
    writer.write_at(memoryview(b"abcdefgh").cast("H"), 2)
    writer.close()
    reader = store.open_reader("f")
    target = memoryview(bytearray(12))
    reader.read_into(target, 0)
    reader.close()
    assert bytes(target) == b"\0\0abcdefgh\0\0"


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_a_short_read_of_several_targets_goes_on_where_it_stopped(
    step: int, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        """Read at most `step` bytes."""
        room, given = step, []
        for view in views:
            given.append(view[:room])
            room -= len(given[-1])
        return preadv(descriptor, given, offset)

    monkeypatch.setattr(os, "preadv", short)
    store.write_document("f", b"0123456789", SyncPoint.DOCUMENT)
    reader = store.open_reader("f")
    targets = [memoryview(bytearray(length)) for length in (2, 0, 1, 4, 0)]
    reader.read_vectors(targets, 2)
    assert [bytes(target) for target in targets] == [b"23", b"", b"4", b"5678", b""]
    with pytest.raises(TruncatedError, match="ends at byte 10, 4 bytes early") as caught:
        reader.read_vectors([memoryview(bytearray(length)) for length in (3, 3)], 8)
    assert (caught.value.expected, caught.value.actual) == ("14", "10")
    reader.close()


def test_more_targets_than_one_call_takes(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 20
    store.write_document("f", data, SyncPoint.DOCUMENT)
    calls: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, views: list[memoryview], offset: int) -> int:
        calls.append(len(views))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    targets = [memoryview(bytearray(2)) for _ in range(2500)]
    reader = store.open_reader("f")
    reader.read_vectors(targets, 3)
    reader.close()
    assert b"".join(targets) == data[3:5003]
    assert calls == [1024, 1024, 452]


def test_a_write_without_progress_is_an_error_not_a_loop(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_file("f", 4)
    writer = store.open_writer("f")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(StorageError, match="no progress"):
        writer.write_at(b"abcd", 0)
    writer.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_is_told(store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store.create_file("f", 4)
    writer = store.open_writer("f")
    monkeypatch.setattr(os, "pwrite", failing(number))
    with pytest.raises(StorageError) as caught:
        writer.write_at(b"abcd", 0)
    assert (caught.value.op, caught.value.key, caught.value.errno) == ("pwrite", "f", number)
    writer.close()


def test_space_is_reserved_when_a_file_is_made(store: LocalStore) -> None:
    assert store.create_file("f", 1 << 20) is None
    assert Path(store.local_path("f")).stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("number", sorted(syscalls.UNSUPPORTED))
def test_without_fallocate_a_file_is_sized_and_a_note_says_so(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(number))
    note = store.create_file("f", 5)
    assert note is not None
    assert "fallocate" in note
    assert store.read_bytes("f") == bytes(5)
    assert store.create_file("empty", 0) is None


def test_a_full_disk_fails_when_the_file_is_made(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "fallocate", failing(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        store.create_file("f", 5)
    assert caught.value.errno == errno.ENOSPC


def test_a_really_full_filesystem(tmp_path: Path, repo_root: Path) -> None:
    code = (
        "import sys\n"
        "from shardpoint.errors import StorageError\n"
        "from shardpoint.storage import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "assert store.create_file('fits', 100_000) is None\n"
        "for size in (10_000_000, 1_000_000):\n"
        "    try:\n"
        "        store.create_file(f'f{size}', size)\n"
        "    except StorageError as error:\n"
        "        assert error.errno == 28, error\n"
        "        store.remove_tree(f'f{size}')\n"
        "    else:\n"
        "        sys.exit('no error')\n"
        "store.create_file('rest', 800_000)\n"
        "print('full')\n"
    )
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    (tmp_path / "tiny").mkdir()
    mount = f'mount -t tmpfs -o size=1000k tmpfs "{tmp_path}/tiny" || exit 77; exec "$0" "$@"'
    command = [unshare, "-Urm", "sh", "-c", mount, sys.executable, "-c", code, str(tmp_path / "tiny")]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    if (
        run.returncode in (1, 77)
        and "full" not in run.stdout
        and "unshare" in run.stderr + "unshare" * (run.returncode == 77)
    ):
        pytest.skip(f"cannot mount a tmpfs here: {run.stderr.strip()}")
    assert (run.stdout, run.returncode) == ("full\n", 0), run.stderr


# ------------------------------------------------------------------------------------------------------------- renames


@pytest.mark.parametrize("number", sorted({*syscalls.UNSUPPORTED, errno.EXDEV}))
def test_a_filesystem_that_cannot_exchange_says_so(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(syscalls, "renameat2", failing(number))
    assert store.exchange("a", "b") is False


@pytest.mark.parametrize("number", sorted(syscalls.UNSUPPORTED))
def test_without_flags_a_rename_still_never_replaces(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(syscalls, "renameat2", failing(number))
    store.make_directory("a")
    store.make_directory("empty")
    Path(store.local_path("dangling")).symlink_to("nowhere")
    for target in ("empty", "dangling"):
        with pytest.raises(AlreadyExistsError):
            store.rename("a", target)
    store.rename("a", "b")
    assert [entry.name for entry in store.entries("")] == ["b", "dangling", "empty"]


# --------------------------------------------------------------------------------------------------- the root and trees


def test_a_new_root_is_durable_up_to_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = writer.sync_descriptor

    def sync(descriptor: int, key: str, location: str, point: SyncPoint) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        assert point is SyncPoint.PARENT
        real(descriptor, key, location, point)

    monkeypatch.setattr(local, "sync_descriptor", sync)
    LocalStore(tmp_path / "a/b/c").make_root()
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")]


def test_a_root_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        LocalStore(tmp_path / "f")
    with pytest.raises(UsageError, match="is a file"):
        LocalStore(tmp_path / "f/x/y").make_root()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError):
        LocalStore(tmp_path / "dangling")


def test_a_linked_root_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = LocalStore(tmp_path / "link")
    store.make_root()
    store.make_directory("a")
    assert (tmp_path / "real/a").is_dir()


def test_a_deleted_link_leaves_what_it_points_to(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/m").write_text("")
    Path(store.local_path("link")).symlink_to(tmp_path / "kept")
    store.remove_tree("link", first="m")
    assert (tmp_path / "kept/m").exists()
    assert not store.exists("link")


def test_a_tree_into_which_somebody_writes_is_no_existing_target(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.make_directory("a")
    monkeypatch.setattr(shutil, "rmtree", failing(errno.ENOTEMPTY))
    with pytest.raises(StorageError, match="something else writes"):
        store.remove_tree("a")


def test_the_first_entry_goes_first(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.make_directory("a")
    for name in ("b", "m"):
        store.create_file(f"a/{name}", 0)
    monkeypatch.setattr(shutil, "rmtree", failing(errno.EIO))
    with pytest.raises(StorageError):
        store.remove_tree("a", first="m")
    assert [entry.name for entry in store.entries("a")] == ["b"]


# --------------------------------------------------------------------------------------------------------------- locks

HOLDER = (
    "import os, sys\n"
    "from shardpoint.storage import LocalStore\n"
    "lock = LocalStore(sys.argv[1]).lock('lock')\n"
    "assert lock is not None\n"
    "if sys.argv[2] == 'fork' and os.fork() == 0:\n"
    "    sys.stdin.readline()\n"  # as a DataLoader worker, it lives on with every descriptor of its parent
    "    os._exit(0)\n"
    "print('held', flush=True)\n"
    "sys.stdin.readline()\n"
)


def hold(store: LocalStore, repo_root: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, store.location, how]
    process = subprocess.Popen(command, cwd=repo_root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_lock_is_free_at_once_when_its_process_is_killed(store: LocalStore, repo_root: Path, how: str) -> None:
    process = hold(store, repo_root, how)
    assert store.lock("lock") is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock = store.lock("lock")
    assert lock is not None
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()  # ends the forked one
    process.stdout.close()
    lock.release()


def test_a_lock_survives_what_else_this_process_does(store: LocalStore, repo_root: Path) -> None:
    lock = store.lock("lock")
    assert lock is not None
    assert store.lock("lock") is None  # refused without opening it: closing any descriptor of it would free it
    assert LocalStore(store.location).lock("lock") is None
    Path(store.local_path("alias")).symlink_to("lock")
    assert store.lock("alias") is None
    store.create_file("other", 1)
    store.open_reader("other").close()
    taken = (
        "import sys\n"
        "from shardpoint.storage import LocalStore\n"
        "sys.exit(LocalStore(sys.argv[1]).lock('lock') is None)\n"
    )
    command = [sys.executable, "-c", taken, store.location]
    assert subprocess.run(command, cwd=repo_root, check=False).returncode == 1
    lock.release()
    assert subprocess.run(command, cwd=repo_root, check=False).returncode == 0


def test_a_filesystem_without_locks_is_an_error_that_says_what_to_do(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(errno.ENOSYS))
    with pytest.raises(StorageError, match="flock"):
        store.lock("lock")
    monkeypatch.undo()
    lock = store.lock("lock")
    assert lock is not None
    lock.release()
