"""How a committed checkpoint becomes one that `torch.distributed.checkpoint.load` reads, tensor by tensor.

torch's own writer writes it, from tensors that are views of the mapped files: what is in memory is what is being
written. Each tensor's checksum is compared when its turn comes, so that damage is never exported.
"""

from __future__ import annotations

import mmap
import os
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from shardpoint.adapters.collect import GROUPS_NAME
from shardpoint.adapters.documents import EXTRA_STATE_NAME, join
from shardpoint.adapters.tensors import live_values, stored_bytes, torch_dtype
from shardpoint.catalog import open_path
from shardpoint.checksum import crc64, to_hex
from shardpoint.engine import Source, source_of
from shardpoint.engine.training import optimizer_document
from shardpoint.errors import (
    AlreadyExistsError,
    CheckpointError,
    ChecksumError,
    MismatchError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UsageError,
)
from shardpoint.integrations.dcp_metadata import DEFAULT_KEYS, Keys
from shardpoint.manifest import TensorEntry
from shardpoint.storage import LocalStore, SyncPoint

StrPath = str | os.PathLike[str]

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: the new directory.
        num_tensors: how many tensors it has.
        num_bytes: their bytes; each was compared with its committed checksum.
        seconds: how long it took.
    """

    path: str
    num_tensors: int
    num_bytes: int
    seconds: float


def export_dcp(
    path: StrPath,
    directory: StrPath,
    *,
    role: str | None = None,
    optimizer: bool = True,
    flatten_optimizer: bool = False,
    keys: Keys = DEFAULT_KEYS,
    tied: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write one role of a committed checkpoint as a checkpoint of PyTorch's DCP.

    What is loaded from it is `{"model": ..., "optimizer": ...}`, in the form of torch's `get_state_dict`, on any number
    of ranks.

    Args:
        path: the committed checkpoint. It is only read.
        directory: the new directory; its parents are made.
        role: which role; None for the only one.
        optimizer: whether the optimizer goes with it.
        flatten_optimizer: write the param groups as `StateDictOptions(flatten_optimizer_state_dict=True)` has them, for
            programs that load so; the states have the same names either way.
        keys: under which keys of the dict the model and the optimizer go.
        tied: further name of a tied tensor -> the name that it is stored under; it is written under both, as torch's
            `get_model_state_dict` has it.

    Raises:
        NotFoundError: there is no such checkpoint.
        TornCheckpointError: it was never committed.
        AlreadyExistsError: the directory is there.
        UsageError: `role` is none of the checkpoint's, or it has something that DCP has no place for.
        MismatchError: it holds no optimizer, and `optimizer` is True; or a tied name's tensor is not there.
        CorruptionError: bytes are not those that were committed; nothing was written.
        StorageError: the system refused an operation.

    Durability:
        On return the directory is whole and survives power loss; before it nothing has its name. What a killed export
        leaves is called `.<name>.exporting-<id>`.

    Memory:
        The tensor that is being written; the files are mapped.
    """
    began = time.monotonic()
    store, committed = open_path(path)
    source = source_of(store, committed)
    chosen = _role(source, role)
    target = Path(os.path.abspath(directory))  # noqa: PTH100 - must not resolve symlinks
    beside = LocalStore(target.parent)
    if beside.exists(target.name):
        raise AlreadyExistsError(f"{target} is there: give another directory, or move it away")
    views = _Views(source)
    state: dict[str, Any] = {}
    _put(state, keys.model, _model(source, chosen, views, tied or {}))
    if optimizer:
        _put(state, keys.optimizer, _optimizer(source, chosen, views, flatten=flatten_optimizer))
    beside.make_root()
    made = f".{target.name}.exporting-{uuid.uuid4().hex}"
    beside.make_directory(made)
    try:
        planner = _CheckedPlanner(views)
        _write(state, beside.local_path(made), planner)
        views.check_all_were_compared()
        beside.sync_directory(made, SyncPoint.SUBDIRECTORY)
        beside.rename(made, target.name)
    except BaseException as error:
        try:
            beside.remove_tree(made)
        except CheckpointError as failed:
            error.add_note(f"{beside.local_path(made)} could not be deleted: {failed}")
        raise
    beside.sync_directory("", SyncPoint.PARENT)
    return ExportResult(str(target), planner.num_tensors, planner.num_bytes, time.monotonic() - began)


def _role(source: Source, role: str | None) -> str:
    roles, name = source.manifest.roles, source.manifest.name
    if source.manifest.step is None:
        raise UsageError(f"{name} is no training checkpoint: give one that `save_checkpoint` or a Checkpointer made")
    if role is None and len(roles) == 1:
        return roles[0]
    if role is None or role not in roles:
        asked = "give one of its roles" if role is None else f"there is no role {role!r}"
        raise UsageError(f"{name} has the roles {roles}: {asked}")
    return role


def _put(state: dict[str, Any], key: str, values: dict[str, Any]) -> None:
    if key:
        state[key] = values
    else:
        state.update(values)


class _Views:
    """Tensors that share the memory of mapped files."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._maps: dict[int, mmap.mmap] = {}
        self.entries: dict[int, TensorEntry] = {}
        self._unchecked: set[int] = set()

    def view(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor; its bytes are read when they are looked at.

        Raises:
            TruncatedError: its file is missing, or has another size.
        """
        dtype = torch_dtype(entry.dtype)
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._map(entry.file)
        count = entry.num_bytes // dtype.itemsize
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.byte_offset).view(entry.shape)
        self.entries[tensor.data_ptr()] = entry
        self._unchecked.add(tensor.data_ptr())
        return tensor

    def check(self, tensor: torch.Tensor, name: str) -> None:
        """Compare a view's bytes with the committed checksum.

        Raises:
            ChecksumError: they differ.
        """
        entry = self.entries.get(tensor.data_ptr())
        if entry is None:  # a counter out of a document, whose bytes were compared when it was read
            return
        crc = 0
        for block in stored_bytes(tensor).split(_BLOCK_BYTES):
            crc = crc64(block.numpy().data, crc)
        if to_hex(crc) != entry.crc64nvme:
            path = self.source.manifest.files[entry.file].path
            text = f"{path} of {self.source.manifest.name} is damaged: {name} has not the checksum that was committed"
            raise ChecksumError(text, key=f"{path}#{entry.key}", expected=entry.crc64nvme, actual=to_hex(crc))
        self._unchecked.discard(tensor.data_ptr())

    def check_all_were_compared(self) -> None:
        """Refuse an export of which a tensor was written without having been compared.

        Raises:
            StorageError: torch wrote a tensor that is not the view that it was given.
        """
        if self._unchecked:
            first = self.entries[min(self._unchecked)]
            text = f"torch wrote {len(self._unchecked)} tensors from other memory (one is {first.fqn}): not exported"
            raise StorageError(text, key=first.key, op="write", errno=None)

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            listed = self.source.manifest.files[number]
            try:
                # Private, so that nothing written to a view could reach a committed file.
                with Path(self.source.store.local_path(self.source.path(listed.path))).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != listed.size_bytes:
                        text = f"{listed.path} has {size} bytes, {listed.size_bytes} were committed"
                        raise TruncatedError(text, key=listed.path, expected=str(listed.size_bytes), actual=str(size))
                    self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError as error:
                raise self.source.gone(listed.path, NotFoundError(str(error))) from error
        return self._maps[number]


def _model(source: Source, role: str, views: _Views, tied: Mapping[str, str]) -> dict[str, Any]:
    modeling, adapters = join(role, "modeling"), join(role, "adapter")
    if source.manifest.file(join(modeling, EXTRA_STATE_NAME)) is not None:
        text = f"{source.manifest.name} holds extra states of modules ({modeling}/{EXTRA_STATE_NAME}): not exported"
        raise UsageError(text)
    entries = [
        entry for entry in source.manifest.tensors if entry.part == modeling or entry.part.startswith(f"{adapters}/")
    ]
    tensors = {entry.fqn: views.view(entry) for entry in entries}
    for alias, name in tied.items():
        if alias in tensors or name not in tensors:
            problem = f"{alias} is stored by itself" if alias in tensors else f"{name} is not there"
            raise MismatchError(
                f"{alias} cannot be tied to {name} in {source.manifest.name}: {problem}", missing=[name]
            )
        tensors[alias] = tensors[name]
    return tensors


def _optimizer(source: Source, role: str, views: _Views, *, flatten: bool) -> dict[str, Any]:
    part = join(role, "optimizer")
    path = join(part, GROUPS_NAME)
    data = source.document(path)
    if data is None:
        text = f"{source.manifest.name} holds no optimizer ({path}): export without it"
        raise MismatchError(text, missing=[path])
    document: Mapping[str, Any] = optimizer_document(data, path)
    if document.get("nested"):
        raise UsageError(f"{part}: states within states have no place in DCP's form: export without the optimizer")
    states: dict[str, dict[str, Any]] = {
        name: {state: live_values(value) for state, value in values.items()}
        for name, values in document["states"].items()
    }
    for entry in source.manifest.tensors:
        if entry.part == part and entry.state is not None:
            states.setdefault(entry.fqn, {})[entry.state] = views.view(entry)
    groups = [(list(group["params"]), live_values(group["options"])) for group in document["groups"]]
    if not flatten:
        return {"state": states, "param_groups": [{**options, "params": names} for names, options in groups]}
    flat = {f"state.{name}.{state}": value for name, values in states.items() for state, value in values.items()}
    for names, options in groups:
        flat |= {f"param_groups.{name}.{option}": value for name in names for option, value in options.items()}
    return flat


class _CheckedPlanner(DefaultSavePlanner):
    """Compares each tensor's checksum when it is about to be written."""

    def __init__(self, views: _Views) -> None:
        super().__init__()
        self._views = views
        self.failure: CheckpointError | None = None
        self.num_tensors = 0
        self.num_bytes = 0

    def resolve_data(self, write_item: Any) -> Any:
        """Return what is written next."""
        data = super().resolve_data(write_item)
        if isinstance(data, torch.Tensor):
            try:
                self._views.check(data, write_item.index.fqn)
            except CheckpointError as error:
                self.failure = error
                raise
            self.num_tensors += 1
            self.num_bytes += data.nbytes
        return data


def _write(state: dict[str, Any], path: str, planner: _CheckedPlanner) -> None:
    writer = FileSystemWriter(path, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(state, storage_writer=writer, planner=planner, no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        # torch's exception is no Exception, and holds ours.
        if planner.failure is not None:
            raise planner.failure from error
        causes = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        first = next(iter(causes))[0]
        text = f"writing {path} failed: {first}; nothing was exported"
        raise StorageError(text, key=path, op="write", errno=getattr(first, "errno", None)) from error
