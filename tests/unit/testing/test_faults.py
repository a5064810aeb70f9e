from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardpoint.errors import StorageError
from shardpoint.storage import LocalStore, SyncPoint
from shardpoint.testing import Fault, FaultyStore


@pytest.fixture
def inner(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_the_nth_matching_operation_fails_and_does_not_happen(inner: LocalStore) -> None:
    store = FaultyStore(inner, [Fault("make_directory", path="a*", nth=2, errno=28)])
    store.make_directory("b")
    store.make_directory("a1")
    with pytest.raises(StorageError, match=r"make_directory of a2 .*No space left.*\(injected\)") as caught:
        store.make_directory("a2")
    assert (caught.value.errno, caught.value.key, caught.value.retryable) == (28, "a2", False)
    store.make_directory("a2")  # each fires once
    assert [entry.name for entry in inner.entries("")] == ["a1", "a2", "b"]


def test_every_operation_can_be_counted(inner: LocalStore) -> None:
    store = FaultyStore(inner)
    store.make_directory("d")
    store.create_file("d/f", 2)
    writer = store.open_writer("d/f")
    writer.write_at(b"xy", 0)
    writer.sync(SyncPoint.TENSOR_FILE)
    writer.close()
    reader = store.open_reader("d/f")
    reader.read_into(memoryview(bytearray(2)), 0)
    reader.read_vectors([memoryview(bytearray(1)), memoryview(bytearray(1))], 0)
    reader.close()
    store.write_document("d/g", b"", SyncPoint.DOCUMENT)
    store.read_bytes("d/g")
    store.sync_file("d/g", SyncPoint.DOCUMENT)
    store.sync_directory("d", SyncPoint.SUBDIRECTORY)
    store.replace_file("d/g", "d/f")
    store.make_directory("e")
    store.exchange("d", "e")
    store.rename("d", "c")
    lock = store.lock("lock")
    assert lock is not None
    lock.release()
    store.remove_directory("c")
    store.remove_tree("e")
    told = [op for op, _ in store.log]
    for nth in range(1, len(told) + 1):
        assert Fault("*", nth=nth).op == "*"
    assert told == [
        "make_directory", "create_file", "open_writer", "write", "sync", "close", "open_reader", "read", "read",
        "write_document", "read", "sync_file", "sync_directory", "replace_file", "make_directory", "exchange",
        "rename", "lock", "remove_directory", "remove_tree",
    ]  # fmt: skip
    assert Fault.__doc__ is not None
    assert all(f'"{op}"' in Fault.__doc__ for op in told)


def test_a_call_runs_and_goes_on(inner: LocalStore) -> None:
    seen: list[int] = []
    store = FaultyStore(inner, [Fault("*", nth=1, action="call", then=lambda: seen.append(1))])
    store.make_directory("a")
    store.make_directory("b")
    assert seen == [1]
    assert inner.exists("a")


def test_a_kill_is_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from shardpoint.storage import LocalStore\n"
        "from shardpoint.testing import Fault, FaultyStore\n"
        "store = FaultyStore(LocalStore(sys.argv[1]), [Fault('make_directory', nth=2, action='kill')])\n"
        "store.make_directory('a')\n"
        "store.make_directory('b')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert run.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
