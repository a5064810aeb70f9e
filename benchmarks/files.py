"""What happens to a checkpoint's files around a measurement: synced, dropped from the page cache, warmed."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_CHUNK_BYTES = 16 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def files_under(path: Path) -> list[Path]:
    """List all regular files, in an order that every rank finds."""
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def sync_files(files: Iterable[Path]) -> None:
    """Make the files' bytes durable."""
    for file in files:
        _fsync(file)


def sync_directories(path: Path) -> None:
    """Make the names of everything below and of the directory itself durable, bottom up."""
    for folder in sorted((item for item in path.rglob("*") if item.is_dir()), reverse=True):
        _fsync(folder)
    _fsync(path)
    _fsync(path.parent)


def total_bytes(path: Path) -> int:
    """Return the size of everything below."""
    return sum(file.stat().st_size for file in files_under(path))


def warm(path: Path) -> float:
    """Read every file into the page cache, and return the part that is there afterwards (1.0 is all)."""
    for file in files_under(path):
        with file.open("rb", buffering=0) as source:
            while source.read(_CHUNK_BYTES):
                pass
    return resident_part(path)


def drop(path: Path) -> float:
    """Sync every file and drop it from the page cache, and return the part that is still there (0.0 is none)."""
    for file in files_under(path):
        _fsync(file)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident_part(path)


def resident_part(path: Path) -> float:
    """Return which part of the files' pages is in the page cache, as mincore tells it."""
    num_pages = num_resident = 0
    for file in files_under(path):
        size = file.stat().st_size
        if size == 0:
            continue
        with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
            vector = np.zeros(pages, np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
            if _libc.mincore(address, length, ctypes.c_void_p(vector.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore", str(file))
            del view
            num_pages += pages
            num_resident += int((vector & 1).sum())
    return num_resident / num_pages if num_pages else 0.0


def io_counters() -> dict[str, int]:
    """Return this process's counters: `rchar` (bytes of read calls), `read_bytes` (from devices), and others."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
