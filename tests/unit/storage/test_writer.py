"""Do bytes get to their place whichever way they go, and do whole blocks go past the page cache?"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardpoint.errors import StorageError
from shardpoint.storage import Buffer, LocalStore, SyncPoint, syscalls
from shardpoint.storage.writer import BLOCK_BYTES, REFUSED_NOTE, LocalWriter

SIZE = 20 * BLOCK_BYTES


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer(2**20)
    made.array[:] = bytearray(random.Random(0).randbytes(2**20))
    yield made
    made.close()


class Calls:
    """What went through which descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.direct: list[tuple[int, int]] = []
        self.buffered: list[tuple[int, int]] = []
        self.limit = 2**30
        self.refuse: int | None = None
        self._direct_descriptors: set[int] = set()
        self._thread = threading.get_ident()
        self._pwrite, self._open = os.pwrite, os.open
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "open", self.open)

    def open(self, path: Any, flags: int, *args: Any, **how: Any) -> int:
        descriptor = self._open(path, flags, *args, **how)
        if threading.get_ident() == self._thread:  # other tests' heartbeats write too
            (self._direct_descriptors.add if flags & os.O_DIRECT else self._direct_descriptors.discard)(descriptor)
        return descriptor

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if threading.get_ident() != self._thread:
            return self._pwrite(descriptor, data, offset)
        is_direct = descriptor in self._direct_descriptors
        if is_direct and self.refuse is not None:
            raise OSError(self.refuse, os.strerror(self.refuse))
        written = self._pwrite(descriptor, data[: self.limit], offset)
        (self.direct if is_direct else self.buffered).append((offset, written))
        return written


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    probe = os.open(tmp_path, os.O_RDONLY)
    os.close(probe)
    try:
        descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary directory is on a filesystem without O_DIRECT")
    os.close(descriptor)
    return Calls(monkeypatch)


def opened(tmp_path: Path, **how: Any) -> LocalWriter:
    path = tmp_path / "f"
    path.write_bytes(b"\xee" * SIZE)
    return LocalWriter(str(path), "f", str(tmp_path), **how)


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, length in ranges for byte in range(start, start + length)}


@pytest.mark.parametrize("seed", range(30))
def test_whole_blocks_go_direct_and_edges_do_not(tmp_path: Path, buffer: Buffer, calls: Calls, seed: int) -> None:
    draw = random.Random(seed)
    start, stop = sorted(draw.sample(range(SIZE + 1), 2))
    made = opened(tmp_path)
    shift = draw.randrange(4) * BLOCK_BYTES + start % BLOCK_BYTES
    data = buffer.array[shift : shift + stop - start].data
    made.write_at(data, start)
    made.sync(SyncPoint.TENSOR_FILE)
    made.close()
    expected = bytearray(b"\xee" * SIZE)
    expected[start:stop] = data
    assert (tmp_path / "f").read_bytes() == bytes(expected)
    blocks = {b for b in range(SIZE // BLOCK_BYTES) if start <= b * BLOCK_BYTES and (b + 1) * BLOCK_BYTES <= stop}
    direct = {byte for block in blocks for byte in range(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)}
    assert covered(calls.direct) == direct
    assert covered(calls.buffered) == set(range(start, stop)) - direct
    assert made.note is None


def test_memory_that_is_not_aligned_alike_is_written_buffered(tmp_path: Path, buffer: Buffer, calls: Calls) -> None:
    made = opened(tmp_path)
    made.write_at(buffer.array[1 : 1 + 4 * BLOCK_BYTES].data, 0)
    made.write_at(bytes(4 * BLOCK_BYTES), 4 * BLOCK_BYTES)  # read-only: an address that nobody vouches for
    made.close()
    assert calls.direct == []
    assert (tmp_path / "f").read_bytes()[: 4 * BLOCK_BYTES] == bytes(buffer.array[1 : 1 + 4 * BLOCK_BYTES])


def test_short_writes_go_on_at_a_whole_block(tmp_path: Path, buffer: Buffer, calls: Calls) -> None:
    calls.limit = 3 * BLOCK_BYTES
    made = opened(tmp_path)
    made.write_at(buffer.array[100 : 100 + 15 * BLOCK_BYTES].data, 100)
    made.close()
    written = (tmp_path / "f").read_bytes()
    assert written[100 : 100 + 15 * BLOCK_BYTES] == bytes(buffer.array[100 : 100 + 15 * BLOCK_BYTES])
    assert all(offset % BLOCK_BYTES == 0 and length % BLOCK_BYTES == 0 for offset, length in calls.direct)


def test_a_write_that_makes_no_progress_is_an_error(tmp_path: Path, buffer: Buffer, calls: Calls) -> None:
    made = opened(tmp_path)
    for limit in (0, 512):
        calls.limit = limit
        with pytest.raises(StorageError, match="no progress"):
            made.write_at(buffer.array[: 2 * BLOCK_BYTES].data, 0)
    made.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses_a_direct_write_gets_a_buffered_one(
    tmp_path: Path, buffer: Buffer, calls: Calls, number: int
) -> None:
    calls.refuse = number
    made = opened(tmp_path)
    made.write_at(buffer.array[: 8 * BLOCK_BYTES].data, 0)
    made.sync(SyncPoint.TENSOR_FILE)
    made.close()
    assert (tmp_path / "f").read_bytes()[: 8 * BLOCK_BYTES] == bytes(buffer.array[: 8 * BLOCK_BYTES])
    assert made.note == REFUSED_NOTE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_other_errors_of_a_direct_write_are_errors(tmp_path: Path, buffer: Buffer, calls: Calls, number: int) -> None:
    calls.refuse = number
    made = opened(tmp_path)
    with pytest.raises(StorageError) as caught:
        made.write_at(buffer.array[: 8 * BLOCK_BYTES].data, 0)
    made.close()
    assert caught.value.errno == number
    assert made.note is None


def test_a_store_can_do_without(tmp_path: Path, buffer: Buffer, calls: Calls) -> None:
    store = LocalStore(tmp_path, direct_io=False)
    store.create_file("g", SIZE)
    made = store.open_writer("g")
    made.write_at(buffer.array[:SIZE].data, 0)
    made.close()
    assert calls.direct == []
    assert made.note is None
    assert store.read_bytes("g") == bytes(buffer.array[:SIZE])


def test_a_kernel_that_does_not_tell_its_alignment(
    tmp_path: Path, buffer: Buffer, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: int) -> tuple[int, int]:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(syscalls, "direct_alignment", silent)
    made = opened(tmp_path)
    made.write_at(buffer.array[: 2 * BLOCK_BYTES].data, 0)
    made.close()
    assert covered(calls.direct) == set(range(2 * BLOCK_BYTES))


def test_a_real_filesystem_without_direct_writes(tmp_path: Path, repo_root: Path) -> None:
    """ramfs has neither O_DIRECT nor fallocate."""
    code = (
        "import sys, torch\n"
        "from shardpoint import Checkpointer, TrainState\n"
        "model = torch.nn.Linear(100, 100)\n"
        "with Checkpointer(sys.argv[1]) as checkpointer:\n"
        "    result = checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1).result()\n"
        "print(result.notes)\n"
    )
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    (tmp_path / "ram").mkdir()
    mount = f'mount -t ramfs ramfs "{tmp_path}/ram" || exit 77; exec "$0" "$@"'
    command = [unshare, "-Urm", "sh", "-c", mount, sys.executable, "-c", code, str(tmp_path / "ram" / "root")]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"cannot mount a ramfs here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    assert "fallocate" in run.stdout
    assert REFUSED_NOTE in run.stdout
