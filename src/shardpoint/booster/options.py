"""Which of ColossalAI's options can be honoured here, and what its precisions mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardpoint.booster import loss_scale
from shardpoint.errors import UsageError

OFFLOAD = "nothing is offloaded to the host here"
FP8 = "there is no fp8 training or communication here"
SHARDFORMER = "the model's own modules run as they are: ask the model for it (attn_implementation=...)"
BUCKETS = "FSDP2 communicates block by block, without buckets"
REDUCTION = "gradients are reduced in float32 for fp16 and bf16, and in their own dtype for fp32"
ALLGATHER = "the next forward gathers the parameters, block by block"
OVERLAP = "FSDP2 always overlaps communication and computation"

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
_SCALING = tuple(field.name for field in fields(loss_scale.ScaleOptions))


def refuse_changed(plugin: object, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse options that have no meaning here, where they are not ColossalAI's defaults.

    Args:
        plugin: whose `__init__` has the defaults.
        given: the arguments by name.
        reasons: option -> why it cannot be honoured.

    Raises:
        UsageError: names every such option.
    """
    parameters = inspect.signature(type(plugin).__init__).parameters
    refused = [
        f"{name}={given[name]!r} cannot be honoured: {reason}"
        for name, reason in reasons.items()
        if given[name] is not parameters[name].default and given[name] != parameters[name].default
    ]
    if refused:
        raise UsageError(f"{type(plugin).__name__}: {'; '.join(refused)}; leave it out")


def loss_scaling(plugin: object, precision: str, given: Mapping[str, Any]) -> loss_scale.ScaleOptions | None:
    """Check a plugin's `precision` and the options of its loss scale, which are without effect without fp16.

    Args:
        plugin: whose `__init__` has the defaults.
        precision: `"fp16"`, `"bf16"` or `"fp32"`.
        given: the arguments by name.

    Returns:
        How the loss is scaled; None where it is not.

    Raises:
        UsageError: `precision` is none of these, or an option is out of range.
    """
    name = type(plugin).__name__
    if precision not in _PRECISIONS:
        raise UsageError(f"{name}: precision={precision!r} is neither 'fp16' nor 'bf16' nor 'fp32'")
    scaling = loss_scale.ScaleOptions(**{option: given[option] for option in _SCALING})
    return scaling if precision == "fp16" else None


def low_dtype(precision: str) -> torch.dtype | None:
    """Return in which lower precision a plugin computes; None for fp32."""
    return _PRECISIONS[precision]


def precision_policy(
    precision: str, *, cast_inputs: bool = True, float32_outputs: bool = False
) -> MixedPrecisionPolicy:
    """Return FSDP2's policy for a precision: fp16 and bf16 compute in it and reduce gradients in float32."""
    dtype = low_dtype(precision)
    return MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=None if dtype is None else torch.float32,
        cast_forward_inputs=cast_inputs,
        output_dtype=torch.float32 if float32_outputs else None,
    )
