"""What every store must do: a suite that a store's author runs by subclassing it in a test module.

class TestMyStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return MyStore(tmp_path / "root")
"""

from __future__ import annotations

import threading

from shardpoint.errors import AlreadyExistsError, CheckpointError, NotFoundError, TruncatedError, UsageError
from shardpoint.storage import Store, SyncPoint


def _refuses(kind: type[CheckpointError], operation: str, store: Store, *arguments: object) -> None:
    try:
        getattr(store, operation)(*arguments)
    except kind:
        return
    raise AssertionError(f"{operation}{arguments} did not raise {kind.__name__}")


def _expect(held: object, what: str) -> None:
    if not held:
        raise AssertionError(what)


class StoreTests:
    """The conformance suite; a subclass supplies the fixture `store`, an empty store whose root is not made yet."""

    def test_make_root_twice(self, store: Store) -> None:
        """A root may be there already."""
        store.make_root()
        store.make_root()
        _expect(store.entries("") == [], "a new root is empty")

    def test_missing_things_are_not_found(self, store: Store) -> None:
        """Each reading operation says so."""
        store.make_root()
        for operation in (
            "read_bytes",
            "open_reader",
            "open_writer",
            "size_bytes",
            "entries",
            "remove_tree",
            "remove_directory",
        ):
            _refuses(NotFoundError, operation, store, "absent")
        store.make_directory("here")
        for source, target in (("absent", "elsewhere"), ("here", "absent/elsewhere")):
            _refuses(NotFoundError, "rename", store, source, target)
        if self._exchanges(store):
            _refuses(NotFoundError, "exchange", store, "absent", "here")
        _refuses(NotFoundError, "replace_file", store, "absent", "elsewhere")
        _refuses(NotFoundError, "create_file", store, "absent/file", 1)
        _refuses(NotFoundError, "write_document", store, "absent/file", b"", SyncPoint.DOCUMENT)
        _refuses(NotFoundError, "sync_directory", store, "absent", SyncPoint.ROOT)
        _refuses(NotFoundError, "sync_file", store, "absent", SyncPoint.TENSOR_FILE)
        _refuses(NotFoundError, "lock", store, "absent/lock")
        _expect(not store.exists("absent"), "absent does not exist")

    @staticmethod
    def _exchanges(store: Store) -> bool:
        for name in ("one", "other"):
            store.make_directory(name)
        return store.exchange("one", "other")

    def test_keys_stay_inside_the_root(self, store: Store) -> None:
        """A key that leads out of the root, or that no file can have, is a mistake of the caller."""
        store.make_root()
        for key in ("../x", "a/../../x", "/etc", "a//b", "./a", "a/", "a\0b"):
            for operation in ("read_bytes", "exists", "make_directory", "local_path"):
                _refuses(UsageError, operation, store, key)

    def test_directories(self, store: Store) -> None:
        """One level at a time, never twice, listed by name."""
        store.make_root()
        store.make_directory("b")
        store.make_directory("b/c")
        store.make_directory("a")
        _refuses(AlreadyExistsError, "make_directory", store, "a")
        _refuses(NotFoundError, "make_directory", store, "x/y")
        listed = [(entry.name, entry.is_directory) for entry in store.entries("")]
        _expect(listed == [("a", True), ("b", True)], f"directories are listed by name: {listed}")
        store.create_file("A", 0)
        listed = [(entry.name, entry.is_directory) for entry in store.entries("")]
        _expect(listed == [("A", False), ("a", True), ("b", True)], f"files are told from directories: {listed}")
        _expect(store.exists("") and store.exists("A") and store.exists("b/c"), "files and directories exist")
        _refuses(AlreadyExistsError, "remove_directory", store, "b")
        store.remove_directory("b/c")
        store.remove_directory("b")
        _expect(not store.exists("b"), "an empty directory goes")

    def test_writes_at_offsets(self, store: Store) -> None:
        """A created file has its size, reads as zeros, and keeps what is written where it is written."""
        store.make_root()
        store.create_file("f", 10)
        _refuses(AlreadyExistsError, "create_file", store, "f", 10)
        _expect(store.size_bytes("f") == 10, "the size is given on creation")  # noqa: PLR2004 - as created
        first, second = store.open_writer("f"), store.open_writer("f")
        second.write_at(b"yz", 8)
        first.write_at(memoryview(b"abc"), 1)
        for writer in (first, second):
            writer.sync(SyncPoint.TENSOR_FILE)
            writer.close()
        _expect(store.read_bytes("f") == b"\0abc\0\0\0\0yz", "bytes are where they were written")
        store.create_file("empty", 0)
        writer = store.open_writer("empty")
        writer.write_at(b"", 0)
        writer.sync(SyncPoint.TENSOR_FILE)
        writer.close()
        writer.close()
        _expect(store.read_bytes("empty") == b"", "a file without bytes is a file")

    def test_writers_share_a_file(self, store: Store) -> None:
        """Several threads write disjoint ranges through one writer, and none of them is lost."""
        store.make_root()
        size, count = 3000, 8
        store.create_file("f", size * count)
        writer = store.open_writer("f")
        threads = [
            threading.Thread(target=writer.write_at, args=(bytes([index]) * size, index * size))
            for index in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.sync(SyncPoint.TENSOR_FILE)
        writer.close()
        _expect(store.read_bytes("f") == b"".join(bytes([index]) * size for index in range(count)), "nothing is lost")

    def test_reads_at_offsets(self, store: Store) -> None:
        """A read fills its target or says that the file is short."""
        store.make_root()
        store.write_document("f", b"0123456789", SyncPoint.DOCUMENT)
        _refuses(AlreadyExistsError, "write_document", store, "f", b"", SyncPoint.DOCUMENT)
        reader = store.open_reader("f")
        target = bytearray(4)
        reader.read_into(memoryview(target), 3)
        _expect(bytes(target) == b"3456" and reader.size_bytes == 10, "a read is exact")  # noqa: PLR2004 - as written
        try:
            reader.read_into(memoryview(target), 8)
        except TruncatedError:
            pass
        else:
            raise AssertionError("a read behind the end did not raise TruncatedError")
        finally:
            reader.close()

    def test_reads_into_several_targets(self, store: Store) -> None:
        """Consecutive bytes go to one target after another, however many there are and whatever their lengths."""
        store.make_root()
        data = bytes(range(256)) * 16
        store.write_document("f", data, SyncPoint.DOCUMENT)
        reader = store.open_reader("f")
        lengths = [5, 0, 1, 1000, *([1] * 2500), 7]
        targets = [memoryview(bytearray(length)) for length in lengths]
        reader.read_vectors(targets, 3)
        _expect(b"".join(targets) == data[3 : 3 + sum(lengths)], "each target has its bytes")
        reader.read_vectors([], 0)
        reader.read_vectors([memoryview(bytearray(0))], len(data))
        scrap = memoryview(bytearray(4))
        first, second = memoryview(bytearray(2)), memoryview(bytearray(2))
        reader.read_vectors([first, scrap, scrap[:2], second], 0)
        _expect(bytes(first) + bytes(second) == data[:2] + data[8:10], "two targets may share memory")
        try:
            reader.read_vectors([first, second], len(data) - 3)
        except TruncatedError:
            pass
        else:
            raise AssertionError("a read behind the end did not raise TruncatedError")
        finally:
            reader.close()

    def test_rename_never_replaces(self, store: Store) -> None:
        """Not even an empty directory."""
        store.make_root()
        for name in ("a", "b"):
            store.make_directory(name)
        store.write_document("a/f", b"a", SyncPoint.DOCUMENT)
        _refuses(AlreadyExistsError, "rename", store, "a", "b")
        for name in ("old", "new"):
            store.write_document(name, name.encode(), SyncPoint.DOCUMENT)
        _refuses(AlreadyExistsError, "rename", store, "new", "old")
        _refuses(AlreadyExistsError, "rename", store, "new", "b")
        _expect(store.read_bytes("old") == b"old" and store.read_bytes("new") == b"new", "nothing was moved")
        store.rename("a", "c")
        _expect(store.read_bytes("c/f") == b"a" and not store.exists("a"), "a rename moves everything")

    def test_exchange(self, store: Store) -> None:
        """Both names, or neither."""
        store.make_root()
        for name in ("a", "b"):
            store.make_directory(name)
            store.write_document(f"{name}/f", name.encode(), SyncPoint.DOCUMENT)
        if store.exchange("a", "b"):
            _expect((store.read_bytes("a/f"), store.read_bytes("b/f")) == (b"b", b"a"), "exchanged")
        else:
            _expect((store.read_bytes("a/f"), store.read_bytes("b/f")) == (b"a", b"b"), "refused, nothing done")

    def test_replace_file(self, store: Store) -> None:
        """A file takes the place of another."""
        store.make_root()
        store.write_document("old", b"old", SyncPoint.DOCUMENT)
        store.write_document("new", b"new", SyncPoint.DOCUMENT)
        reader = store.open_reader("old")
        store.replace_file("new", "old")
        _expect(store.read_bytes("old") == b"new" and not store.exists("new"), "replaced")
        target = bytearray(3)
        reader.read_into(memoryview(target), 0)
        reader.close()
        _expect(bytes(target) == b"old", "whoever had the old file open still reads it")
        store.replace_file("old", "free")
        _expect(store.read_bytes("free") == b"new", "a free name is taken")

    def test_remove_tree(self, store: Store) -> None:
        """Everything below goes."""
        store.make_root()
        store.make_directory("a")
        store.make_directory("a/b")
        store.write_document("a/b/f", b"", SyncPoint.DOCUMENT)
        store.write_document("a/m", b"", SyncPoint.DOCUMENT)
        store.remove_tree("a", first="m")
        _expect(not store.exists("a"), "removed")
        store.make_directory("a")
        store.remove_tree("a", first="m")
        store.write_document("f", b"", SyncPoint.DOCUMENT)
        store.remove_tree("f")
        _expect(store.entries("") == [], "an absent first entry, and a single file, are no errors")

    def test_lock_is_exclusive(self, store: Store) -> None:
        """A second taker waits for nobody: it hears None, in this process too."""
        store.make_root()
        lock = store.lock("lock")
        _expect(lock is not None, "a free lock is taken")
        _expect(store.lock("lock") is None, "a held lock is refused")
        if lock is not None:
            lock.release()
            lock.release()
        again = store.lock("lock")
        _expect(again is not None, "a released lock is free")
        if again is not None:
            again.release()
