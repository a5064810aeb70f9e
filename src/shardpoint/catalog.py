"""What checkpoints a root has, and whether their bytes are those that were committed; without torch.

Reading needs no ownership and disturbs nobody: a root may be listed and verified while a run saves to it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shardpoint.checksum import combine, crc64, to_hex
from shardpoint.commit import (
    CONTROL_DIRECTORY,
    Committed,
    committed_checkpoints,
    find_committed,
    pin,
    pinned_names,
    unpin,
)
from shardpoint.container import header_size_bytes, parse_header
from shardpoint.dtypes import stored_form
from shardpoint.errors import (
    CorruptionError,
    ManifestError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
    UnsupportedFormatError,
    UsageError,
)
from shardpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, Suspect, TensorEntry
from shardpoint.storage import LocalStore, Reader, Store

CHUNK_BYTES = 16 * 2**20

# What a loader would open though nobody committed it: transformers takes a `model.safetensors` before an index, and an
# `adapter_config.json` changes what it loads. A text file or a picture that a person put there does no harm.
LOADED_SUFFIXES = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".jinja",
    ".json",
    ".model",
    ".pkl",
    ".pt",
    ".pth",
    ".py",
    ".safetensors",
)


@dataclass(frozen=True, slots=True)
class Info:
    """One committed checkpoint, as policies and listings see it.

    Attributes:
        name: its name.
        sequence: the commit's number.
        step: the step.
        epoch: the epoch.
        metrics: what the trainer passed along.
        manifest: everything else.
        is_pinned: whether a person wants it to stay.
    """

    name: str
    sequence: int
    step: int
    epoch: int
    metrics: dict[str, float]
    manifest: Manifest
    is_pinned: bool = False

    @property
    def created_utc(self) -> str:
        """The coordinator's wall clock when it was committed."""
        return self.manifest.created_utc

    @property
    def is_healthy(self) -> bool:
        """Whether nothing looked wrong in what was saved (replicas that differ, NaN)."""
        return self.manifest.suspect is None


@dataclass(frozen=True, slots=True)
class Problem:
    """One disagreement between a checkpoint and its manifest.

    Attributes:
        key: the file, and after a `#` the tensor, where it is one.
        kind: `"missing"`, `"unexpected"`, `"size"`, `"checksum"`, `"header"`, `"manifest"` or `"format"`.
        message: one sentence.
    """

    key: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        name: the checkpoint.
        num_bytes: bytes whose checksum was compared.
        num_files: files that the manifest lists.
        num_tensors: tensors whose checksum was compared.
        problems: nothing, when every byte is as it was committed.
    """

    name: str
    num_bytes: int
    num_files: int
    num_tensors: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was committed."""
        return not self.problems


def training_checkpoints(store: Store) -> list[Info]:
    """Return the intact training checkpoints of a root in the order of their commits, the oldest first.

    Only those that have the name that they were committed under: what a person renamed, copied or linked is theirs. It
    does not count when old ones are pruned, and is not pruned.

    Raises:
        NotFoundError: the root does not exist.
    """
    found: list[Info] = []
    pinned = pinned_names(store)
    for item in committed_checkpoints(store):
        manifest = item.manifest
        if manifest is None or manifest.name != item.name:
            continue
        if manifest.step is not None and manifest.epoch is not None:
            found.append(
                Info(
                    item.name,
                    manifest.commit_sequence,
                    manifest.step,
                    manifest.epoch,
                    manifest.metric_values,
                    manifest,
                    item.name in pinned,
                )
            )
    return found


def in_order_of_trust(store: Store) -> list[Committed]:
    """Return the training checkpoints in the order in which a resume tries them.

    First those whose manifest cannot be read, then the healthy ones, then the suspect ones, each the last committed
    first. One that cannot be read may be the newest, so it is tried first: it is passed over loudly, or (a newer
    format) it ends the resume instead of silently going back to an older one.

    Raises:
        NotFoundError: the root does not exist.
    """
    found = committed_checkpoints(store)
    unreadable = [item for item in found if item.manifest is None]
    healthy: list[Committed] = []
    suspect: list[Committed] = []
    for item in reversed(found):
        if item.manifest is not None and item.manifest.step is not None:
            (healthy if item.manifest.suspect is None else suspect).append(item)
    return [*unreadable, *healthy, *suspect]


def newer_suspects(found: Iterable[Committed], name: str) -> list[tuple[str, Suspect]]:
    """Return which suspect checkpoints were committed after one, or are it: their names, and why they are suspect.

    Args:
        found: checkpoints.
        name: one of them.
    """
    intact = [(item.name, item.manifest) for item in found if item.manifest is not None]
    sequence = next((manifest.commit_sequence for known, manifest in intact if known == name), 0)
    return [
        (known, manifest.suspect)
        for known, manifest in intact
        if manifest.suspect is not None and manifest.commit_sequence >= sequence
    ]


def list_root(root: str | os.PathLike[str]) -> list[Committed]:
    """Return every committed checkpoint of a root, the oldest commit first; those with damaged manifests come first.

    Raises:
        NotFoundError: the directory does not exist.
        UsageError: it is a file, or a checkpoint.
    """
    store = LocalStore(root)
    if not store.exists(""):
        raise NotFoundError(f"there is no directory {store.location}")
    if store.exists(MANIFEST_NAME):
        text = (
            f"{store.location} is a checkpoint, not a directory of checkpoints: `shardpoint show` tells what it holds"
        )
        raise UsageError(text)
    return committed_checkpoints(store)


def open_path(path: str | os.PathLike[str]) -> tuple[Store, Committed]:
    """Return the checkpoint at a path, with the store of its root.

    Raises:
        NotFoundError: nothing is there.
        TornCheckpointError: a directory without a manifest is there.
        UsageError: the path is a file, or a root.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - must not resolve symlinks
    if absolute.exists():
        LocalStore(absolute)  # refuses a file
    store = LocalStore(absolute.parent)
    committed = find_committed(store, absolute.name)
    if committed is not None:
        return store, committed
    if absolute.exists():
        if is_root(absolute):
            raise UsageError(f"{absolute} is a directory of checkpoints: give one of those that `shardpoint ls` lists")
        text = f"{absolute} has no manifest: it was never committed by Shardpoint"
        text += " (a torn save, or another program's directory)"
        raise TornCheckpointError(text)
    raise NotFoundError(f"there is no checkpoint {absolute}")


def is_root(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a root (has checkpoints in it, or had a run) rather than a checkpoint.

    Raises:
        UsageError: the path is a file.
    """
    store = LocalStore(path)
    if not store.exists("") or store.exists(MANIFEST_NAME):
        return False
    return store.exists(CONTROL_DIRECTORY) or bool(committed_checkpoints(store))


def set_pin(path: str | os.PathLike[str], *, is_pinned: bool) -> str:
    """Pin a checkpoint, so that no run prunes it, or take the pin away.

    Args:
        path: the checkpoint's directory; to take a pin away it need not be there any more.
        is_pinned: what it shall be.

    Returns:
        The checkpoint's name.

    Raises:
        NotFoundError: nothing is there, or it is not pinned.
        TornCheckpointError: a directory without a manifest is there.
        UsageError: the path is a file, or a root.
        StorageError: the pin cannot be written or deleted.
    """
    if is_pinned:
        store, committed = open_path(path)
        pin(store, committed.name)
        return committed.name
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - must not resolve symlinks
    unpin(LocalStore(absolute.parent), absolute.name)
    return absolute.name


def _no_progress(_: int) -> None:
    return


def verify(store: Store, committed: Committed, progress: Callable[[int], None] = _no_progress) -> Report:
    """Read every byte of a checkpoint and compare it with the manifest.

    Args:
        store: the root.
        committed: the checkpoint.
        progress: told of each chunk's bytes.

    Returns:
        The report, with all problems, not only the first.

    Raises:
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        UnsupportedFormatError: it is of a newer format.
        StorageError: a read failed.
    """
    if committed.manifest is None:
        problem = committed.problem
        assert problem is not None  # noqa: S101 - a listing has one or the other
        if not isinstance(problem, CorruptionError):
            raise problem
        return Report(committed.name, 0, 0, 0, (Problem(problem.key, "manifest", str(problem)),))
    manifest = committed.manifest
    by_file: dict[int, list[TensorEntry]] = defaultdict(list)
    for tensor in manifest.tensors:
        by_file[tensor.file].append(tensor)
    problems: list[Problem] = []
    num_bytes = num_tensors = 0
    for index, entry in enumerate(manifest.files):
        try:
            reader = store.open_reader(f"{committed.key}/{entry.path}")
        except NotFoundError:
            _check_still_there(store, committed)
            problems.append(Problem(entry.path, "missing", f"{entry.path} is missing, though it was committed"))
            continue
        try:
            if reader.size_bytes != entry.size_bytes:
                problems.append(_resized(entry, reader.size_bytes))
                continue
            problems += _verify_file(reader, entry, by_file.get(index), progress)
            num_bytes += entry.size_bytes
            num_tensors += len(by_file.get(index, []))
        except TruncatedError as error:
            problems.append(Problem(entry.path, "size", str(error)))  # cut short since it was opened
        finally:
            reader.close()
    problems += _strangers(store, committed, manifest)
    return Report(committed.name, num_bytes, len(manifest.files), num_tensors, tuple(problems))


def verify_root(store: Store, progress: Callable[[int], None] = _no_progress) -> list[Report]:
    """Verify every committed checkpoint of a root, in the order of their commits.

    One that a run prunes or replaces meanwhile is left out; one of a newer format is reported as a problem.

    Args:
        store: the root.
        progress: told of each chunk's bytes.

    Raises:
        NotFoundError: the root does not exist.
        StorageError: a read failed.
    """
    reports: list[Report] = []
    for item in committed_checkpoints(store):
        try:
            reports.append(verify(store, item, progress))
        except NotFoundError:
            continue
        except UnsupportedFormatError as error:
            reports.append(Report(item.name, 0, 0, 0, (Problem(MANIFEST_NAME, "format", str(error)),)))
    return reports


def _check_still_there(store: Store, committed: Committed) -> None:
    """Raise `NotFoundError` where the checkpoint was pruned or replaced since it was listed."""
    again = find_committed(store, committed.name)
    ids = [item.manifest.checkpoint_id for item in (again, committed) if item is not None and item.manifest is not None]
    if len(ids) < 2 or ids[0] != ids[1]:  # noqa: PLR2004 - then and now
        text = f"{committed.name} in {store.location} was pruned or replaced while it was verified: look again"
        raise NotFoundError(text)


def _strangers(store: Store, committed: Committed, manifest: Manifest) -> list[Problem]:
    """Find what was not committed and a loader would open, in the directories that hold what was."""
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    problems: list[Problem] = []
    for directory in sorted({path.rpartition("/")[0] for path in listed}):
        try:
            entries = store.entries(f"{committed.key}/{directory}" if directory else committed.key)
        except NotFoundError:
            _check_still_there(store, committed)
            continue  # its files are reported as missing
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            if not entry.is_directory and path not in listed and entry.name.endswith(LOADED_SUFFIXES):
                text = f"{path} was not committed: another program put it there, and a loader may open it"
                problems.append(Problem(path, "unexpected", text))
    return problems


def _resized(entry: FileEntry, size_bytes: int) -> Problem:
    text = f"{entry.path} has {size_bytes} bytes, {entry.size_bytes} were committed"
    return Problem(entry.path, "size", text)


def _verify_file(
    reader: Reader, entry: FileEntry, tensors: list[TensorEntry] | None, progress: Callable[[int], None]
) -> list[Problem]:
    if tensors is None:
        crc = _crc_of(reader, 0, entry.size_bytes, progress)
        return [] if to_hex(crc) == entry.crc64nvme else [_damaged(entry.path, entry.crc64nvme, crc)]
    problems: list[Problem] = []
    try:
        header = _header(reader, entry)
    except (ManifestError, TruncatedError) as error:
        problems.append(Problem(entry.path, "header", str(error)))
        header = None
    if header is not None:
        problems += _compare_header(header, entry, tensors)
    position = min((tensor.byte_offset for tensor in tensors), default=entry.size_bytes)
    whole = _crc_of(reader, 0, position, progress)
    for tensor in sorted(tensors, key=lambda item: (item.byte_offset, item.num_bytes)):
        crc = _crc_of(reader, tensor.byte_offset, tensor.num_bytes, progress)
        whole = combine(whole, crc, tensor.num_bytes)
        if to_hex(crc) != tensor.crc64nvme:
            problems.append(_damaged(f"{entry.path}#{tensor.key}", tensor.crc64nvme, crc))
    if not problems and to_hex(whole) != entry.crc64nvme:
        problems.append(_damaged(entry.path, entry.crc64nvme, whole))
    return problems


def _damaged(key: str, expected: str, actual: int) -> Problem:
    path, _, tensor = key.partition("#")
    what = f"tensor {tensor} in {path}" if tensor else path
    return Problem(key, "checksum", f"{what} is damaged: checksum {to_hex(actual)}, {expected} was committed")


def _crc_of(reader: Reader, start: int, num_bytes: int, progress: Callable[[int], None]) -> int:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, num_bytes)))
    crc = 0
    for done in range(0, num_bytes, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, num_bytes - done)]
        reader.read_into(chunk, start + done)
        crc = crc64(chunk, crc)
        progress(len(chunk))
    return crc


def _header(reader: Reader, entry: FileEntry) -> dict[str, tuple[str, tuple[int, ...], int]]:
    first = bytearray(min(8, reader.size_bytes))
    reader.read_into(memoryview(first), 0)
    header = bytearray(header_size_bytes(bytes(first), reader.size_bytes, entry.path))
    reader.read_into(memoryview(header), 0)
    layout = parse_header(bytes(header), reader.size_bytes, entry.path)
    return {tensor.name: (tensor.dtype, tensor.shape, tensor.byte_offset) for tensor in layout.tensors}


def _compare_header(
    header: dict[str, tuple[str, tuple[int, ...], int]], entry: FileEntry, tensors: list[TensorEntry]
) -> list[Problem]:
    listed = {tensor.key: (*stored_form(tensor.dtype, tensor.shape), tensor.byte_offset) for tensor in tensors}
    return [
        Problem(
            f"{entry.path}#{name}",
            "header",
            f"{entry.path}: the header has {header.get(name)} for tensor {name}, the manifest {listed.get(name)}",
        )
        for name in sorted(header.keys() | listed.keys())
        if header.get(name) != listed.get(name)
    ]
