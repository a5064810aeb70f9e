"""What the manifest says: every file and every tensor of one checkpoint, and the manifest's own checksum.

A checkpoint exists if and only if its `shardpoint.json` is there and valid. Numbers that vary between two runs of the
same job (ids, times, sequence, checksums) have a fixed width, so that the manifest's size does not vary.

Source: docs/spec/FORMAT.md, "The manifest".
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Annotated, Any, Literal

import msgspec

from shardpoint.checksum import crc64, to_hex
from shardpoint.dtypes import MAX_SIZE, sized_bytes, stored_form
from shardpoint.errors import ChecksumError, ManifestError, TruncatedError, UnsupportedFormatError
from shardpoint.manifest.codec import parse_strict_json

MANIFEST_NAME = "shardpoint.json"
NEXT_SAMPLES_NAME = "next.json"
FORMAT_NAME = "shardpoint"
FORMAT_MAJOR, FORMAT_MINOR = 1, 1

_MAX_TOLD = 3
_SEAL_KEY = '"manifest_crc64nvme": "'
_SEAL = re.compile(rb'"manifest_crc64nvme": "([0-9a-f]{16})"\n\}\n\Z')
_SEAL_TAIL_BYTES = len('0123456789abcdef"\n}\n')

Hex16 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Digits = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{12}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file of the checkpoint.

    Attributes:
        path: relative to the checkpoint, with forward slashes.
        size_bytes: its size.
        crc64nvme: CRC-64/NVME of all of it, 16 hex digits (of a safetensors file: of header and tensors in offset
            order).
        linked: how many checkpoints before this one had the same file (the same inode); 0, which is left out, where it
            was written for this one.
    """

    path: str
    size_bytes: Count
    crc64nvme: Hex16
    linked: Count = 0


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One whole tensor in a safetensors file.

    Attributes:
        part: the directory that it belongs to (`"modeling"`, `"optimizer"`, `"actor/modeling"`, `"adapter/default"`).
        fqn: the parameter's or buffer's name in the unwrapped model.
        state: for optimizer state its name (`"exp_avg"`); None for weights.
        key: its name in the file.
        dtype: the dtype that training sees.
        shape: the global shape that training sees.
        file: index into the manifest's `files`.
        byte_offset: where its bytes start in the file.
        num_bytes: how many they are.
        crc64nvme: CRC-64/NVME of them, the same whatever topology wrote them.
    """

    part: str
    fqn: str
    state: str | None
    key: str
    dtype: str
    shape: tuple[Count, ...]
    file: Count
    byte_offset: Count
    num_bytes: Count
    crc64nvme: Hex16


class Holders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ranks that a finding names.

    Attributes:
        ranks: the lowest eight of them, ascending.
        num_ranks: how many they are.
    """

    ranks: list[Count]
    num_ranks: Count

    def __str__(self) -> str:
        shown = ", ".join(str(rank) for rank in self.ranks)
        more = self.num_ranks - len(self.ranks)
        return f"{'ranks' if self.num_ranks > 1 else 'rank'} {shown}" + (f" and {more} more" if more else "")


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that looked wrong in what the ranks held while they saved it.

    Attributes:
        kind: `"replicas_differ"`: ranks that must hold the same bytes of a tensor did not; `"not_finite"`: a weight or
            an optimizer's state has NaN or infinite values.
        part: the tensor's part.
        fqn: its name.
        state: the optimizer state's name, or None for weights.
        holders: of differing replicas, the ranks of each version, ordered by their lowest rank; of values that are not
            finite, the ranks that wrote them, once.
        num_bytes: of differing replicas, the bytes that each rank compared; else the bytes of the values.
    """

    kind: Literal["replicas_differ", "not_finite"]
    part: str
    fqn: str
    state: str | None
    holders: Annotated[list[Holders], msgspec.Meta(min_length=1)]
    num_bytes: Count

    def __str__(self) -> str:
        label = f"{self.part}: {self.fqn}" + (f" [{self.state}]" if self.state is not None else "")
        if self.kind == "not_finite":
            return f"{label} has {self.num_bytes} bytes of NaN or infinite values on {self.holders[0]}"
        return f"{label} differs between its replicas: {' / '.join(map(str, self.holders))}"


class Suspect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a checkpoint whose bytes are intact should not be trusted.

    Attributes:
        num_findings: how many there are.
        findings: the first of them, in the order of the tensors.
    """

    num_findings: Count
    findings: list[Finding]

    def __str__(self) -> str:
        first = "; ".join(map(str, self.findings[:_MAX_TOLD]))
        more = self.num_findings - min(len(self.findings), _MAX_TOLD)
        return first + (f"; and {more} more" if more else "")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that was committed.

    Attributes:
        format: always `"shardpoint"`.
        version: `[major, minor]`; a reader refuses another major, and a greater minor.
        checkpoint_id: 32 hex digits, the id of the attempt that became this checkpoint.
        replaces: the id of the checkpoint of the same name that it replaced, or None.
        sequence: 12 digits, the commit sequence number: the newest checkpoint of a root has the highest.
        name: the directory's name when it was committed.
        epoch: position in training, or None for a directory that is not a training checkpoint.
        step: likewise.
        sample_start_index: samples of the epoch already consumed, over all ranks, or None.
        created_utc: wall clock of the coordinator, for people; nothing is decided by it but what `NewerThan` keeps.
        library: what wrote it, `"shardpoint 0.1.0"`.
        world_size: the number of ranks that wrote it.
        roles: the names of the models in it; `[""]` when there is just one.
        metrics: what the trainer passed along; what is not finite as text, since JSON has no form for it.
        files: every file but the manifest.
        tensors: every tensor, by file and offset.
        suspect: what looked wrong while it was saved, or None where nothing did.
    """

    format: str
    version: tuple[int, int]
    checkpoint_id: Hex32
    replaces: Hex32 | None
    sequence: Digits
    name: str
    epoch: Count | None
    step: Count | None
    sample_start_index: Count | None
    created_utc: str
    library: str
    world_size: Count
    roles: list[str]
    metrics: dict[str, float | Literal["nan", "inf", "-inf"]]
    files: list[FileEntry]
    tensors: list[TensorEntry]
    suspect: Suspect | None = None

    @property
    def commit_sequence(self) -> int:
        """The commit sequence number."""
        return int(self.sequence)

    @property
    def total_bytes(self) -> int:
        """The bytes of all files but the manifest."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def metric_values(self) -> dict[str, float]:
        """What the trainer passed along."""
        return {name: float(value) for name, value in self.metrics.items()}

    def file(self, path: str) -> FileEntry | None:
        """Return the entry of a file, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


def metric_value(value: float) -> float | Literal["nan", "inf", "-inf"]:
    """Return a metric as the manifest holds it."""
    value = float(value)
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def check_relative_path(path: str) -> None:
    """Refuse a path that could lead out of the checkpoint.

    Raises:
        ManifestError: the path is absolute, empty, or has `..`, a backslash, a NUL or an empty component.
    """
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        text = f"the path {path!r} is not a plain relative path"
        raise ManifestError(text, key=path)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as JSON, a file or tensor to a line, that ends with the CRC of all bytes before its digits."""
    fields = msgspec.structs.asdict(manifest)
    lines = ["{"]
    for name, value in fields.items():
        if name in ("files", "tensors"):
            entries = ",\n  ".join(msgspec.json.encode(entry).decode() for entry in value)
            lines.append(f' "{name}": [\n  {entries}\n ],' if entries else f' "{name}": [],')
        elif name != "suspect" or value is not None:
            lines.append(f' "{name}": {msgspec.json.encode(value).decode()},')
    body = ("\n".join(lines) + "\n " + _SEAL_KEY).encode()
    return body + f'{to_hex(crc64(body))}"\n}}\n'.encode()


def decode_manifest(data: bytes, key: str = MANIFEST_NAME) -> Manifest:
    """Return the manifest in some bytes, fully checked against itself.

    Args:
        data: the file.
        key: what it is called in an error.

    Raises:
        TruncatedError: the end is missing.
        ChecksumError: its own CRC does not hold.
        UnsupportedFormatError: another major version, a greater minor one, an unknown dtype, or another format.
        ManifestError: it contradicts itself.
    """
    seal = _SEAL.search(data)
    if seal is None:
        text = f"{key} has no closing checksum: it is cut short or not a manifest"
        raise TruncatedError(text, key=key)
    actual = to_hex(crc64(memoryview(data)[: len(data) - _SEAL_TAIL_BYTES]))
    if actual.encode() != seal.group(1):
        text = f"{key} does not match its own checksum: it was damaged after it was committed"
        raise ChecksumError(text, key=key, expected=seal.group(1).decode(), actual=actual)
    tree = parse_strict_json(data, key)
    _check_version(tree, key)
    if tree.pop("manifest_crc64nvme", None) is None:
        text = f"{key} has its closing checksum under another name"
        raise ManifestError(text, key=key)
    try:
        manifest = msgspec.convert(tree, Manifest)
    except msgspec.ValidationError as error:
        text = f"{key} is not a manifest of format {FORMAT_MAJOR}.{FORMAT_MINOR}: {error}"
        raise ManifestError(text, key=key) from error
    _check_consistent(manifest, key)
    return manifest


def _check_version(tree: Any, key: str) -> None:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
        text = f"{key} is not a Shardpoint manifest"
        raise UnsupportedFormatError(text)
    version = tree.get("version")
    if not (isinstance(version, list) and len(version) == 2 and all(type(part) is int for part in version)):  # noqa: PLR2004 - major, minor
        text = f"{key} has no readable format version"
        raise ManifestError(text, key=key)
    if version[0] != FORMAT_MAJOR or version[1] > FORMAT_MINOR:
        text = (
            f"{key} is of format {version[0]}.{version[1]}; this release reads {FORMAT_MAJOR}.0 to "
            f"{FORMAT_MAJOR}.{FORMAT_MINOR}: install a newer Shardpoint"
        )
        raise UnsupportedFormatError(text)


def _check_consistent(manifest: Manifest, key: str) -> None:
    check_relative_path(manifest.name)
    paths = [entry.path for entry in manifest.files]
    for path in paths:
        check_relative_path(path)
    if "/" in manifest.name or len(set(paths)) != len(paths) or MANIFEST_NAME in paths:
        text = f"{key} has a name of several components, or lists a file twice, or itself"
        raise ManifestError(text, key=key)
    names = {(tensor.part, tensor.fqn, tensor.state) for tensor in manifest.tensors}
    keys = {(tensor.file, tensor.key) for tensor in manifest.tensors}
    if len(names) != len(manifest.tensors) or len(keys) != len(manifest.tensors):
        text = f"{key} lists a tensor twice"
        raise ManifestError(text, key=key)
    by_file: dict[int, list[TensorEntry]] = defaultdict(list)
    for tensor in manifest.tensors:
        if tensor.file >= len(paths):
            text = f"{key}: tensor {tensor.key} is in file {tensor.file}, which is not listed"
            raise ManifestError(text, key=key)
        by_file[tensor.file].append(tensor)
        if tensor.num_bytes != sized_bytes(*stored_form(tensor.dtype, tensor.shape)):
            kind = f"{tensor.dtype} {list(tensor.shape)}"
            text = f"{key}: tensor {tensor.key} of {kind} cannot have {tensor.num_bytes} bytes"
            raise ManifestError(text, key=key)
    for index, tensors in by_file.items():
        _check_ranges(tensors, manifest.files[index], key)


def _check_ranges(tensors: list[TensorEntry], file: FileEntry, key: str) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda entry: (entry.byte_offset, entry.num_bytes)):
        if tensor.byte_offset < position:
            text = f"{key}: tensor {tensor.key} overlaps another in {file.path}"
            raise ManifestError(text, key=key)
        position = tensor.byte_offset + tensor.num_bytes
    if position > file.size_bytes:
        text = f"{key}: tensors end at byte {position}, behind the end of {file.path}"
        raise ManifestError(text, key=key)
