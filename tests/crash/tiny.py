"""What is the smallest checkpoint, and what is in a root when one looks at it without the library?"""

from __future__ import annotations

import json
from pathlib import Path

from shardpoint.checksum import combine, crc64, to_hex
from shardpoint.commit import Attempt, RootOwner, publish
from shardpoint.container import FileLayout, layout_file
from shardpoint.manifest import FORMAT_MAJOR, FORMAT_MINOR, FORMAT_NAME, FileEntry, Manifest, TensorEntry
from shardpoint.storage import Store, SyncPoint

PATH = "modeling/model.safetensors"
NUM_BYTES = 5000


def layout() -> FileLayout:
    """Return the only tensor file's layout."""
    return layout_file([("w", "U8", (NUM_BYTES,))])


def open_attempt(store: Store, owner: RootOwner, name: str, linked_from: str | None = None) -> Attempt:
    links = {} if linked_from is None else {PATH: f"{linked_from}/{PATH}"}
    return Attempt.open(store, owner, name, files={PATH: layout()}, directories=["extra"], links=links)


def write_tensors(attempt: Attempt, fill: int) -> None:
    """Do a rank's part: every byte of the tensor is `fill`."""
    writer = attempt.store.open_writer(f"{attempt.key}/{PATH}")
    try:
        writer.write_at(bytes([fill]) * NUM_BYTES, layout().tensors[0].byte_offset)
        writer.sync(SyncPoint.TENSOR_FILE)
    finally:
        writer.close()


def documents(fill: int) -> dict[str, bytes]:
    return {"running_states.json": json.dumps({"fill": fill}).encode(), "extra/note.json": b"{}"}


def manifest(attempt: Attempt, fill: int) -> Manifest:
    data = bytes([fill]) * NUM_BYTES
    whole = combine(crc64(layout().header), crc64(data), NUM_BYTES)
    files = [FileEntry(PATH, layout().num_bytes, to_hex(whole))]
    files += [FileEntry(path, len(text), to_hex(crc64(text))) for path, text in documents(fill).items()]
    offset = layout().tensors[0].byte_offset
    tensor = TensorEntry("modeling", "w", None, "w", "U8", (NUM_BYTES,), 0, offset, NUM_BYTES, to_hex(crc64(data)))
    return Manifest(
        format=FORMAT_NAME,
        version=(FORMAT_MAJOR, FORMAT_MINOR),
        checkpoint_id=attempt.attempt_id,
        replaces=attempt.replaces,
        sequence=f"{attempt.sequence:012d}",
        name=attempt.name,
        epoch=0,
        step=fill,
        sample_start_index=0,
        created_utc="2026-01-01T00:00:00Z",
        library="shardpoint tests",
        world_size=1,
        roles=[""],
        metrics={},
        files=files,
        tensors=[tensor],
    )


def save(store: Store, owner: RootOwner, name: str, fill: int, linked_from: str | None = None) -> Attempt:
    """Commit a checkpoint whose every part says `fill`; its tensors' file may be that of another one that does."""
    attempt = open_attempt(store, owner, name, linked_from)
    if PATH not in attempt.linked:
        write_tensors(attempt, fill)
    publish(attempt, documents(fill), manifest(attempt, fill))
    return attempt


def fill_of(directory: Path) -> int:
    """Return what every part of a checkpoint says, read without the library; raise where two parts disagree."""
    said = json.loads((directory / "shardpoint.json").read_text())["step"]
    told = json.loads((directory / "running_states.json").read_text())["fill"]
    data = (directory / PATH).read_bytes()
    if not (
        said == told and data[-NUM_BYTES:] == bytes([said]) * NUM_BYTES and (directory / "extra/note.json").is_file()
    ):
        raise AssertionError(f"{directory} is torn: manifest {said}, running states {told}, tensor {set(data[-9:])}")
    return int(said)
