"""What one try at saving a step is on disk before it is committed: directories, sized files, headers.

The coordinator alone opens an attempt: it makes every directory and every tensor file, reserves the space (so a full
disk fails here, before a byte moved) and writes the headers. Ranks then open the files without creating or truncating
them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardpoint.commit.ownership import RootOwner
from shardpoint.commit.visible import CONTROL_DIRECTORY, find_committed, read_manifest
from shardpoint.container import FileLayout
from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    CorruptionError,
    NotFoundError,
    UnsupportedFormatError,
    UsageError,
)
from shardpoint.manifest import MANIFEST_NAME
from shardpoint.storage import Store

# A directory's name may have 255 bytes, and the attempt's has 48 more than the checkpoint's, once it is fenced.
MAX_NAME_BYTES = 200


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a checkpoint.

    Raises:
        UsageError: it is not one path component, is reserved, or is too long.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name or name.startswith(CONTROL_DIRECTORY):
        text = f"{name!r} cannot be the name of a checkpoint: it must be one path component"
        raise UsageError(text)
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        text = f"{name!r} is too long for the name of a checkpoint: {MAX_NAME_BYTES} bytes at most"
        raise UsageError(text)


@dataclass
class Attempt:
    """One try; made by `Attempt.open` on the coordinator.

    Attributes:
        store: the root.
        owner: the hold on it.
        name: the name that it will have when it is committed.
        attempt_id: 32 hex digits; becomes the checkpoint's id.
        sequence: the commit sequence number, taken when the save started.
        replaces: the id of the checkpoint that now has the name, or None.
        directories: every directory in it, relative to it, parents first.
        notes: what a person should know (space that could not be reserved).
        linked: files that are an earlier checkpoint's, under one more name.
    """

    store: Store
    owner: RootOwner
    name: str
    attempt_id: str
    sequence: int
    replaces: str | None
    directories: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    linked: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        """Where the attempt is, relative to the root."""
        return f"{self.owner.key}/attempt-{self.name}-{self.attempt_id}"

    @classmethod
    def open(
        cls,
        store: Store,
        owner: RootOwner,
        name: str,
        *,
        files: Mapping[str, FileLayout] | None = None,
        directories: Iterable[str] = (),
        links: Mapping[str, str] | None = None,
        replace_file: bool = False,
    ) -> Attempt:
        """Make the attempt's directories and files.

        Args:
            store: the root.
            owner: the hold on it.
            name: the name to commit to, one path component.
            files: path relative to the attempt -> layout, for each tensor file; its header is written.
            directories: further directories, relative to the attempt.
            links: path -> the committed file, relative to the root, that has the same bytes: it is linked, and where
                that cannot be, the file is made like the others.
            replace_file: the attempt's only file is to be committed, over a file of that name if there is one.

        Raises:
            UsageError: the name is not one path component, or too long.
            AlreadyExistsError: something that is not a committed checkpoint has the name.
            FencedError: the root was lost.
            StorageError: for example no space; what was made is deleted again. Or this run's counter could not be
                renewed: the root's filesystem is in trouble, and a run on another machine may take the root over.
        """
        check_name(name)
        owner.check_alive(store)
        owner.check_heartbeat()
        present = find_committed(store, name)
        is_file = any(entry.name == name and not entry.is_directory for entry in store.entries(""))
        if replace_file and present is not None:
            text = f"{name} in {store.location} is a committed checkpoint, not a file: give another name"
            raise AlreadyExistsError(text)
        if (present is None or present.key != name) and store.exists(name) and not (replace_file and is_file):
            text = (
                f"{name} in {store.location} is there and is not a committed Shardpoint checkpoint: move it away, or "
                "save to another directory"
            )
            raise AlreadyExistsError(text)
        replaces = present.manifest.checkpoint_id if present is not None and present.manifest is not None else None
        attempt = cls(store, owner, name, uuid.uuid4().hex, owner.take_sequence(), replaces)
        try:
            attempt._make(files or {}, directories, links or {})
        except BaseException as error:
            attempt.abandon(error)
            if isinstance(error, NotFoundError):
                owner.check_alive(store)
            raise
        return attempt

    def _make(self, files: Mapping[str, FileLayout], directories: Iterable[str], links: Mapping[str, str]) -> None:
        wanted: set[str] = set()
        for path in [*directories, *(path.rpartition("/")[0] for path in files)]:
            while path:
                wanted.add(path)
                path = path.rpartition("/")[0]  # noqa: PLW2901 - walks up to the top
        self.store.make_directory(self.key)
        self.directories = sorted(wanted, key=lambda path: (path.count("/"), path))
        for directory in self.directories:
            self.store.make_directory(f"{self.key}/{directory}")
        for path, layout in files.items():
            if path in links and self._link(links[path], path):
                self.linked.add(path)
                continue
            note = self.store.create_file(f"{self.key}/{path}", layout.num_bytes)
            if note is not None and note not in self.notes:
                self.notes.append(note)
            writer = self.store.open_writer(f"{self.key}/{path}")
            try:
                writer.write_at(layout.header, 0)
            finally:
                writer.close()

    def _link(self, source: str, path: str) -> bool:
        """Give a committed file one more name here; return whether that was possible."""
        try:
            return self.store.link(source, f"{self.key}/{path}")
        except NotFoundError:
            # Race: pruned meanwhile, or this attempt is gone, which making the file finds.
            return False

    def abandon(self, reason: BaseException) -> None:
        """Delete a failed attempt; where that fails too, say so on the error that is on its way up.

        After an exchange of names the attempt's place holds the checkpoint that it replaced: that one is left to the
        next owner, who deletes it once the root is durable.

        Args:
            reason: the error; the next owner of the root sweeps what could not be deleted.
        """
        try:
            if self.store.exists(self.key) and self.id_in_place() != self.attempt_id:
                self.store.remove_tree(self.key, first=MANIFEST_NAME)
        except CheckpointError as error:
            reason.add_note(f"the torn attempt {self.key} could not be deleted ({error}); the next run sweeps it")

    def id_in_place(self) -> str | None:
        """Return the id of the checkpoint that has the attempt's name now, or None where none can be read there."""
        try:
            return read_manifest(self.store, self.name).checkpoint_id
        except (NotFoundError, CorruptionError, UnsupportedFormatError):
            return None
