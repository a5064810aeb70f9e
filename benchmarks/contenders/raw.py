"""What the machine can do: plain writes, reads and copies of the same bytes by the same processes."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders import Contender
from benchmarks.files import sync_directories
from benchmarks.rank import Rank

_BLOCK_BYTES = 16 << 20
_ALIGNMENT = 4096
_NUM_THREADS = 2


class RawDirect(Contender):
    """Aligned O_DIRECT writes and reads of 16 MiB blocks, one preallocated file per rank.

    Memory:
        As many bytes as the rank's share of the training state.
    """

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        size = self.subject.num_local_bytes()
        self._size = (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        self._memory = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        words = np.frombuffer(self._memory, np.uint64)
        generator = np.random.default_rng(rank.rank)
        step = _BLOCK_BYTES // 8
        for start in range(0, len(words), step):
            part = words[start : start + step]
            part[:] = generator.integers(0, 1 << 63, len(part), np.uint64)
        self._view = memoryview(self._memory)
        self._pool = ThreadPoolExecutor(_NUM_THREADS)

    def save(self, index: int) -> Path:
        """Write, and sync the file and the directory."""
        path = self.home / str(index)
        path.mkdir(exist_ok=True)
        descriptor = os.open(path / f"rank{self.rank.rank}", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, self._size)
            self._each_block(lambda start, end: _write_all(descriptor, self._view[start:end], start))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directories(path)
        return path

    def load(self, path: Path) -> None:
        """Read into the same memory, from the device."""
        descriptor = os.open(path / f"rank{self.rank.rank}", os.O_RDONLY | os.O_DIRECT)
        try:
            self._each_block(lambda start, end: _read_all(descriptor, self._view[start:end], start))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _each_block(self, action: object) -> None:
        assert callable(action)  # two kinds of closure, called alike
        blocks = [(start, min(start + _BLOCK_BYTES, self._size)) for start in range(0, self._size, _BLOCK_BYTES)]
        for future in [self._pool.submit(action, *block) for block in blocks]:
            future.result()


class RawPreadv(Contender):
    """Buffered reads of one file per rank into reused memory; written the plain way."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        self._memory = torch.empty(self.subject.num_local_bytes(), dtype=torch.uint8).random_()
        self._view = memoryview(self._memory.numpy())  # type: ignore[arg-type]

    def save(self, index: int) -> Path:
        """Write the bytes that are to be read."""
        path = self.home / str(index)
        path.mkdir(exist_ok=True)
        with (path / f"rank{self.rank.rank}").open("wb", buffering=0) as file:
            _write_all(file.fileno(), self._view, 0)
            os.fsync(file.fileno())
        return path

    def load(self, path: Path) -> None:
        """Read into reused memory."""
        with (path / f"rank{self.rank.rank}").open("rb", buffering=0) as file:
            for start in range(0, len(self._view), _BLOCK_BYTES):
                _read_all(file.fileno(), self._view[start : start + _BLOCK_BYTES], start)


class Memcpy(Contender):
    """Copies of everything that the rank holds into memory that was written before.

    Memory:
        As many bytes as the rank's share of the training state.
    """

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        self._copies = {name: tensor.clone() for name, tensor in self.subject.local_tensors().items()}

    def save(self, index: int) -> Path:
        """Copy. Nothing is written, so that the directory stays empty."""
        for name, tensor in self.subject.local_tensors().items():
            self._copies[name].copy_(tensor)
        path = self.home / str(index)
        path.mkdir(exist_ok=True)
        return path


def _write_all(descriptor: int, view: memoryview, byte_offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view[:_BLOCK_BYTES], byte_offset)
        view, byte_offset = view[count:], byte_offset + count


def _read_all(descriptor: int, view: memoryview, byte_offset: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], byte_offset)
        if count == 0:
            text = "the file is shorter than what was written"
            raise EOFError(text)
        view, byte_offset = view[count:], byte_offset + count
