from __future__ import annotations

from pathlib import Path

from benchmarks import files


def test_warm_files_are_in_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "one").write_bytes(b"x" * 100_000)
    (tmp_path / "empty").touch()
    assert files.total_bytes(tmp_path) == 100_000
    assert files.warm(tmp_path) == 1.0
    files.sync_files(files.files_under(tmp_path))
    files.sync_directories(tmp_path)
    assert 0.0 <= files.drop(tmp_path) <= 1.0  # some file systems keep their pages


def test_the_kernel_counts_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 50_000)
    before = files.io_counters()["rchar"]
    file.read_bytes()
    assert files.io_counters()["rchar"] - before >= 50_000
