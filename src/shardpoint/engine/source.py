"""What a load reads from: a committed checkpoint with its manifest, or plain safetensors files without one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from shardpoint.checksum import crc64, to_hex
from shardpoint.commit import Committed, find_committed, read_manifest
from shardpoint.container import header_size_bytes, parse_header
from shardpoint.errors import (
    CheckpointError,
    ChecksumError,
    ManifestError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
)
from shardpoint.manifest import FORMAT_MAJOR, FORMAT_MINOR, FORMAT_NAME, FileEntry, Manifest, TensorEntry
from shardpoint.storage import Store

STATES_KEY = "shardpoint_states"
GROUPS_KEY = "shardpoint_param_groups"


@dataclass(frozen=True, slots=True)
class Source:
    """One readable checkpoint.

    Attributes:
        store: where it is.
        key: its directory, relative to the store.
        manifest: what it has; made from the files' headers where it has none.
        sealed: whether there is a manifest: only then can bytes be verified.
        documents: path -> contents, for documents that are not files (a header's texts).
    """

    store: Store
    key: str
    manifest: Manifest
    sealed: bool
    documents: Mapping[str, bytes]

    def path(self, name: str) -> str:
        """Return the key of one of its files."""
        return f"{self.key}/{name}" if self.key else name

    def document(self, name: str) -> bytes | None:
        """Return a document, checked against the manifest; None where the checkpoint has none of that name.

        Raises:
            TruncatedError: it is listed and missing, or has another size.
            ChecksumError: its bytes are not what was committed.
        """
        if name in self.documents:
            return self.documents[name]
        entry = self.manifest.file(name)
        if entry is None:
            return None
        try:
            data = self.store.read_bytes(self.path(name))
        except NotFoundError as error:
            raise self.gone(name, error) from error
        if len(data) != entry.size_bytes:
            text = f"{name} of {self.manifest.name} has {len(data)} bytes, {entry.size_bytes} were committed"
            raise TruncatedError(text, key=name, expected=str(entry.size_bytes), actual=str(len(data)))
        actual = to_hex(crc64(data))
        if actual != entry.crc64nvme:
            text = f"{name} of {self.manifest.name} does not have the checksum that was committed"
            raise ChecksumError(text, key=name, expected=entry.crc64nvme, actual=actual)
        return data

    def gone(self, name: str, error: CheckpointError) -> CheckpointError:
        """Tell what it means that a listed file is not there: pruned meanwhile, or lost.

        The manifest under the name decides: the same id means that a committed file is missing.
        """
        try:
            same = read_manifest(self.store, self.key).checkpoint_id == self.manifest.checkpoint_id
        except CheckpointError:
            same = False
        if same:
            text = f"{name} of {self.manifest.name} is missing, though it was committed"
            return TruncatedError(text, key=name, expected="a file", actual="nothing")
        text = f"{self.manifest.name} was pruned or replaced while it was read ({error}): look again"
        return NotFoundError(text)


def open_committed(store: Store, name: str) -> Source:
    """Open a committed checkpoint of a root.

    Raises:
        NotFoundError: nothing of that name is there.
        TornCheckpointError: a directory is there, but was never committed.
        CorruptionError: its manifest is damaged.
        UnsupportedFormatError: it is of a newer format.
    """
    committed = find_committed(store, name)
    if committed is None:
        if store.exists(name):
            text = (
                f"{name} in {store.location} has no manifest: it was never committed by Shardpoint (a torn save, or "
                "another program's directory). Use an earlier checkpoint: `shardpoint ls` lists the committed ones"
            )
            raise TornCheckpointError(text)
        text = f"there is no checkpoint {name} in {store.location}: `shardpoint ls` lists those that are"
        raise NotFoundError(text)
    return source_of(store, committed)


def source_of(store: Store, committed: Committed) -> Source:
    """Open a checkpoint that a listing found.

    Raises:
        CorruptionError: its manifest is damaged.
        UnsupportedFormatError: it is of a newer format.
    """
    if committed.manifest is None:
        assert committed.problem is not None  # noqa: S101 - a listing has one or the other
        raise committed.problem
    return Source(store, committed.key, committed.manifest, sealed=True, documents={})


def open_plain(store: Store, name: str, part: str, *, is_file: bool) -> Source:
    """Open safetensors files that have no manifest: one file, or a Hugging Face model directory.

    Args:
        store: the parent directory.
        name: the file or directory.
        part: the part that its tensors count as.
        is_file: which of the two.

    Raises:
        NotFoundError: there are no safetensors files.
        CorruptionError: a header is not exact, or the index names a file or tensor that is not there.
    """
    if is_file:
        names, prefix = [name], ""
    else:
        names, prefix = _listed_files(store, name), name
    files: list[FileEntry] = []
    tensors: list[TensorEntry] = []
    documents: dict[str, bytes] = {}
    for index, file in enumerate(names):
        key = f"{prefix}/{file}" if prefix else file
        reader = store.open_reader(key)
        try:
            first = bytearray(8)
            if reader.size_bytes >= len(first):
                reader.read_into(memoryview(first), 0)
                header = bytearray(header_size_bytes(bytes(first), reader.size_bytes, key))
                reader.read_into(memoryview(header), 0)
            else:
                header = bytearray(header_size_bytes(b"", reader.size_bytes, key))
            layout = parse_header(bytes(header), reader.size_bytes, key)
        finally:
            reader.close()
        files.append(FileEntry(file, layout.num_bytes, ""))
        states = _states(layout.metadata.get(STATES_KEY, "{}"), key)
        if GROUPS_KEY in layout.metadata:
            documents["param_groups.json"] = layout.metadata[GROUPS_KEY].encode()
        for tensor in layout.tensors:
            fqn, state = states.get(tensor.name, (tensor.name, None))
            tensors.append(
                TensorEntry(
                    part,
                    fqn,
                    state,
                    tensor.name,
                    tensor.dtype,
                    tensor.shape,
                    index,
                    tensor.byte_offset,
                    tensor.num_bytes,
                    "",
                )
            )
    return Source(store, prefix, unsealed_manifest(name, files, tensors), sealed=False, documents=documents)


def unsealed_manifest(
    name: str, files: list[FileEntry], tensors: list[TensorEntry], checkpoint_id: str = "0" * 32
) -> Manifest:
    """Return what stands for a manifest where none is stored: it lists files and tensors, and has no checksums."""
    return Manifest(
        format=FORMAT_NAME,
        version=(FORMAT_MAJOR, FORMAT_MINOR),
        checkpoint_id=checkpoint_id,
        replaces=None,
        sequence="0" * 12,
        name=name,
        epoch=None,
        step=None,
        sample_start_index=None,
        created_utc="",
        library="",
        world_size=0,
        roles=[""],
        metrics={},
        files=files,
        tensors=tensors,
    )


def _states(text: str, key: str) -> dict[str, tuple[str, str | None]]:
    """Return (parameter, state) of each tensor, from the text in an optimizer file's header."""
    try:
        found = {name: (str(fqn), str(state)) for name, (fqn, state) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestError(f"the header of {key} names its states in no known form: {error!r}", key=key) from error
    return dict(found)


def _listed_files(store: Store, name: str) -> list[str]:
    present = {entry.name for entry in store.entries(name) if not entry.is_directory}
    indexes = sorted(file for file in present if file.endswith(".safetensors.index.json"))
    if not indexes:
        found = sorted(file for file in present if file.endswith(".safetensors"))
        if len(found) != 1:
            text = (
                f"{name} in {store.location} has no index and {len(found)} safetensors files: there is no model to load"
            )
            raise NotFoundError(text)
        return found
    if len(indexes) > 1:
        text = f"{name} in {store.location} has several indexes ({', '.join(indexes)}): keep the one to load"
        raise ManifestError(text, key=name)
    try:
        weight_map = json.loads(store.read_bytes(f"{name}/{indexes[0]}"))["weight_map"]
        wanted = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{name}/{indexes[0]} is not an index: {error!r}"
        raise ManifestError(text, key=f"{name}/{indexes[0]}") from error
    lost = [file for file in wanted if file not in present]
    if lost:
        text = f"{name}/{indexes[0]} names files that are not there: {', '.join(lost)}"
        raise TruncatedError(text, key=name)
    return wanted
