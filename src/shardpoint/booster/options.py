"""Which of ColossalAI's options can be honoured here, and what its precisions mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardpoint.errors import UsageError

FP16_ONLY = "it scales the loss of fp16, which is not supported"
OFFLOAD = "nothing is offloaded to the host here"
FP8 = "there is no fp8 training or communication here"
SHARDFORMER = "the model's own modules run as they are: ask the model for it (attn_implementation=...)"
BUCKETS = "FSDP2 communicates block by block, without buckets"
SCALING = dict.fromkeys(
    ("initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale"),
    FP16_ONLY,
)
REDUCTION = "gradients are reduced in float32 for bf16, and in their own dtype for fp32"
ALLGATHER = "the next forward gathers the parameters, block by block"
OVERLAP = "FSDP2 always overlaps communication and computation"

_PRECISIONS = ("bf16", "fp32")


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


def check_precision(plugin: object, precision: str) -> None:
    """Check a plugin's `precision`.

    Raises:
        UsageError: it is neither `"bf16"` nor `"fp32"`.
    """
    name = type(plugin).__name__
    if precision == "fp16":
        raise UsageError(
            f"{name}(precision='fp16') needs a dynamic loss scale, part of the training state, but checkpoints "
            "do not hold it: use 'bf16'"
        )
    if precision not in _PRECISIONS:
        raise UsageError(f"{name}: precision={precision!r} is neither 'bf16' nor 'fp32'")


def precision_policy(
    precision: str, *, cast_inputs: bool = True, float32_outputs: bool = False
) -> MixedPrecisionPolicy:
    """Return FSDP2's policy for a precision: bf16 computes in bfloat16 and reduces gradients in float32."""
    output_dtype = torch.float32 if float32_outputs else None
    if precision == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=cast_inputs, output_dtype=output_dtype)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=cast_inputs,
        output_dtype=output_dtype,
    )


def check_master_weights(plugin: object, model: nn.Module, instead: str) -> None:
    """Check that what the optimizer will step is float32: the parameters themselves are the master weights here.

    Args:
        plugin: for the message.
        model: not spread yet.
        instead: what to pass to train parameters of lower precision.

    Raises:
        UsageError: a trainable parameter is of lower precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in {torch.bfloat16, torch.float16}:
            raise UsageError(
                f"{type(plugin).__name__}: {name} is {parameter.dtype}, and the parameters themselves are the master "
                f"weights here: load the model in float32 (it computes in bfloat16 all the same), or pass {instead} to "
                "step parameters of that dtype"
            )
