"""How a model gets LoRA adapters: through peft, before the model is boosted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from shardpoint.errors import NotFoundError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def add_lora(model: nn.Module, pretrained_dir: str | None, lora_config: Any) -> nn.Module:
    """Return the model with trainable adapters: new ones of a config, or those of a saved adapter directory.

    Raises:
        UsageError: peft is not installed, the model is boosted already, or not exactly one of the two is given.
        NotFoundError: there is no adapter in `pretrained_dir`.
    """
    peft = _peft()
    if any(isinstance(module, FSDPModule | DistributedDataParallel) for module in model.modules()):
        raise UsageError("enable_lora: the model is boosted already; adapters are added before boost()")
    if (pretrained_dir is None) == (lora_config is None):
        raise UsageError(
            "enable_lora: give lora_config (new adapters) or pretrained_dir (saved ones, with their config)"
        )
    if pretrained_dir is not None:
        return _with_saved_adapters(peft, model, os.fspath(pretrained_dir))
    if not isinstance(lora_config, peft.PeftConfig):
        raise UsageError(f"enable_lora: lora_config is a {type(lora_config).__name__}, not a peft config")
    made: nn.Module = peft.get_peft_model(model, lora_config)
    return made


def check_has_adapters(model: nn.Module) -> None:
    """Check that there are adapters to save.

    Raises:
        UsageError: peft is not installed, or the model has no adapters.
    """
    peft = _peft()
    if not any(isinstance(module, peft.PeftModel) for module in model.modules()):
        raise UsageError("save_lora_as_pretrained: the model has no adapters; enable_lora() adds them, before boost()")


def _with_saved_adapters(peft: Any, model: nn.Module, place: str) -> nn.Module:
    on_disk = (Path(place) / "adapter_config.json").is_file()
    if not on_disk and (Path(place).exists() or not _HUB_ID.fullmatch(place)):
        raise NotFoundError(f"enable_lora: {place} holds no adapter (no adapter_config.json)")
    try:
        loaded: nn.Module = peft.PeftModel.from_pretrained(model, place, is_trainable=True)
    except (OSError, ValueError) as error:
        if on_disk:
            raise
        raise NotFoundError(f"enable_lora: {place} is no directory here, and no adapter on the Hub: {error}") from error
    return loaded


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - only who uses LoRA needs peft
    except ImportError as error:
        raise UsageError("LoRA needs the package peft: pip install 'shardpoint[lora]'") from error
    return peft
