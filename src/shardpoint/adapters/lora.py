"""Which tensors of a peft model are the base model's and which are an adapter's, and what each is called on disk.

Base weights keep their base names (`base_model.model.X.base_layer.weight` -> `X.weight`), so that `modeling/` stays a
plain model directory; adapters go to `adapter/<name>/` under the names that `PeftModel.from_pretrained` reads. Raw peft
names in a plain directory make transformers re-initialise every weight, and an `adapter_config.json` inside it changes
what it loads.

peft is not imported: its classes are looked up among the modules that are already loaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shardpoint.adapters.names import NamedModule, unwrapped
from shardpoint.errors import UsageError

_PREFIX = "base_model.model."
# VeRA's layers share two projections, which stand in the table once; peft opens them under these names.
_SHARED = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is stored.

    Attributes:
        adapter: the adapter's name, or None for the base model.
        key: its name in the file.
    """

    adapter: str | None
    key: str


def _peft_class(module: str, name: str) -> type[Any] | None:
    loaded = sys.modules.get(module)
    return getattr(loaded, name, None) if loaded is not None else None


def peft_root(root: nn.Module) -> nn.Module | None:
    """Return the module if it is a peft model, else None."""
    kind = _peft_class("peft.peft_model", "PeftModel")
    return root if kind is not None and isinstance(root, kind) else None


def base_model(root: nn.Module) -> nn.Module:
    """Return the model inside a peft model, or the module itself."""
    peft_model: Any = peft_root(root)
    if peft_model is None:
        return root
    inner, _ = unwrapped(peft_model.get_base_model())
    return inner


def adapter_names(root: nn.Module) -> list[str]:
    """Return the adapters of a peft model; none of any other module."""
    peft_model: Any = peft_root(root)
    return list(peft_model.peft_config) if peft_model is not None else []


def places(named: NamedModule) -> dict[str, Place]:
    """Return where each tensor of a model is stored, by its name in memory.

    Raises:
        UsageError: a peft method whose parameters are outside the base model (prompt tuning), which has no plain
            layout; or adapters that are merged into the base weights, where both together would count them twice.
    """
    if peft_root(named.root) is None:
        return {tensor.fqn: Place(None, tensor.fqn) for tensor in named.tensors}
    layers = _adapter_layers(named.root)
    return {tensor.fqn: _place(tensor.fqn, layers) for tensor in named.tensors}


def second_places(named: NamedModule) -> dict[str, Place]:
    """Return where peft looks a second time for what is stored once already, by the further name of a tied tensor.

    Of a `modules_to_save` that is tied (`ensure_weight_tying=True`) peft wants each name in the adapter's file; of
    every other tied tensor the first is enough.
    """
    if peft_root(named.root) is None or not named.aliases:
        return {}
    layers = _adapter_layers(named.root)
    wanted = (alias for alias in named.aliases if _is_saved_module(alias, layers))
    return {alias: _place(alias, layers) for alias in wanted}


def _is_saved_module(fqn: str, layers: dict[str, frozenset[str]]) -> bool:
    return any(
        fqn.startswith(f"{prefix}modules_to_save.") for prefix, held in layers.items() if "modules_to_save" in held
    )


def _adapter_layers(root: nn.Module) -> dict[str, frozenset[str]]:
    """Return the path of each peft layer -> the attributes that hold adapters' parameters."""
    tuner = _peft_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    wrapper = _peft_class("peft.utils.other", "AuxiliaryTrainingWrapper")
    layers: dict[str, frozenset[str]] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        module, _ = unwrapped(module)
        if tuner is not None and isinstance(module, tuner):
            if getattr(module, "merged", False):
                text = (
                    f"{prefix.removesuffix('.')} has its adapters merged into its base weight, and a resume would "
                    "add them to it once more: call unmerge_adapter() before saving or loading"
                )
                raise UsageError(text)
            held = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
            layers[prefix] = frozenset(held)
        elif wrapper is not None and isinstance(module, wrapper):
            layers[prefix] = frozenset({"modules_to_save"})
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(root, "")
    return layers


def _place(fqn: str, layers: dict[str, frozenset[str]]) -> Place:
    if not fqn.startswith(_PREFIX):
        text = (
            f"{fqn} is a peft parameter outside the base model: only adapters in its layers (LoRA and kin) can be saved"
        )
        raise UsageError(text)
    key = fqn
    adapter: str | None = None
    for prefix in sorted((prefix for prefix in layers if prefix and fqn.startswith(prefix)), key=len, reverse=True):
        head, _, tail = fqn[len(prefix) :].partition(".")
        if head in layers[prefix]:
            adapter, _, rest = tail.partition(".")
            # peft drops the adapter's name on disk, and `modules_to_save` with it.
            middle = [] if head == "modules_to_save" else [head]
            key = _SHARED.get(head) or prefix + ".".join([*middle, *([rest] if rest else [])])
            break
    if adapter is not None:
        return Place(adapter, key)
    for prefix in sorted(layers, key=len, reverse=True):
        for wrapper in ("base_layer.", "original_module.", "token_adapter."):
            if prefix and key.startswith(prefix + wrapper):
                key = prefix + key[len(prefix) + len(wrapper) :]
    return Place(None, key.removeprefix(_PREFIX))


def adapter_config(root: nn.Module, adapter: str) -> bytes:
    """Return the `adapter_config.json` of an adapter, as peft writes it for inference."""
    peft_model: Any = peft_root(root)
    config = peft_model.peft_config[adapter]
    training = config.inference_mode
    config.inference_mode = True
    try:
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
            text = (Path(directory) / "adapter_config.json").read_text()
    finally:
        config.inference_mode = training
    return (json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n").encode()
