"""Is what a resume has put in place what the checkpoint holds? Looked at again, from the live objects.

Tensors are verified while they are read, by checksum. What is assigned is read back here: the options and small states
of optimizers, schedulers, samplers. Something that a newer torch has added beside what was saved is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from shardpoint.adapters.documents import scheduler_document
from shardpoint.adapters.nesting import leaves, put_together
from shardpoint.adapters.optimizer import HOW_TO_STEP, OptimizerTarget, same_memory
from shardpoint.adapters.state import RunState
from shardpoint.adapters.tensors import from_raw, plain_values, raw_tensor
from shardpoint.errors import ManifestError
from shardpoint.manifest import RawTensor, decode_document, encode_document

NUM_NEXT_SAMPLES = 256


def option_differences(target: OptimizerTarget) -> Iterator[str]:
    """Yield which options of an optimizer's param groups are not those that were saved."""
    for number, group in enumerate(target.optimizer.param_groups):
        of_group = target.group_of[number]
        options = {} if of_group is None else target.document["groups"][of_group]["options"]
        for key, stored in options.items():
            if key in group and key in HOW_TO_STEP:
                continue
            if key not in group or not _same_value(group[key], stored):
                live = group.get(key, "nothing")
                yield f"{target.part}: {key} of param group {number} was {_shown(stored)} and is {_shown(live)}"


def state_differences(target: OptimizerTarget) -> Iterator[str]:
    """Yield which states of an optimizer's parameters are not those that were saved and verified."""
    scalars: Mapping[str, Mapping[str, Any]] = target.document["states"]
    nested: Mapping[str, Mapping[Any, list[Any]]] = target.document.get("nested", {})
    verified: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in target.tensors:
        verified.setdefault(tensor.fqn, {})[tensor.state] = tensor.tensor
    for name, parameter in (member for members in target.groups for member in members):
        if name in target.unstored:
            continue
        live = dict(leaves(target.optimizer.state.get(parameter, {})))
        large, skeletons = verified.get(name, {}), nested.get(name, {})
        whole = {key: put_together(node, large, lambda value, _: value, key) for key, node in skeletons.items()}
        stored_states = large | dict(leaves({**scalars.get(name, {}), **whole}))
        if live.keys() != stored_states.keys():
            yield f"{target.part}: {name} had the states {sorted(stored_states)} and has {sorted(live)}"
            continue
        for key, stored in stored_states.items():
            if not isinstance(stored, torch.Tensor):
                if not _same_value(live[key], stored):
                    yield f"{target.part}: {key} of {name} was {_shown(stored)} and is {_shown(live[key])}"
            elif not isinstance(live[key], torch.Tensor) or not same_memory(live[key], stored):
                yield f"{target.part}: {key} of {name} is not the tensor that was verified"


def scheduler_differences(lr_scheduler: Any, data: bytes, path: str) -> Iterator[str]:
    """Yield in what a scheduler's state differs from its document."""
    stored = decode_document(data, path)
    live = decode_document(scheduler_document(lr_scheduler, path), path)
    yield from _tree_differences(live["state"], stored["state"], path)


def sampler_differences(sampler: Any, stored: Any, path: str) -> Iterator[str]:
    """Yield in what a sampler's state differs from the one in a document."""
    live = decode_document(encode_document(plain_values(sampler.state_dict(), path)), path)
    yield from _tree_differences(live, stored, path)


def next_samples(sampler: Any, path: str) -> bytes | None:
    """Return which samples a sampler gives next, as a document; None where it cannot tell (it has no `peek`)."""
    if not hasattr(sampler, "peek"):
        return None
    samples = [int(index) for index in sampler.peek(NUM_NEXT_SAMPLES)]
    return encode_document(plain_values({"asked": NUM_NEXT_SAMPLES, "samples": samples}, path))


def next_samples_differences(sampler: Any, data: bytes, path: str) -> Iterator[str]:
    """Yield in what the samples that come next differ from those that the checkpoint says.

    Raises:
        ManifestError: the document does not list samples.
    """
    document = decode_document(data, path)
    if not isinstance(document, dict) or not isinstance(document.get("samples"), list):
        raise ManifestError(f"{path} does not list samples", key=path)
    if not hasattr(sampler, "peek"):
        return
    stored = document["samples"]
    live = [int(index) for index in sampler.peek(document["asked"])]
    if live != stored:
        place = next(
            (place for place, pair in enumerate(zip(live, stored, strict=False)) if pair[0] != pair[1]),
            min(len(live), len(stored)),
        )
        yield (
            f"{path}: {len(stored)} samples were to come next and {len(live)} do; from number {place} on they were "
            f"{stored[place : place + 4]} and are {live[place : place + 4]}{_why_others_are_dropped(sampler)}"
        )


def _why_others_are_dropped(sampler: Any) -> str:
    if not getattr(sampler, "drop_last", False):
        return ""
    return (
        "; with drop_last and another batch_size than before (by default it follows the number of ranks), other "
        "samples are left out at the end of an epoch: make the sampler with the batch_size that the run was saved with"
    )


def position_problem(sampler_state: Any, run: RunState) -> str | None:
    """Return what is wrong where steps were done and the sampler still stands at the very beginning, else None."""
    if not isinstance(sampler_state, Mapping):
        return None
    beginning = sampler_state.get("epoch") == 0 and sampler_state.get("start_index") == 0
    if not beginning or run.epoch > 0 or run.step == 0:
        return None
    return (
        f"the sampler stands at sample 0 of epoch 0 after {run.step} steps, so a resume would take the same samples "
        "again: call `sampler.set_start_index` with what all ranks have consumed before each save"
    )


def steps_another(lr_scheduler: Any, optimizer: Any) -> bool:
    """Tell whether a scheduler sets the learning rate of another optimizer than this one (wrappers are looked into)."""
    found = getattr(lr_scheduler, "optimizer", None)
    for _ in range(4):
        if found is None or found is optimizer:
            return False
        found, outer = getattr(found, "optimizer", None), found
        if found is None:
            return outer is not optimizer
    return True


def _same_value(live: Any, stored: Any) -> bool:
    """Tell whether a live value is a stored one, in whichever of the types it is kept here."""
    if isinstance(live, torch.Tensor):
        expected = from_raw(stored) if isinstance(stored, RawTensor) else torch.tensor(stored)
        place = "a value"
        return raw_tensor(live, place).data == raw_tensor(expected.to(live.dtype), place).data
    if isinstance(stored, RawTensor):
        return bool(from_raw(stored).item() == live)
    if isinstance(live, list | tuple) and isinstance(stored, list | tuple):
        return len(live) == len(stored) and all(_same_value(*pair) for pair in zip(live, stored, strict=True))
    return encode_document(plain_values(live, "")) == encode_document(stored)


def _tree_differences(live: Any, stored: Any, place: str) -> Iterator[str]:
    """Yield where a decoded document lacks what another has, or has something else."""
    if isinstance(stored, dict) and isinstance(live, dict):
        for key, value in stored.items():
            if key in live:
                yield from _tree_differences(live[key], value, f"{place}: {key}")
            else:
                yield f"{place}: {key} was {_shown(value)} and is not there"
    elif isinstance(stored, list | tuple) and type(stored) is type(live) and len(stored) == len(live):
        for index, pair in enumerate(zip(live, stored, strict=True)):
            yield from _tree_differences(*pair, f"{place}[{index}]")
    elif type(live) is not type(stored) or encode_document(live) != encode_document(stored):
        yield f"{place} was {_shown(stored)} and is {_shown(live)}"


def _shown(value: Any) -> str:
    text = repr(from_raw(value) if isinstance(value, RawTensor) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."  # noqa: PLR2004 - a line's worth
