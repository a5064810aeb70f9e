"""What a model and an optimizer hold that ColossalAI's Booster boosted, told as if no rank had only a part of it.

ColossalAI itself is not imported: what it leaves on parameters and optimizers is looked for by name.

Source: ColossalAI 0.5.0, `tensor/d_tensor`, `tensor/padded_tensor`, `booster/plugin/`, `zero/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardpoint.adapters.tensors import dtype_name


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor, as it is stored.

    Attributes:
        name: its name.
        dtype: logical name.
        shape: of the whole tensor, without the rows that tensor parallelism pads a vocabulary with.
        first: the name under which ColossalAI's hybrid plugin stores it: of tied tensors, the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: str


def plugin_name(booster: object) -> str | None:
    """Return the class of the plugin of ColossalAI's own Booster, by its plain name; None for another Booster."""
    kind = type(getattr(booster, "plugin", None))
    # ColossalAI renames its ZeRO class at run time, to "LowLevelZeroPlugin_ZeRO-1" and the like.
    return kind.__name__.partition("_")[0] if kind.__module__.partition(".")[0] == "colossalai" else None


def whole_weights(model: Any) -> dict[str, Whole]:
    """Return what a model has on this rank (a pipeline's stage has a part of the names), tied tensors under each name.

    Args:
        model: as `boost` returned it.
    """
    bare = _bare(model)
    parameters = dict(_parameters(bare))
    firsts: dict[int, str] = {}
    found: dict[str, Whole] = {}
    for name, value in bare.state_dict().items():
        if isinstance(value, torch.Tensor):
            tensor = parameters.get(name, value)
            first = firsts.setdefault(id(tensor), name)
            found[name] = Whole(name, dtype_name(tensor.dtype, name), _whole_shape(tensor), first)
    return found


def whole_members(model: Any, optimizer: Any) -> list[list[Whole]]:
    """Return each param group's parameters in the order in which ColossalAI numbers them.

    Args:
        model: as `boost` returned it, for names; None where it is not at hand.
        optimizer: likewise.
    """
    names = {} if model is None else {id(parameter): name for name, parameter in _parameters(_bare(model))}
    sharded, chunked = getattr(optimizer, "param_info", None), getattr(optimizer, "params_info", None)
    if isinstance(sharded, Mapping) and "param2shape" in sharded:  # the hybrid plugin's, of all stages
        ids, shapes = sharded["id2param"], sharded["param2shape"]
        return [
            [_member(number, shapes[ids[number]], names.get(ids[number])) for number in group["params"]]
            for group in sharded["param_groups"]
        ]
    if isinstance(chunked, Mapping) and "id2shape" in chunked:  # Gemini's
        live = optimizer.id_to_real_params
        return [
            [_member(number, chunked["id2shape"][number], names.get(id(live[number]))) for number in group["params"]]
            for group in optimizer.param_groups_backup
        ]
    working = getattr(optimizer, "master_to_working_param", {})  # ZeRO's, by the id of a rank's part
    groups = getattr(optimizer, "optim", optimizer).param_groups
    found: list[list[Whole]] = []
    for group in groups:
        start = sum(map(len, found))
        whole = [working.get(id(parameter), parameter) for parameter in group["params"]]
        found.append([_member(start + place, one.shape, names.get(id(one))) for place, one in enumerate(whole)])
    return found


def lost_in_its_files(booster: object, optimizer: Any, stored_dtypes: Iterable[str]) -> list[str]:
    """Return what of a run's state ColossalAI's files do not have, so that a resume is another run.

    Args:
        booster: any; of another than ColossalAI's nothing is known.
        optimizer: as `boost` returned it.
        stored_dtypes: those of the stored weights.
    """
    if plugin_name(booster) is None or optimizer is None:
        return []
    lost: list[str] = []
    if _keeps_masters(optimizer) and any(dtype in ("BF16", "F16") for dtype in stored_dtypes):
        lost.append("the fp32 master weights (they are made anew from the 16-bit weights)")
    if getattr(getattr(booster, "plugin", None), "precision", None) == "fp16":
        lost.append("the loss scale (it starts afresh)")
    return lost


def _keeps_masters(optimizer: Any) -> bool:
    if getattr(optimizer, "params_info", None) is not None:  # Gemini's optimizer has empty stand-ins
        return bool(getattr(optimizer.module, "master_weights", True))
    pairs = getattr(optimizer, "get_master_to_working_map", lambda: None)() or {}
    masters = [parameter for group in optimizer.optim.param_groups for parameter in group["params"]]
    return any(master.dtype != pairs[id(master)].dtype for master in masters if id(master) in pairs)


def _member(number: int, shape: Sequence[int], name: str | None) -> Whole:
    told = name or f"parameter {number}"
    return Whole(told, "", tuple(shape), told)


def _bare(model: Any) -> Any:
    return model.unwrap() if callable(getattr(model, "unwrap", None)) else model


def _parameters(bare: Any) -> Iterable[tuple[str, torch.Tensor]]:
    if isinstance(bare, nn.Module):
        return bare.named_parameters(remove_duplicate=False)
    # What stands for a peft model has the base model's names, and takes no arguments.
    pairs: Iterable[tuple[str, torch.Tensor]] = bare.named_parameters()
    return pairs


def _whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    layout = getattr(tensor, "dist_layout", None)
    shape = list(tensor.shape if layout is None else layout.global_shape)
    padded = getattr(tensor, "_padding_dim", None)
    if padded is not None:
        shape[padded] = getattr(tensor, "_origin_length")  # noqa: B009 - ColossalAI's attribute
    return tuple(shape)
