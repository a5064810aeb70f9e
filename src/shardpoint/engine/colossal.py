"""What ColossalAI's `Booster` writes, as something that a load of ours reads from.

Source: ColossalAI 0.5.0, `colossalai/checkpoint_io/` (file names, indexes, optimizer states by number).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from shardpoint.adapters.names import NamedModule, name_tensors
from shardpoint.adapters.torch_files import Located, locate_tensors, read_values
from shardpoint.checksum import crc64, to_hex
from shardpoint.engine.carried import RUNNING_STATES_NAME
from shardpoint.engine.numbered import OptimizerFiles, name_states, scheduler_file_document
from shardpoint.engine.source import Source, open_plain, unsealed_manifest
from shardpoint.errors import ManifestError, MismatchError, NotFoundError, TruncatedError, UnsupportedFormatError
from shardpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    TensorEntry,
    encode_document,
)
from shardpoint.storage import Store

MODELING, OPTIMIZER, SCHEDULER = "modeling", "optimizer", "lr_scheduler"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(pytorch_model|pytorch_optim)[.\w-]*\.bin|model-\d{5}\.safetensors|model\.safetensors")


def is_colossal_layout(store: Store, name: str) -> bool:
    """Tell whether a directory without a manifest is a finished save of ColossalChat's `save_checkpoint`.

    Its `running_states.json` is written last. What only Shardpoint writes must not be there.
    """
    if not store.exists(name) or store.exists(f"{name}/{MANIFEST_NAME}"):
        return False
    if not (store.exists(f"{name}/{RUNNING_STATES_NAME}") and store.exists(f"{name}/{MODELING}")):
        return False
    if store.exists(f"{name}/{OPTIMIZER}/param_groups.json") or store.exists(f"{name}/rng"):
        return False
    return any(_SHARD.fullmatch(entry.name) for entry in store.entries(f"{name}/{MODELING}"))


def open_colossal(store: Store, name: str) -> Source:
    """Open a save of ColossalChat's own `save_checkpoint`: nothing tells which bytes it should have.

    Raises:
        NotFoundError: a file vanished.
    """
    files: list[FileEntry] = []
    pending = [""]
    while pending:
        directory = pending.pop()
        for entry in store.entries(f"{name}/{directory}" if directory else name):
            path = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_directory:
                pending.append(path)
            else:
                files.append(FileEntry(path, store.size_bytes(f"{name}/{path}"), ""))
    files.sort(key=lambda file: file.path)
    states = store.read_bytes(f"{name}/{RUNNING_STATES_NAME}")
    listing = json.dumps([[file.path, file.size_bytes] for file in files]).encode()
    # No id is stored; ranks that see other files or another position must not load together.
    manifest = unsealed_manifest(name, files, [], to_hex(crc64(listing)) + to_hex(crc64(states)))
    return Source(store, name, manifest, sealed=False, documents={RUNNING_STATES_NAME: states})


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of `modeling/`.

    Attributes:
        tensors: name -> (the file's path in the checkpoint, where in it).
    """

    tensors: Mapping[str, tuple[str, Located]]


def locate_weights(source: Source) -> Weights:
    """Find where each weight lies.

    Raises:
        ManifestError: several indexes, or one that is not an index.
        TruncatedError: a file or a tensor that an index names is not there, or a file is cut off.
        UnsupportedFormatError: there are no weights of ColossalAI, or a file holds something else than tensors.
    """
    present = _names_in(source, MODELING)
    index = _index_of(source, MODELING, present)
    if index is None:
        single = [name for name in _WEIGHTS if name in present]
        if not single:
            text = (
                f"{source.manifest.name} holds another library's files, and none that ColossalAI names so in "
                f"{MODELING}/: load it with that library's Booster"
            )
            raise UnsupportedFormatError(text)
        listed, names = single[:1], None
    else:
        names = _weight_map(source, f"{MODELING}/{index}")
        listed = sorted(set(names.values()))
    found: dict[str, tuple[str, Located]] = {}
    if any(file.endswith(".safetensors") for file in listed):
        plain = open_plain(source.store, f"{source.key}/{MODELING}", MODELING, is_file=False)
        for tensor in plain.manifest.tensors:
            file = f"{MODELING}/{plain.manifest.files[tensor.file].path}"
            found[tensor.key] = file, Located(tensor.dtype, tensor.shape, tensor.byte_offset, tensor.num_bytes)
    else:
        for file in listed:
            path = f"{MODELING}/{file}"
            for name, value in locate_tensors(local_path(source, path), _place(source, path)).items():
                if not isinstance(value, Located):
                    text = f"{_place(source, path)}: {name} is no tensor (extra state of a module): it cannot be loaded"
                    raise UnsupportedFormatError(text)
                found[str(name)] = path, value
    _check_complete(source, MODELING, names, found)
    return Weights(found)


def read_optimizer_files(source: Source) -> OptimizerFiles:
    """Read an optimizer's groups, and find where its states lie.

    Raises:
        NotFoundError: there is no optimizer.
        ManifestError: an index is not one.
        TruncatedError: a file or a state that the index names is not there, or a file is cut off.
        UnsupportedFormatError: the optimizer was saved asynchronously, or holds more than plain data.
    """
    present = _names_in(source, OPTIMIZER)
    index = _index_of(source, OPTIMIZER, present)
    if index is None:
        text = (
            f"{source.manifest.name} in {source.store.location} has no optimizer of ColossalAI: load it with "
            "optimizer=None to start the optimizer afresh"
        )
        raise NotFoundError(text)
    names = _weight_map(source, f"{OPTIMIZER}/{index}")
    if any(file.endswith(".safetensors") for file in names.values()):
        text = (
            f"{source.manifest.name}: the optimizer was saved with use_async, whose files are not read: load it with "
            "ColossalAI and save it without"
        )
        raise UnsupportedFormatError(text)
    groups_file = _document(source, f"{OPTIMIZER}/{index}").get("metadata", {}).get("param_groups")
    if not isinstance(groups_file, str) or groups_file not in present:
        text = f"{_place(source, OPTIMIZER)}: the file of param groups that {index} names is not there"
        raise TruncatedError(text, key=f"{OPTIMIZER}/{index}", expected="a file", actual="nothing")
    path = f"{OPTIMIZER}/{groups_file}"
    groups = read_values(local_path(source, path), _place(source, path))
    states: dict[int, dict[str, Any]] = {}
    holders: dict[int, str] = {}
    copies: list[tuple[int, str, str]] = []
    for file in sorted(set(names.values())):
        path = f"{OPTIMIZER}/{file}"
        place = _place(source, path)
        located = locate_tensors(local_path(source, path), place)
        values = read_values(local_path(source, path), place)
        for number, state in located.items():
            if not isinstance(state, Mapping) or not isinstance(number, int):
                raise ManifestError(f"{place} does not hold optimizer states by number", key=path)
            if number in holders:
                copies.append((number, path, holders[number]))
            holders[number] = path
            states[number] = {
                # What is 0-dim is read here; the rest is left where it is.
                key: (path, value) if isinstance(value, Located) and value.shape else values[number][key]
                for key, value in state.items()
            }
    _check_complete(source, OPTIMIZER, names, {str(number): None for number in states})
    return OptimizerFiles(groups, states, _place(source, OPTIMIZER), copies)


def native_source(source: Source, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any) -> Source:
    """Describe ColossalAI's files by our names, so that they can be loaded like our own.

    Args:
        source: a checkpoint with ColossalAI's files, verified where that is possible.
        model: gives the names of tied weights and of the optimizer's parameters; not changed.
        optimizer: the optimizer that is to be filled, or None.
        lr_scheduler: the scheduler that is to be filled, or None.

    Returns:
        A source whose tensors and documents are those of a native checkpoint; it has no checksums of tensors.

    Raises:
        NotFoundError: something that is wanted was not saved.
        MismatchError: the optimizer or the scheduler is another than that which was saved; it lists everything.
        CorruptionError: a file is cut off, or an index is wrong.
        UnsupportedFormatError: a file holds what cannot be loaded without executing it.
    """
    named = name_tensors(model)
    files = {entry.path: number for number, entry in enumerate(source.manifest.files)}
    documents = {RUNNING_STATES_NAME: source.document(RUNNING_STATES_NAME) or b""}
    tensors = _weight_entries(source, locate_weights(source), named, files)
    problems: list[str] = []
    if optimizer is not None:
        optimizer_files = read_optimizer_files(source)
        stored = name_states(optimizer_files, optimizer, named)
        problems += [*stored.problems, *_unequal_copies(source, optimizer_files.copies)]
        documents[f"{OPTIMIZER}/param_groups.json"] = encode_document(stored.document)
        for fqn, state, path, place in stored.tensors:
            tensors.append(_entry(OPTIMIZER, fqn, state, f"{fqn}.{state}", place, files[path]))
    if lr_scheduler is not None:
        if SCHEDULER not in files:
            raise NotFoundError(f"{source.manifest.name} in {source.store.location} has no {SCHEDULER}")
        label = _place(source, SCHEDULER)
        values = read_values(local_path(source, SCHEDULER), label)
        document, found = scheduler_file_document(values, lr_scheduler, label)
        problems += found
        documents["lr_scheduler.json"] = document
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        text = (
            f"checkpoint {source.manifest.name} does not fit the target; nothing was changed:{lines}\n  build the same "
            "optimizer and scheduler, with the same groups in the same order, or load only the parts that fit"
        )
        raise MismatchError(text, mismatched=problems)
    manifest = msgspec.structs.replace(source.manifest, tensors=tensors)
    return Source(source.store, source.key, manifest, sealed=False, documents=documents)


def _weight_entries(
    source: Source, weights: Weights, named: NamedModule, files: Mapping[str, int]
) -> list[TensorEntry]:
    """Return one entry for each weight; a tied one that is stored under several names once, if the values agree."""
    entries: list[TensorEntry] = []
    seen: dict[str, tuple[str, tuple[str, Located]]] = {}
    for name, (path, place) in weights.tensors.items():
        fqn = named.aliases.get(name, name)
        other = seen.get(fqn)
        if other is None:
            seen[fqn] = name, (path, place)
            entries.append(_entry(MODELING, fqn, None, fqn, place, files[path]))
        elif other[1] != (path, place) and not _same_values(source, name, path, other[0], other[1][0]):
            text = (
                f"{source.manifest.name}: {name} and {other[0]} are stored with different values, and are one tensor "
                "in the target: untie them"
            )
            raise MismatchError(text, mismatched=[f"{MODELING}: {name} and {other[0]} are tied in the target only"])
    return entries


def _same_values(source: Source, name: str, path: str, other: str, other_path: str) -> bool:
    if path.endswith(".safetensors"):
        return False  # its writer refuses tied tensors, so two names are two tensors
    first = read_values(local_path(source, path), path)[name]
    second = read_values(local_path(source, other_path), other_path)[other]
    return _same_bytes(first, second)


def _same_bytes(first: Any, second: Any) -> bool:
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return bool(first == second)
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return bool(torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)))


def _unequal_copies(source: Source, copies: Sequence[tuple[int, str, str]]) -> list[str]:
    """Compare the states that two pipeline stages stored of one tied parameter; there they are kept alike."""
    problems: list[str] = []
    for number, *paths in copies:
        first, second = (read_values(local_path(source, path), path)[number] for path in paths)
        if first.keys() != second.keys() or not all(_same_bytes(first[key], second[key]) for key in first):
            text = f"optimizer: the states of parameter {number} in {paths[0]} and {paths[1]} differ, and are of one"
            problems.append(f"{text} tied parameter: untie it, or start the optimizer afresh")
    return problems


def _entry(part: str, fqn: str, state: str | None, key: str, place: Located, file: int) -> TensorEntry:
    return TensorEntry(part, fqn, state, key, place.dtype, place.shape, file, place.byte_offset, place.num_bytes, "")


def local_path(source: Source, path: str) -> str:
    """Return where a file is, for what opens it by path."""
    return source.store.local_path(source.path(path))


def _place(source: Source, path: str) -> str:
    return f"{path} of {source.manifest.name}"


def _names_in(source: Source, directory: str) -> set[str]:
    prefix = f"{directory}/"
    return {
        entry.path.removeprefix(prefix)
        for entry in source.manifest.files
        if entry.path.startswith(prefix) and "/" not in entry.path.removeprefix(prefix)
    }


def _index_of(source: Source, directory: str, present: set[str]) -> str | None:
    found = sorted(name for name in present if re.fullmatch(r".*\.index.*\.json", name))
    if len(found) > 1:
        text = f"{_place(source, directory)} has several indexes ({', '.join(found)}): keep the one to load"
        raise ManifestError(text, key=directory)
    return found[0] if found else None


def _document(source: Source, path: str) -> dict[str, Any]:
    data = source.document(path) if source.sealed else source.store.read_bytes(source.path(path))
    try:
        value = json.loads(data or b"")
    except ValueError as error:
        raise ManifestError(f"{_place(source, path)} is not JSON: {error}", key=path) from error
    if not isinstance(value, dict):
        raise ManifestError(f"{_place(source, path)} is not an index", key=path)
    return value


def _weight_map(source: Source, path: str) -> dict[str, str]:
    names = _document(source, path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ManifestError(f"{_place(source, path)} is not an index: it has no weight_map", key=path)
    directory = path.rpartition("/")[0]
    lost = sorted(set(names.values()) - _names_in(source, directory))
    if lost:
        text = f"{_place(source, path)} names files that are not there: {', '.join(lost)}"
        raise TruncatedError(text, key=path, expected=", ".join(lost), actual="nothing")
    return names


def _check_complete(
    source: Source, directory: str, names: Mapping[str, str] | None, found: Mapping[str, object]
) -> None:
    if names is None:
        return
    lost = sorted(set(names) - set(found))
    stray = sorted(set(found) - set(names))
    if lost or stray:
        text = (
            f"the index of {_place(source, directory)} and its files differ: only in the index {lost[:5]}, only in the "
        )
        raise TruncatedError(
            f"{text}files {stray[:5]}", key=directory, expected=str(len(names)), actual=str(len(found))
        )
