from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from shardpoint.errors import NotFoundError, StorageError
from shardpoint.storage import AppendedFile, LocalStore


def test_lines_follow_one_another_over_several_openings(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        file = AppendedFile(LocalStore(tmp_path), "log")
        file.append(text)
        file.append(text)
        file.close()
        file.close()
    assert (tmp_path / "log").read_bytes() == b"one\none\ntwo\ntwo\n"


def test_a_torn_line_is_ended_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"whole\nto")
    file = AppendedFile(LocalStore(tmp_path), "log")
    assert (tmp_path / "log").read_bytes() == b"whole\nto"  # opening alone changes nothing
    file.append(b"next")
    file.append(b"last")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"whole\nto\nnext\nlast\n"


def test_a_write_that_was_cut_short_is_an_error_and_ended_before_the_next(tmp_path: Path) -> None:
    file = AppendedFile(LocalStore(tmp_path), "log")
    write = os.write
    with (
        patch("os.write", lambda descriptor, data: write(descriptor, data[:2])),
        pytest.raises(StorageError, match=r"took 2 of 5 bytes"),
    ):
        file.append(b"torn")
    file.append(b"next")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"to\nnext\n"


def test_refusals_are_ours(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        AppendedFile(LocalStore(tmp_path), "absent/log")
    file = AppendedFile(LocalStore(tmp_path), "log")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("os.write", side_effect=full), pytest.raises(StorageError) as caught:
        file.append(b"line")
    assert caught.value.errno == errno.ENOSPC
    file.close()
