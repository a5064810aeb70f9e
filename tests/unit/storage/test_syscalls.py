from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shardpoint.storage import syscalls


def test_renames_report_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        syscalls.renameat2(str(tmp_path / "a"), str(tmp_path / "b"), syscalls.RENAME_NOREPLACE)
    with pytest.raises(FileNotFoundError, match="absent"):
        syscalls.renameat2(str(tmp_path / "absent"), str(tmp_path / "c"), syscalls.RENAME_NOREPLACE)
    with pytest.raises(OSError) as caught:
        syscalls.renameat2(str(tmp_path / "a"), str(tmp_path / "c"), 1 << 20)
    assert caught.value.errno in syscalls.UNSUPPORTED


def test_fallocate_reports_the_systems_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    syscalls.fallocate(descriptor, 4096)
    assert os.fstat(descriptor).st_size == 4096
    os.close(descriptor)
    with pytest.raises(OSError) as caught:
        syscalls.fallocate(descriptor, 4096)
    assert caught.value.errno == errno.EBADF


def test_a_c_library_without_the_calls_counts_as_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_libc", object())
    calls: list[Callable[[], object]] = [
        lambda: syscalls.fallocate(0, 1),
        lambda: syscalls.renameat2("a", "b", 0),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno in syscalls.UNSUPPORTED


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xff")
    source.mkdir()
    syscalls.renameat2(str(source), str(tmp_path / "b"), syscalls.RENAME_NOREPLACE)
    assert (tmp_path / "b").is_dir()


def test_fresh_memory_is_told_from_touched_and_populated() -> None:
    size = 2**25
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert syscalls.is_fresh(address, size)
        memory[size // 2] = 1
        assert not syscalls.is_fresh(address, size)
        if syscalls.populate(address, size // 4):
            assert not syscalls.is_fresh(address, size // 4)
        assert memory[size // 2] == 1
        assert memory[0] == 0


def test_too_little_memory_or_a_system_without_the_calls_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not syscalls.populate(1, 4096)  # no whole page inside
    monkeypatch.setattr(syscalls, "_libc", object())
    assert not syscalls.populate(0, 1 << 30)
    assert not syscalls.is_fresh(0, 1 << 30)
