"""How one part is saved or loaded by itself: a model directory, a single file, an optimizer, a scheduler, an adapter.

These are what the Booster's persistence methods do. Each writes through the same engine: all or nothing, verified on
load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardpoint.adapters import lora
from shardpoint.adapters.collect import GROUPS_NAME, Collected
from shardpoint.adapters.documents import (
    EXTRA_STATE_NAME,
    join,
    match_extra_states,
    scheduler_document,
    scheduler_state,
)
from shardpoint.adapters.names import name_tensors
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.load import Target, load
from shardpoint.engine.opening import SaveRequest
from shardpoint.engine.results import LoadResult, SaveResult
from shardpoint.engine.save import BUDGET_BYTES, save
from shardpoint.engine.source import GROUPS_KEY, STATES_KEY, Source, open_committed, open_plain
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.training import optimizer_document
from shardpoint.errors import MismatchError, NotFoundError, UnsupportedFormatError, UsageError
from shardpoint.manifest import MANIFEST_NAME, encode_document
from shardpoint.planning import PartNaming
from shardpoint.storage import BufferPool, LocalStore, replace_document

StrPath = str | os.PathLike[str]

_cache = StructureCache()
_pool = BufferPool(BUDGET_BYTES)


def _split(path: StrPath) -> tuple[LocalStore, str]:
    """Return the store of a path's parent directory, and the path's own name."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - must not resolve symlinks
    if not absolute.name:
        raise UsageError(f"{path} is the root of the filesystem: give a directory or a file in it")
    return LocalStore(absolute.parent), absolute.name


def save_model_directory(
    model: nn.Module, path: StrPath, *, comm: Comm, max_file_bytes: int, variant: str | None = None
) -> SaveResult:
    """Save a model as a plain Hugging Face model directory, with a manifest beside its files.

    Args:
        model: wrapped or not.
        path: the directory; one that an earlier call saved is replaced.
        comm: the ranks.
        max_file_bytes: the largest file.
        variant: transformers' variant, or None.

    Raises:
        UsageError: something in the model cannot be saved, or the ranks asked for different saves.
        AlreadyExistsError: a directory that is not ours is there.
        RootBusyError: another living run saves to the same parent directory.
        PeerError: a rank failed; nothing was committed.
        CommitUnknownError: this rank heard no verdict.

    Collective:
        All ranks.

    Durability:
        On return the directory is whole and survives power loss.
    """

    def collect() -> Collected:
        collected = Collected(comm.rank)
        collected.naming[""] = PartNaming("model", variant=variant)
        named = name_tensors(model)
        collected.add_model(named, "", "adapter")
        collected.add_extra_state(named, "")
        if comm.is_coordinator:
            collected.add_model_documents(named, "", "adapter", None)
        return collected

    store, name = _split(path)
    return save(store, comm, SaveRequest(name, collect, max_file_bytes=max_file_bytes), _cache, pool=_pool)


def save_model_file(model: nn.Module, path: StrPath, *, comm: Comm) -> SaveResult:
    """Save a model's weights as one safetensors file, over a file that is there.

    Such a file has no manifest: a load checks its header, but cannot verify its bytes. Raises, collective and
    durability as `save_model_directory`.
    """

    def collect() -> Collected:
        collected = Collected(comm.rank)
        collected.naming[""] = PartNaming("model", single=True)
        named = name_tensors(model)
        if lora.adapter_names(named.root) or named.extra_states:
            raise UsageError("adapters and extra states do not fit into one file: save a directory (shard=True)")
        collected.add_model(named, "", "")
        return collected

    store, name = _split(path)
    return save(store, comm, SaveRequest(name, collect, as_file=True), _cache, pool=_pool)


def save_adapter_directory(model: nn.Module, path: StrPath, *, comm: Comm, adapter: str = "default") -> SaveResult:
    """Save an adapter as a directory that `PeftModel.from_pretrained` opens; otherwise as `save_model_directory`."""

    def collect() -> Collected:
        everything = Collected(comm.rank)
        named = name_tensors(model)
        everything.add_model(named, "\0base", "\0adapter")
        part = join("\0adapter", adapter)
        if part not in everything.naming:
            raise UsageError(f"the model has no adapter {adapter!r}: it has {lora.adapter_names(named.root)}")
        collected = everything.only(part, "")
        if comm.is_coordinator:
            collected.coordinator_documents["adapter_config.json"] = lora.adapter_config(named.root, adapter)
        return collected

    store, name = _split(path)
    return save(store, comm, SaveRequest(name, collect), _cache, pool=_pool)


def save_optimizer_directory(
    optimizer: Optimizer,
    model: nn.Module,
    path: StrPath,
    *,
    comm: Comm,
    max_file_bytes: int,
    variant: str | None = None,
) -> SaveResult:
    """Save an optimizer's state by parameter name; otherwise as `save_model_directory`.

    Args:
        optimizer: not stepped, not changed.
        model: the model that it steps, for the names.
        path: the directory.
        comm: the ranks.
        max_file_bytes: the largest file.
        variant: stands in the files' names, or None.
    """

    def collect() -> Collected:
        collected = Collected(comm.rank)
        collected.naming[""] = PartNaming("optimizer", variant=variant)
        collected.add_optimizer(optimizer, name_tensors(model), "")
        return collected

    store, name = _split(path)
    return save(store, comm, SaveRequest(name, collect, max_file_bytes=max_file_bytes), _cache, pool=_pool)


def save_optimizer_file(optimizer: Optimizer, model: nn.Module, path: StrPath, *, comm: Comm) -> SaveResult:
    """Save an optimizer's state as one safetensors file whose header holds the param groups; as `save_model_file`."""

    def collect() -> Collected:
        collected = Collected(comm.rank)
        collected.add_optimizer(optimizer, name_tensors(model), "")
        states = {fact.key: [fact.fqn, fact.state] for fact in collected.table.facts}
        metadata = {
            GROUPS_KEY: encode_document(collected.optimizer_documents.pop("")).decode(),
            STATES_KEY: json.dumps(states, ensure_ascii=False),
        }
        collected.naming[""] = PartNaming("optimizer", single=True, metadata=metadata)
        return collected

    store, name = _split(path)
    return save(store, comm, SaveRequest(name, collect, as_file=True), _cache, pool=_pool)


def save_lr_scheduler(lr_scheduler: Any, path: StrPath, *, comm: Comm) -> None:
    """Save a scheduler's state as one JSON file, over a file that is there.

    Raises:
        UsageError: the state cannot come back exactly, or differs between ranks.
        NotFoundError: the directory is not there.
        StorageError: the coordinator could not write it; the old file is untouched.

    Collective:
        All ranks: one round; the coordinator writes.

    Durability:
        On return the file survives power loss.
    """
    store, name = _split(path)

    def write(ballots: Any) -> bool:
        if len(set(ballots)) > 1:
            raise UsageError(f"{name}: the scheduler's state differs between ranks")
        replace_document(store, name, ballots[0])
        return True

    agree(comm, "save lr_scheduler", lambda: scheduler_document(lr_scheduler, name), bytes, write, bool)


def load_lr_scheduler(lr_scheduler: Any, path: StrPath, *, comm: Comm) -> None:
    """Load a scheduler's state from a JSON file that `save_lr_scheduler` wrote.

    Raises:
        NotFoundError: the file is not there.
        ManifestError: it is not such a file.
        MismatchError: it is of a scheduler of another class.

    Collective:
        All ranks: one round.
    """
    store, name = _split(path)

    def read() -> bool:
        values, problem = scheduler_state(lr_scheduler, store.read_bytes(name), name)
        if problem is not None:
            raise MismatchError(f"{problem}; nothing was changed", mismatched=[problem])
        lr_scheduler.load_state_dict(values)
        return True

    agree(comm, "load lr_scheduler", read, bool, lambda _: True, bool)


def locate(path: StrPath, kind: str) -> Callable[[], tuple[Source, str]]:
    """Return what opens a path: a directory of ours, a part inside one of ours, or plain safetensors files.

    Args:
        path: what the user gave.
        kind: the part that a whole training checkpoint is asked for: `"modeling"` or `"optimizer"`.
    """
    store, name = _split(path)

    def open_it() -> tuple[Source, str]:
        full = Path(store.location) / name
        if full.is_file():
            return open_plain(store, name, "", is_file=True), ""
        if not full.is_dir():
            raise NotFoundError(f"there is no {full}: give a file or a directory that was saved")
        inside: list[str] = []
        place = full
        for _ in range(3):  # a part of a checkpoint lies at most two levels below it: <checkpoint>/<role>/modeling
            if (place / MANIFEST_NAME).is_file():
                source = open_committed(LocalStore(place.parent), place.name)
                parts = {tensor.part for tensor in source.manifest.tensors}
                part = "/".join(reversed(inside))
                if not inside and "" not in parts and source.manifest.epoch is not None:
                    part = kind
                if not parts and source.manifest.epoch is not None:
                    text = f"{place.name} holds another library's files: load it with that library's Booster"
                    raise UnsupportedFormatError(text)
                return source, part
            inside.append(place.name)
            place = place.parent
        return open_plain(store, name, "", is_file=False), ""

    return open_it


def load_model(model: nn.Module, path: StrPath, *, comm: Comm, strict: bool = True) -> LoadResult:
    """Load weights in place.

    Args:
        model: wrapped or not; its FSDP2 modules are resharded.
        path: a directory that was saved, `modeling/` of a checkpoint, a whole checkpoint, a Hugging Face model
            directory with safetensors, or one safetensors file.
        comm: the ranks.
        strict: whether missing and unexpected names are errors.

    Raises:
        NotFoundError: nothing is there.
        MismatchError: names, shapes or dtypes differ; nothing was changed.
        CorruptionError: the bytes are not those that were committed; see `target_modified`.

    Collective:
        All ranks.
    """
    open_it = locate(path, "modeling")
    part = ""

    def open_source() -> Source:
        nonlocal part
        source, part = open_it()
        return source

    def prepare(source: Source) -> Target:
        named = name_tensors(model)
        collected = Collected(comm.rank)
        # The adapters' directory stands beside `modeling/`, or inside a directory that is the model itself.
        adapters = join(part.rpartition("/")[0], "adapter")
        collected.add_model(named, part, adapters)
        collected.problems += collected.untied(source.manifest)
        parts = {part, *(join(adapters, name) for name in lora.adapter_names(named.root))}
        extra = match_extra_states(named, source.document(join(part, EXTRA_STATE_NAME)), part)
        collected.missing_of += extra.missing
        collected.unexpected_of += extra.unexpected
        return Target(collected, frozenset(parts), extra.install)

    return load(comm, open_source, prepare, _cache, strict=strict)


def load_optimizer(optimizer: Optimizer, model: nn.Module, path: StrPath, *, comm: Comm) -> LoadResult:
    """Load an optimizer's state in place, by parameter name, without stepping or casting; otherwise as `load_model`.

    Args:
        optimizer: fresh or used.
        model: the model that it steps.
        path: a directory or file that was saved, `optimizer/` of a checkpoint, or a whole checkpoint.
        comm: the ranks.
    """
    open_it = locate(path, "optimizer")
    part = ""

    def open_source() -> Source:
        nonlocal part
        source, part = open_it()
        return source

    def prepare(source: Source) -> Target:
        groups = join(part, GROUPS_NAME)
        data = source.document(groups)
        if data is None:
            raise MismatchError(f"{source.manifest.name} holds no optimizer state ({groups})", missing=[groups])
        collected = Collected(comm.rank)
        document = optimizer_document(data, groups)
        collected.add_optimizer_target(optimizer, name_tensors(model), part, document, source.manifest)

        def install() -> None:
            for target in collected.optimizers:
                target.install()

        return Target(collected, frozenset({part}), install)

    return load(comm, open_source, prepare, _cache)
