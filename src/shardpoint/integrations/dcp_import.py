"""How a checkpoint that PyTorch's DCP wrote becomes a committed checkpoint: read without running anything, then saved.

Tensors and values are read with `torch.load(weights_only=True)`, from the places that `.metadata` tells of; each tensor
when its bytes are written, so that one at a time is in memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.documents import join
from shardpoint.adapters.hugging_face import TOKENIZER_FILES
from shardpoint.adapters.state import TrainState, as_roles
from shardpoint.adapters.tensors import plain_values, raw_tensor, stored_bytes
from shardpoint.adapters.torch_files import read_values
from shardpoint.comm import SoloComm
from shardpoint.commit import find_committed
from shardpoint.engine import (
    BUDGET_BYTES,
    SaveRequest,
    SaveResult,
    StructureCache,
    checkpoint_name,
    run_state,
    running_states,
    save,
)
from shardpoint.engine.carried import RUNNING_STATES_NAME
from shardpoint.errors import (
    AlreadyExistsError,
    MismatchError,
    NotFoundError,
    StorageError,
    UnsupportedFormatError,
    UsageError,
)
from shardpoint.integrations.dcp_metadata import DEFAULT_KEYS, Keys, Piece, Stored, read_metadata
from shardpoint.planning import PartNaming
from shardpoint.storage import BufferPool, LocalStore

StrPath = str | os.PathLike[str]

_MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_MAX_NAMED = 5


def import_dcp(
    directory: StrPath,
    root: StrPath,
    *,
    epoch: int,
    step: int,
    batch_size: int,
    optimizer_class: str | None,
    role: str = "",
    keys: Keys = DEFAULT_KEYS,
    tied: Mapping[str, str] | None = None,
    model_files: StrPath | None = None,
) -> SaveResult:
    """Make a committed checkpoint of one that `torch.distributed.checkpoint.save` wrote.

    Weights, and the optimizer's states and options, go in bit for bit. What a DCP checkpoint does not have, or has in a
    form of the trainer's own (scheduler, sampler, random state), is not imported: resume without it.

    Args:
        directory: the DCP checkpoint. It is only read.
        root: the directory of checkpoints that gets `epoch-{epoch}_step-{step}`.
        epoch: the epoch that the run was in.
        step: steps done.
        batch_size: samples of a step, over all ranks.
        optimizer_class: the name of the optimizer's class, which DCP does not record (`"AdamW"`); None leaves the
            optimizer out, if there is one.
        role: the role that the model gets; `""` for a checkpoint of a single model.
        keys: under which keys of the saved dict the model and the optimizer lie.
        tied: further name of a tied tensor -> the name that it is stored under. DCP stores both; they must be equal.
        model_files: a model directory whose configuration and tokenizer files go beside the weights.

    Returns:
        The evidence of the save.

    Raises:
        NotFoundError: there is no DCP checkpoint, or no model in it; or `model_files` is not there.
        AlreadyExistsError: the root has a checkpoint of that name.
        UnsupportedFormatError: `.metadata` names anything but DCP's own classes, or a value is more than plain data.
        ManifestError: `.metadata` is damaged, or contradicts itself.
        TruncatedError: a file is missing, too short or damaged.
        MismatchError: an optimizer class is given and there is no optimizer, or its state does not fit the model; or
            tied tensors differ.
        UsageError: an argument is wrong, or a value cannot be stored.
        RootBusyError: a living run owns the root.
        StorageError: the system refused an operation.

    Durability:
        On return the checkpoint is committed and survives power loss; before it, nothing is visible.

    Memory:
        64 MiB, the largest tensor, and its largest stored part twice; two of those that are said to be tied.
    """
    run = run_state(epoch, step, batch_size)
    if role:
        as_roles({role: TrainState(model=nn.Module())})  # refuses what cannot be a role
    store, name = LocalStore(root), checkpoint_name(epoch, step)
    if store.exists("") and find_committed(store, name) is not None:
        text = f"{root} has {name} already: prune it, move it away, or import with another epoch and step"
        raise AlreadyExistsError(text)
    reader = _Reader(Path(directory), read_metadata(Path(directory)))
    documents = _model_files(model_files)

    def collect() -> Collected:
        collected = Collected(0)
        modeling, optimizer = join(role, "modeling"), join(role, "optimizer")
        stored = _model(reader, keys, tied or {})
        collected.naming[modeling] = PartNaming("model")
        for fqn, entry in stored.items():
            reader.add(collected, modeling, fqn, None, entry)
        if optimizer_class is not None:
            document, states = _optimizer(reader, keys.optimizer, optimizer_class, stored)
            collected.add_optimizer_state(document, (), optimizer)
            for fqn, state, entry in states:
                reader.add(collected, optimizer, fqn, state, entry)
        collected.coordinator_documents |= {join(role, "modeling", path): data for path, data in documents.items()}
        return collected

    request = SaveRequest(name, collect, run, [role], documents={RUNNING_STATES_NAME: running_states(run)})
    pool = BufferPool(BUDGET_BYTES)
    try:
        return save(store, SoloComm(), request, StructureCache(), pool=pool)
    finally:
        pool.close()


def _model_files(directory: StrPath | None) -> dict[str, bytes]:
    if directory is None:
        return {}
    found = {name: Path(directory) / name for name in _MODEL_FILES if (Path(directory) / name).is_file()}
    if "config.json" not in found:
        raise NotFoundError(f"{directory} has no config.json: give a model directory")
    return {name: path.read_bytes() for name, path in found.items()}


@dataclass(frozen=True)
class _Reader:
    """A DCP checkpoint to be read from."""

    directory: Path
    entries: Mapping[str, Stored]

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Return a tensor, whole.

        Raises:
            TruncatedError: a part is damaged.
            UnsupportedFormatError: a part is not what `.metadata` says.
            StorageError: a read failed.
        """
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for piece in stored.pieces:
            part = self._load(stored.key, piece)
            if not isinstance(part, torch.Tensor) or (part.dtype, tuple(part.shape)) != (stored.dtype, piece.lengths):
                text = f"{stored.key} of {self.directory} is not stored as its metadata says"
                raise UnsupportedFormatError(text)
            places = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.lengths, strict=True))
            whole[places].copy_(part)
        return whole

    def add(self, collected: Collected, part: str, fqn: str, state: str | None, stored: Stored) -> None:
        """Add a tensor to what is saved; it is read when its turn comes.

        Raises:
            UsageError: it cannot be stored.
        """
        assert stored.dtype is not None  # noqa: S101 - whoever calls has looked
        collected.add_unread(part, fqn, state, stored.dtype, stored.shape, lambda: self.tensor(stored))

    def value(self, stored: Stored) -> Any:
        """Return a value that is no tensor; raises as `tensor`."""
        return self._load(stored.key, stored.pieces[0])

    def _load(self, key: str, piece: Piece) -> Any:
        place = f"{key} in {piece.file} of {self.directory}"
        try:
            with (self.directory / piece.file).open("rb") as file:
                file.seek(piece.byte_offset)
                data = file.read(piece.num_bytes)
        except OSError as error:
            text = f"reading {place} failed: {error}"
            raise StorageError(text, key=piece.file, op="read", errno=error.errno) from error
        return read_values(io.BytesIO(data), place)


def _below(key: str, prefix: str) -> str | None:
    """Return what stands after a key's prefix, or None where it has another."""
    head = f"{prefix}."
    return key.removeprefix(head) if key.startswith(head) else None


def _model(reader: _Reader, keys: Keys, tied: Mapping[str, str]) -> dict[str, Stored]:
    """Return where the model's tensors are, by name; of those that are tied the first one.

    Raises:
        NotFoundError: there is none.
        MismatchError: tied tensors differ, or one is not there.
        UnsupportedFormatError: the model has a value that is no tensor.
    """
    stored: dict[str, Stored] = {}
    for key, entry in reader.entries.items():
        # Without a key of its own the model's tensors are those at the top; a trainer's own state lies one dict deeper.
        at_top = len(entry.path) == 1 and entry.dtype is not None and _below(key, keys.optimizer) is None
        name = _below(key, keys.model) if keys.model else (key if at_top else None)
        if name is not None:
            stored[name] = entry
    if not stored:
        tops = sorted({str(entry.path[0]) for entry in reader.entries.values()})
        text = f"{reader.directory} has no tensor under {keys.model!r}: it has {tops[:_MAX_NAMED]}"
        raise NotFoundError(text)
    values = [name for name, entry in stored.items() if entry.dtype is None]
    if values:
        text = f"the model in {reader.directory} has values that are no tensors: {values[:_MAX_NAMED]}"
        raise UnsupportedFormatError(text)
    for alias, name in tied.items():
        one, other = stored.get(alias), stored.get(name)
        if one is None or other is None:
            lacking = alias if one is None else name
            raise MismatchError(f"{lacking} was said to be tied, and is not in the model", missing=[lacking])
        if not _are_equal(reader, one, other):
            text = f"{alias} and {name} were said to be tied, and differ"
            raise MismatchError(text, mismatched=[f"{alias}: not what {name} is"])
        del stored[alias]
    return stored


def _are_equal(reader: _Reader, one: Stored, other: Stored) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        stored_bytes(reader.tensor(one)), stored_bytes(reader.tensor(other))
    )


def _optimizer(
    reader: _Reader, key: str, class_name: str, known: Collection[str]
) -> tuple[dict[str, Any], list[tuple[str, str, Stored]]]:
    """Return the optimizer's document, and (parameter, state, where it is) of the states that are tensors.

    Raises:
        MismatchError: there is none, or it has a state of a parameter that the model has not.
        UsageError: a value cannot be stored.
    """
    states, groups = f"{key}.state", f"{key}.param_groups"
    scalars: dict[str, dict[str, Any]] = {}
    tensors: list[tuple[str, str, Stored]] = []
    lost: list[str] = []
    options = {rest: entry for flat, entry in reader.entries.items() if (rest := _below(flat, groups)) is not None}
    if not options:
        text = (
            f"{reader.directory} has no optimizer under {key!r}: give the key that it has, or leave the optimizer out "
            "explicitly"
        )
        raise MismatchError(text, missing=[groups])
    described = _groups(reader, options, groups)
    for flat, entry in reader.entries.items():
        rest = _below(flat, states)
        if rest is None:
            continue
        name, _, state = rest.rpartition(".")
        if name not in known:
            lost.append(f"{rest}: a state of no parameter of the model")
        elif entry.dtype is None:
            scalars.setdefault(name, {})[state] = plain_values(reader.value(entry), flat)
        elif not entry.shape:
            scalars.setdefault(name, {})[state] = raw_tensor(reader.tensor(entry), flat)
        else:
            tensors.append((name, state, entry))
    lost += [f"{name}: in a param group, and not in the model" for name in _members(described) if name not in known]
    if lost:
        text = f"the optimizer in {reader.directory} does not fit the model: {'; '.join(lost[:_MAX_NAMED])}"
        raise MismatchError(text, unexpected=lost)
    return {"class": class_name, "groups": described, "states": scalars}, tensors


def _members(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]


def _groups(reader: _Reader, options: Mapping[str, Stored], place: str) -> list[dict[str, Any]]:
    """Return the param groups, from a nested state dict or from a flattened one.

    A flattened one has the options of each parameter and not which group it was in: parameters of equal options are a
    group, in the order of the first of each.
    """
    is_nested = any(rest.endswith(".params") for rest in options)
    by_owner: dict[str, dict[str, Any]] = {}
    for rest, entry in options.items():
        owner, _, option = rest.rpartition(".")
        value = reader.value(entry) if entry.dtype is None else reader.tensor(entry)
        by_owner.setdefault(owner, {})[option] = value
    if not is_nested:
        joined: dict[str, dict[str, Any]] = {}
        for name, values in by_owner.items():
            plain = plain_values(values, f"{place}.{name}")
            group = joined.setdefault(repr(sorted(plain.items())), {"params": [], "options": plain})
            group["params"].append(name)
        return list(joined.values())
    described: list[dict[str, Any]] = []
    for owner in sorted(by_owner, key=lambda number: (len(number), number)):
        values = by_owner[owner]
        names = values.pop("params", None)
        if not owner.isdecimal() or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            text = (
                f"group {owner} of {place} does not name its parameters: save what torch's get_optimizer_state_dict "
                "returns, not optimizer.state_dict()"
            )
            raise UsageError(text)
        described.append({"params": names, "options": plain_values(values, f"{place}.{owner}")})
    return described
