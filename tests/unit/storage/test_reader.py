"""Does a read past the page cache give exactly the bytes, and only where the page cache has not got them?"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import StorageError
from shardpoint.storage import Buffer, LocalStore, Reader

NUM_BYTES = 1_000_003
DATA = np.random.default_rng(0).integers(0, 256, NUM_BYTES, dtype=np.uint8).tobytes()


def has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "f"
    path.write_bytes(DATA)
    if not has_direct(path):
        pytest.skip("this filesystem has no O_DIRECT")
    return path


@pytest.fixture(scope="module")
def scratch() -> Iterator[memoryview]:
    buffer = Buffer(NUM_BYTES + 4 * mmap.PAGESIZE)
    yield buffer.array.data
    buffer.close()


@pytest.fixture
def reader(path: Path) -> Iterator[Reader]:
    drop(path)
    reader = LocalStore(path.parent).open_reader("f")
    yield reader
    reader.close()


def drop(path: Path, start: int = 0, stop: int = 0) -> None:
    """Take a range of the file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, NUM_BYTES - 1), length=st.integers(1, NUM_BYTES))
def test_any_range_of_a_cold_file_comes_back_exactly(path: Path, scratch: memoryview, start: int, length: int) -> None:
    length = min(length, NUM_BYTES - start)
    drop(path)
    reader = LocalStore(path.parent).open_reader("f")
    got = reader.read_uncached(scratch, start, length)
    reader.close()
    assert got is not None
    assert bytes(got) == DATA[start : start + length]


def test_what_is_cached_is_left_to_a_plain_read(path: Path, reader: Reader, scratch: memoryview) -> None:
    half = NUM_BYTES // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    path.read_bytes()
    drop(path, half, NUM_BYTES + mmap.PAGESIZE)
    assert reader.read_uncached(scratch, 0, half) is None
    assert reader.read_uncached(scratch, half, NUM_BYTES - half) is not None
    # Asking and reading fetched nothing: the second half is still not cached.
    assert reader.read_uncached(scratch, half, NUM_BYTES - half) is not None


def test_a_store_without_direct_io_reads_plainly(path: Path, scratch: memoryview) -> None:
    drop(path)
    reader = LocalStore(path.parent, direct_io=False).open_reader("f")
    assert reader.read_uncached(scratch, 0, 100_000) is None
    reader.close()


def test_a_filesystem_that_refuses_is_read_plainly(
    reader: Reader, scratch: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "preadv", refuse)
    assert reader.read_uncached(scratch, 0, 100_000) is None
    monkeypatch.undo()
    assert reader.read_uncached(scratch, 0, 100_000) is None, "it is not asked again"
    target = memoryview(bytearray(100_000))
    reader.read_vectors([target], 0)
    assert bytes(target) == DATA[:100_000]


def test_a_broken_device_is_an_error(reader: Reader, scratch: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="read past the page cache of f in"):
        reader.read_uncached(scratch, 0, 100_000)


@pytest.mark.parametrize("step", [4096, 10_000, 300_000])
def test_a_short_read_goes_on_at_a_block(
    reader: Reader, scratch: memoryview, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    preadv = os.preadv

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        assert offset % mmap.PAGESIZE == 0
        return min(step, preadv(descriptor, views, offset))

    monkeypatch.setattr(os, "preadv", short)
    got = reader.read_uncached(scratch, 5000, 900_000)
    assert got is not None
    assert bytes(got) == DATA[5000:905_000]


@pytest.mark.usefixtures("path")
def test_a_file_that_became_shorter_is_left_to_a_plain_read(tmp_path: Path, scratch: memoryview) -> None:
    copy = tmp_path / "f"
    copy.write_bytes(DATA)
    reader = LocalStore(tmp_path).open_reader("f")
    os.truncate(copy, 500_000)
    drop(copy)
    assert reader.read_uncached(scratch, 400_000, 200_000) is None
    reader.close()


@pytest.mark.usefixtures("path")
def test_another_file_under_the_name_is_not_read(tmp_path: Path, scratch: memoryview) -> None:
    file = tmp_path / "f"
    file.write_bytes(DATA)
    drop(file)
    reader = LocalStore(tmp_path).open_reader("f")
    file.unlink()
    file.write_bytes(bytes(NUM_BYTES))
    drop(file)
    assert reader.read_uncached(scratch, 0, NUM_BYTES) is None
    reader.close()


def test_memory_that_is_too_small_is_not_overrun(reader: Reader, scratch: memoryview) -> None:
    assert reader.read_uncached(scratch[: 2 * mmap.PAGESIZE], 100, 2 * mmap.PAGESIZE) is None
