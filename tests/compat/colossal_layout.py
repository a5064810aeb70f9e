"""A checkpoint as ColossalChat's own `save_checkpoint` writes it, made without ColossalAI."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_weights(directory: Path, tensors: Mapping[str, torch.Tensor], *, num_files: int = 2) -> None:
    """Write weights in files of torch.save, with an index whose total size is in MB."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}.bin"
        chosen = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        torch.save(OrderedDict((name, tensors[name]) for name in chosen), directory / file)
        weight_map |= dict.fromkeys(chosen, file)
    _write_index(directory / "pytorch_model.bin.index.json", {"total_size": 0.5}, weight_map)


def write_optimizer(directory: Path, state_dict: Mapping[str, Any]) -> None:
    """Write an optimizer's `state_dict()`, its states by number."""
    directory.mkdir(parents=True, exist_ok=True)
    group_file, states = "pytorch_optim_group.bin", state_dict["state"]
    torch.save(state_dict["param_groups"], directory / group_file)
    numbers = list(states)
    halves: Sequence[list[int]] = (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :])
    weight_map: dict[str, str] = {}
    for part, chosen in enumerate(halves, 1):
        file = f"pytorch_optim-{part:05d}.bin"
        torch.save(OrderedDict((number, states[number]) for number in chosen), directory / file)
        weight_map |= {str(number): file for number in chosen}
    metadata = {"total_size": 0.5, "param_groups": group_file}
    _write_index(directory / "pytorch_optim.bin.index.json", metadata, weight_map)


def write_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any, epoch: int, step: int
) -> None:
    """Write a whole checkpoint; `running_states.json` comes last."""
    write_weights(path / "modeling", model.state_dict())
    if optimizer is not None:
        write_optimizer(path / "optimizer", optimizer.state_dict())
    if lr_scheduler is not None:
        torch.save(lr_scheduler.state_dict(), path / "lr_scheduler")
    states = {"epoch": epoch, "step": step, "sample_start_index": step * 32}
    (path / "running_states.json").write_text(json.dumps(states, indent=4))


def _write_index(path: Path, metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")
