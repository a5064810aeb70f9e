from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from awscrt import checksums
from safetensors.numpy import load_file

from shardpoint import catalog
from shardpoint.catalog import (
    Problem,
    Report,
    is_root,
    list_root,
    open_path,
    training_checkpoints,
    verify,
    verify_root,
)
from shardpoint.commit import Attempt, RootOwner, acquire_root, find_committed, prune, publish
from shardpoint.container import layout_file
from shardpoint.errors import NotFoundError, TornCheckpointError, UnsupportedFormatError, UsageError
from shardpoint.manifest import FileEntry, Manifest, TensorEntry
from shardpoint.storage import LocalStore, Reader, SyncPoint
from shardpoint.testing import Fault, FaultyStore

ARRAYS: dict[str, npt.NDArray[np.generic]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
}
DTYPES = {"a": "F32", "b": "I64", "empty": "F32"}
FILE = "modeling/model-00001-of-00001.safetensors"


def crc(data: bytes) -> str:
    return f"{checksums.crc64nvme(data):016x}"


def commit(store: LocalStore, owner: RootOwner, step: int, *, name: str | None = None, epoch: int | None = 0) -> str:
    """Commit a checkpoint with one tensor file and one document, without the engine."""
    layout = layout_file((key, DTYPES[key], array.shape) for key, array in ARRAYS.items())
    attempt = Attempt.open(store, owner, name or f"epoch-0_step-{step}", files={FILE: layout})
    writer = store.open_writer(f"{attempt.key}/{FILE}")
    for tensor in layout.tensors:
        writer.write_at(ARRAYS[tensor.name].tobytes(), tensor.byte_offset)
    writer.sync(SyncPoint.TENSOR_FILE)
    writer.close()
    whole = Path(store.local_path(f"{attempt.key}/{FILE}"))
    assert {key: value.tolist() for key, value in load_file(whole).items()} == {
        k: v.tolist() for k, v in ARRAYS.items()
    }
    data = whole.read_bytes()
    tensors = [
        TensorEntry("modeling", t.name, None, t.name, t.dtype, t.shape, 0, t.byte_offset, t.num_bytes, crc(part))
        for t in layout.tensors
        for part in (data[t.byte_offset : t.byte_offset + t.num_bytes],)
    ]
    documents = {"running_states.json": b"{}"}
    manifest = Manifest(
        format="shardpoint",
        version=(1, 0),
        checkpoint_id=attempt.attempt_id,
        replaces=attempt.replaces,
        sequence=f"{attempt.sequence:012d}",
        name=attempt.name,
        epoch=epoch,
        step=None if epoch is None else step,
        sample_start_index=None,
        created_utc="2026-01-01T00:00:00Z",
        library="test",
        world_size=1,
        roles=[""],
        metrics={"loss": float(step)},
        files=[FileEntry(FILE, len(data), crc(data)), FileEntry("running_states.json", 2, crc(b"{}"))],
        tensors=tensors,
    )
    publish(attempt, documents, manifest)
    return attempt.name


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture
def owner(store: LocalStore) -> Iterator[RootOwner]:
    held = acquire_root(store)
    yield held
    held.release()


def path_of(store: LocalStore, name: str, file: str = FILE) -> Path:
    return Path(store.local_path(name)) / file


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


def report_of(store: LocalStore, name: str) -> Report:
    found = find_committed(store, name)
    assert found is not None
    return verify(store, found)


def kinds(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.key) for problem in report.problems]


# ---- listing


def test_checkpoints_are_listed_in_the_order_of_their_commits(store: LocalStore, owner: RootOwner) -> None:
    names = [commit(store, owner, step) for step in (8, 4, 12)]
    assert [item.name for item in list_root(store.location)] == names
    assert [(info.step, info.sequence) for info in training_checkpoints(store)] == [(8, 1), (4, 2), (12, 3)]
    assert training_checkpoints(store)[0].metrics == {"loss": 8.0}


def test_listing_what_is_no_root(tmp_path: Path, store: LocalStore, owner: RootOwner) -> None:
    with pytest.raises(NotFoundError, match="no directory"):
        list_root(tmp_path / "none")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        list_root(file)
    name = commit(store, owner, 4)
    with pytest.raises(UsageError, match="is a checkpoint"):
        list_root(f"{store.location}/{name}")
    (tmp_path / "other").mkdir()
    assert list_root(tmp_path / "other") == []


def test_only_what_has_the_name_of_its_commit_is_pruned_or_counted(store: LocalStore, owner: RootOwner) -> None:
    first, second = commit(store, owner, 4), commit(store, owner, 8)
    commit(store, owner, 0, name="exported", epoch=None)  # not a training checkpoint
    root = Path(store.location)
    shutil.copytree(root / first, root / "best")
    (root / "latest").symlink_to(second)
    (root / "mine").mkdir()
    assert [info.name for info in training_checkpoints(store)] == [first, second]
    assert {item.name for item in list_root(root)} == {first, second, "exported", "best", "latest"}


def test_opening_a_path(tmp_path: Path, store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    name = commit(store, owner, 4)
    found, item = open_path(f"{store.location}/{name}/")
    assert (found.location, item.name, item.problem) == (store.location, name, None)
    monkeypatch.chdir(store.location)
    assert open_path(name)[1] == item
    monkeypatch.chdir(name)
    assert open_path(".")[1] == item
    with pytest.raises(NotFoundError):
        open_path(tmp_path / "none")
    with pytest.raises(UsageError, match="directory of checkpoints"):
        open_path(store.location)
    (tmp_path / "torn").mkdir()
    with pytest.raises(TornCheckpointError):
        open_path(tmp_path / "torn")


def test_a_damaged_manifest_is_listed_first_with_its_problem(store: LocalStore, owner: RootOwner) -> None:
    names = [commit(store, owner, step) for step in (4, 8)]
    flip(path_of(store, names[1], "shardpoint.json"), 40)
    damaged, intact = list_root(store.location)
    assert (damaged.name, damaged.manifest, intact.name) == (names[1], None, names[0])
    assert [info.name for info in training_checkpoints(store)] == [names[0]]
    assert kinds(report_of(store, names[1])) == [("manifest", f"{names[1]}/shardpoint.json")]


def test_what_counts_as_a_root(tmp_path: Path, store: LocalStore, owner: RootOwner) -> None:
    assert is_root(store.location)  # a run has been there, and has saved nothing yet
    name = commit(store, owner, 4)
    assert is_root(store.location)
    assert is_root(f"{store.location}/")
    assert not is_root(f"{store.location}/{name}")
    # A directory of copies, which no run ever owned.
    shutil.copytree(f"{store.location}/{name}", tmp_path / "copies" / name)
    assert is_root(tmp_path / "copies")
    # A checkpoint in which somebody saved another one stays a checkpoint.
    inner = acquire_root(LocalStore(f"{store.location}/{name}"))
    inner.release()
    assert not is_root(f"{store.location}/{name}")
    (tmp_path / "empty").mkdir()
    assert not is_root(tmp_path / "empty")
    assert not is_root(tmp_path / "none")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError):
        is_root(tmp_path / "dangling")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        is_root(tmp_path / "file")


# ---- verifying


def test_an_intact_checkpoint(store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CHUNK_BYTES", 7)  # runs of several chunks, the last one short
    name = commit(store, owner, 4)
    seen: list[int] = []
    item = find_committed(store, name)
    assert item is not None
    report = verify(store, item, seen.append)
    size = path_of(store, name).stat().st_size + 2
    assert report == Report(name, size, 2, 3, ())
    assert report.ok
    assert sum(seen) == size


def test_every_byte_of_a_tensor_file_is_covered(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    path = path_of(store, name)
    intact = path.read_bytes()
    stored = {t.key: t for t in open_path(path.parent.parent)[1].manifest.tensors}  # type: ignore[union-attr]
    # The length, the header's text, its padding, and each tensor; in the padding any byte but a space is no JSON.
    for position in (0, 7, 8, 30, 200, 4095, *range(stored["b"].byte_offset, len(intact))):
        flip(path, position)
        report = report_of(store, name)
        assert not report.ok, position
        inside = [t for t in stored.values() if t.byte_offset <= position < t.byte_offset + t.num_bytes]
        if inside:
            assert kinds(report) == [("checksum", f"{FILE}#{inside[0].key}")]
        else:
            assert all(key.startswith(FILE) for _, key in kinds(report))
        path.write_bytes(intact)
    assert report_of(store, name).ok
    # Another padding byte that JSON allows: only the whole file's checksum shows it.
    assert intact[4095:4096] == b" "
    path.write_bytes(intact[:4095] + b"\n" + intact[4096:])
    assert kinds(report_of(store, name)) == [("checksum", FILE)]


def test_a_document_is_covered(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    path_of(store, name, "running_states.json").write_bytes(b"[]")
    report = report_of(store, name)
    assert kinds(report) == [("checksum", "running_states.json")]
    assert crc(b"[]") in report.problems[0].message
    assert crc(b"{}") in report.problems[0].message


@pytest.mark.parametrize("by", [-1, 1, -4000, -(10**6)])
def test_a_file_of_another_size(store: LocalStore, owner: RootOwner, by: int) -> None:
    name = commit(store, owner, 4)
    path = path_of(store, name)
    os.truncate(path, max(path.stat().st_size + by, 0))
    report = report_of(store, name)
    assert kinds(report) == [("size", FILE)]
    assert (report.num_bytes, report.num_tensors) == (2, 0)  # only what was compared is counted


def test_a_file_that_is_gone(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    shutil.rmtree(path_of(store, name).parent)
    assert kinds(report_of(store, name)) == [("missing", FILE)]


def test_a_directory_in_place_of_a_file(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    path_of(store, name, "running_states.json").unlink()
    path_of(store, name, "running_states.json").mkdir()
    assert kinds(report_of(store, name)) == [("size", "running_states.json")]


def test_a_header_that_tells_another_story_than_the_manifest(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    path = path_of(store, name)
    path.write_bytes(path.read_bytes().replace(b'"shape":[2,3]', b'"shape":[3,2]'))
    report = report_of(store, name)
    assert kinds(report) == [("header", f"{FILE}#a")]
    assert "(3, 2)" in report.problems[0].message
    assert "(2, 3)" in report.problems[0].message


@pytest.mark.parametrize(
    "stranger",
    [
        "modeling/model.safetensors",  # transformers takes it before the index
        "modeling/adapter_config.json",  # changes what from_pretrained loads
        "modeling/pytorch_model.bin",
        "modeling/modeling_custom.py",
        "extra.json",
    ],
)
def test_a_file_that_nobody_committed_and_a_loader_would_open(
    store: LocalStore, owner: RootOwner, stranger: str
) -> None:
    name = commit(store, owner, 4)
    path_of(store, name, stranger).write_bytes(b"{}")
    report = report_of(store, name)
    assert kinds(report) == [("unexpected", stranger)]
    assert stranger in report.problems[0].message


@pytest.mark.parametrize("harmless", ["README.md", "modeling/loss.png", "notes/own.json"])
def test_a_persons_own_files_are_no_damage(store: LocalStore, owner: RootOwner, harmless: str) -> None:
    name = commit(store, owner, 4)
    path = path_of(store, name, harmless)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert report_of(store, name).ok


def test_a_checkpoint_that_is_pruned_while_it_is_verified(store: LocalStore, owner: RootOwner) -> None:
    names = [commit(store, owner, step) for step in (4, 8)]
    faulty = FaultyStore(
        store,
        [Fault("open_reader", f"{names[0]}/{FILE}", action="call", then=lambda: prune(store, owner, names[0]))],
    )
    items = list_root(store.location)
    with pytest.raises(NotFoundError, match="pruned or replaced while it was verified"):
        verify(faulty, items[0])
    names.append(commit(store, owner, 4))
    again = FaultyStore(
        store,
        [Fault("open_reader", f"{names[2]}/{FILE}", action="call", then=lambda: prune(store, owner, names[2]))],
    )
    assert [(report.name, report.ok) for report in verify_root(again)] == [(names[1], True)]


def test_a_checkpoint_that_is_replaced_while_it_is_verified(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    path_of(store, name).unlink()

    def replace() -> None:
        commit(store, owner, 4)
        path_of(store, name).unlink()

    faulty = FaultyStore(store, [Fault("open_reader", f"{name}/{FILE}", action="call", then=replace)])
    with pytest.raises(NotFoundError, match="pruned or replaced"):
        verify(faulty, list_root(store.location)[0])


class ShrinkingStore(LocalStore):
    """A store whose files are cut short once they are open."""

    def open_reader(self, key: str) -> Reader:  # type: ignore[override]
        reader = super().open_reader(key)
        os.truncate(self.local_path(key), reader.size_bytes // 2)
        return reader


def test_a_file_that_is_cut_short_while_it_is_read(store: LocalStore, owner: RootOwner) -> None:
    name = commit(store, owner, 4)
    item = find_committed(store, name)
    assert item is not None
    report = verify(ShrinkingStore(store.location), item)
    assert {kind for kind, _ in kinds(report)} <= {"size", "header"}
    assert {key for _, key in kinds(report)} == {FILE, "running_states.json"}


def test_a_newer_format_is_refused_alone_and_reported_in_a_root(
    store: LocalStore, owner: RootOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = commit(store, owner, 4)
    monkeypatch.setattr("shardpoint.manifest.document.FORMAT_MAJOR", 2)
    found = find_committed(store, name)
    assert found is not None
    assert found.manifest is None
    with pytest.raises(UnsupportedFormatError):
        verify(store, found)
    (report,) = verify_root(store)
    assert kinds(report) == [("format", "shardpoint.json")]


def test_a_report_is_ok_without_problems_only() -> None:
    assert Report("x", 0, 0, 0, ()).ok
    assert not Report("x", 0, 0, 0, (Problem("k", "missing", "m"),)).ok
