"""ZeRO under ColossalAI's names, as settings of FSDP2: `LowLevelZeroPlugin` and `GeminiPlugin`."""

# ruff: noqa: FBT001, FBT002, PLR0913, PLR0917 - the parameters are ColossalAI's, and may be given by position

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardpoint.booster import clipping, launch, loss_scale, masters, options
from shardpoint.booster.fsdp import TorchFSDPPlugin
from shardpoint.errors import UsageError


class _ZeroPlugin(TorchFSDPPlugin):
    """FSDP2 with a precision, master weights, clipping, and replica groups, as ColossalAI's two ZeRO plugins have."""

    def _settle(
        self,
        precision: str,
        scaling: loss_scale.ScaleOptions | None,
        max_norm: float,
        norm_type: float,
        extra_dp_size: int,
        *,
        master_weights: bool,
    ) -> None:
        if max_norm:
            clipping.check_norm(max_norm, norm_type)
        if extra_dp_size < 1:
            raise UsageError(f"{type(self).__name__}: extra_dp_size={extra_dp_size} is not a number of replica groups")
        self.precision = precision
        self._scaling = scaling
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.extra_dp_size = extra_dp_size
        self.master_weights = master_weights

    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Shard the model in place as `TorchFSDPPlugin` does, and clip the optimizer's gradients before its steps.

        Raises:
            UsageError: as `TorchFSDPPlugin.configure`; or a trainable parameter of lower precision has optimizer state
                already, or may not be converted with fp16; or the ranks do not divide by `extra_dp_size`.

        Collective:
            Every rank.
        """
        if self.extra_dp_size > 1:
            _, world_size = launch.rank_and_world()
            if world_size % self.extra_dp_size:
                raise UsageError(
                    f"{type(self).__name__}: extra_dp_size={self.extra_dp_size} does not divide the {world_size} ranks"
                )
            self.hsdp_shape = (self.extra_dp_size, world_size // self.extra_dp_size)
        if self._scaling is not None and not self.master_weights:
            masters.check_low(self, model, "leave master_weights=False out, or use precision='bf16'")
        spread = super().configure(model, optimizer, device=device)
        if optimizer is not None and self._scaling is not None:
            loss_scale.scale_steps(optimizer, self._scaling, on_all_ranks=True)
        if optimizer is not None and self.max_norm:
            clipping.clip_before_steps(optimizer, self.max_norm, self.norm_type)
        return spread

    @property
    def _holds_masters(self) -> bool:
        return self.precision != "fp32" and self.master_weights


class LowLevelZeroPlugin(_ZeroPlugin):
    """Shard optimizer and gradients (ZeRO-1 and 2): FSDP2 that keeps gathered parameters from forward to backward.

    The parameters are ColossalAI's, in its order. Between two steps FSDP2 shards the parameters as well, and gradients
    are reduced to shards in the backward, so stages 1 and 2 are the same here, and neither needs more memory than
    ColossalAI's. An option that is not described here is refused, unless it has ColossalAI's default.

    Args:
        stage: 1 or 2.
        precision: `"bf16"` (default; ColossalAI's is fp16): forward and backward compute in bfloat16, gradients are
            reduced in float32, and the parameters themselves are the master weights, which checkpoints hold.
            `"fp16"`: the same in float16, with a dynamic loss scale. `Booster.backward` scales the loss; before each
            step (and in `Booster.clip_grad_norm_`) gradients are unscaled, and a step is left out, its gradients
            dropped, on all ranks where one of any rank's is not finite. The scale is saved and restored with the
            optimizer. `"fp32"`: everything is computed in the parameters' own dtype.
        initial_scale: where fp16's loss scale begins; with this default as many steps are left out as it takes to
            come down. Without fp16 it is without effect, as the six after it.
        min_scale: the least scale; 0 is no bound.
        growth_factor: what the scale grows by after `growth_interval` steps without an overflow.
        backoff_factor: what it shrinks by after an overflow.
        growth_interval: see `growth_factor`.
        hysteresis: with how many overflows since it last grew it begins to shrink.
        max_scale: the greatest scale; 0 is no bound.
        max_norm: clip gradients to this norm in each `optimizer.step()`; 0 does not clip.
        norm_type: p of that norm.
        reduce_bucket_size_in_m: refused: FSDP2 has no buckets.
        communication_dtype: refused: gradients are reduced in float32, or in their own dtype (fp32).
        overlap_communication: only True.
        overlap_allgather: refused.
        cpu_offload: refused.
        master_weights: with True, trainable parameters that are not float32 are converted in place (an optimizer that
            has state of them already is refused); False steps them as they are, and cannot be had with fp16.
        verbose: refused.
        cast_inputs: cast the inputs of each block to the dtype that it computes in.
        fp8_communication: refused.
        use_fp8: refused.
        extra_dp_size: so many groups of ranks hold the same shards (HSDP).

    Raises:
        UsageError: an option cannot be honoured.
    """

    def __init__(
        self,
        stage: int = 1,
        precision: str = "bf16",
        initial_scale: float = 2**32,
        min_scale: float = 1,
        growth_factor: float = 2,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2**32,
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        reduce_bucket_size_in_m: int = 12,
        communication_dtype: torch.dtype | None = None,
        overlap_communication: bool = True,
        overlap_allgather: bool = False,
        cpu_offload: bool = False,
        master_weights: bool = True,
        verbose: bool = False,
        cast_inputs: bool = True,
        fp8_communication: bool = False,
        use_fp8: bool = False,
        extra_dp_size: int = 1,
    ) -> None:
        given = dict(locals())
        options.refuse_changed(self, given, _LOW_LEVEL_ZERO_REFUSED)
        scaling = options.loss_scaling(self, precision, given)
        if stage not in {1, 2}:
            raise UsageError(f"LowLevelZeroPlugin: stage={stage} is neither 1 nor 2; GeminiPlugin shards as stage 3")
        policy = options.precision_policy(precision, cast_inputs=cast_inputs)
        super().__init__(mixed_precision=policy, reshard_after_forward=False)
        self._settle(precision, scaling, max_norm, norm_type, extra_dp_size, master_weights=master_weights)
        self.stage = stage


class GeminiPlugin(_ZeroPlugin):
    """Shard parameters, gradients and optimizer (ZeRO-3): FSDP2 that frees gathered parameters after each forward.

    The parameters are ColossalAI's, in its order. Gemini's chunks, prefetching and heterogeneous memory have no
    counterpart: FSDP2 shards each parameter over all ranks. An option that is not described here is refused, unless it
    has ColossalAI's default.

    Args:
        chunk_config_dict: refused, as every option of chunks and placement below that is not described.
        chunk_init_device: see `chunk_config_dict`.
        placement_policy: only `"static"`.
        enable_gradient_accumulation: a hint: gradients always accumulate until `zero_grad`.
        max_prefetch: see `chunk_config_dict`.
        shard_param_frac: 1.0 is ZeRO-3; 0.0 keeps gathered parameters until the backward, as ZeRO-2; nothing between.
        offload_optim_frac: refused: nothing is offloaded.
        offload_param_frac: see `offload_optim_frac`.
        warmup_non_model_data_ratio: see `chunk_config_dict`.
        steady_cuda_cap_ratio: see `chunk_config_dict`.
        precision: as `LowLevelZeroPlugin`'s: `"bf16"` (default), `"fp16"` or `"fp32"`.
        master_weights: as `LowLevelZeroPlugin`'s.
        pin_memory: see `offload_optim_frac`.
        force_outputs_fp32: cast floating-point outputs of each block and of the model to float32.
        strict_ddp_mode: see `chunk_config_dict`.
        search_range_m: see `chunk_config_dict`.
        hidden_dim: see `chunk_config_dict`.
        min_chunk_size_m: see `chunk_config_dict`.
        memstats: see `chunk_config_dict`.
        gpu_margin_mem_ratio: see `chunk_config_dict`.
        initial_scale: as `LowLevelZeroPlugin`'s, as the six after it: where fp16's loss scale begins.
        min_scale: see `initial_scale`.
        growth_factor: see `initial_scale`.
        backoff_factor: see `initial_scale`.
        growth_interval: see `initial_scale`.
        hysteresis: see `initial_scale`.
        max_scale: see `initial_scale`.
        max_norm: clip gradients to this norm in each `optimizer.step()`; 0 does not clip.
        norm_type: p of that norm.
        tp_size: only 1: tensor parallelism is `HybridParallelPlugin`'s.
        extra_dp_size: so many groups of ranks hold the same shards (HSDP).
        enable_all_optimization: refused, as the four after it: Shardformer is not here.
        enable_fused_normalization: see `enable_all_optimization`.
        enable_flash_attention: see `enable_all_optimization`.
        enable_sequence_parallelism: see `enable_all_optimization`.
        enable_jit_fused: see `enable_all_optimization`.
        enable_async_reduce: only True.
        use_fp8: refused.
        verbose: refused.
        fp8_communication: refused.

    Raises:
        UsageError: an option cannot be honoured.
    """

    def __init__(
        self,
        chunk_config_dict: dict[Any, Any] | None = None,
        chunk_init_device: torch.device | None = None,
        placement_policy: str = "static",
        enable_gradient_accumulation: bool = False,
        max_prefetch: int = 0,
        shard_param_frac: float = 1.0,
        offload_optim_frac: float = 0.0,
        offload_param_frac: float = 0.0,
        warmup_non_model_data_ratio: float = 0.8,
        steady_cuda_cap_ratio: float = 0.9,
        precision: str = "bf16",
        master_weights: bool = True,
        pin_memory: bool = False,
        force_outputs_fp32: bool = False,
        strict_ddp_mode: bool = False,
        search_range_m: int = 32,
        hidden_dim: int | None = None,
        min_chunk_size_m: float = 32,
        memstats: Any = None,
        gpu_margin_mem_ratio: float = 0.0,
        initial_scale: float = 2**16,
        min_scale: float = 1,
        growth_factor: float = 2,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2**32,
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        tp_size: int = 1,
        extra_dp_size: int = 1,
        enable_all_optimization: bool = False,
        enable_fused_normalization: bool = False,
        enable_flash_attention: bool = False,
        enable_sequence_parallelism: bool = False,
        enable_jit_fused: bool = False,
        enable_async_reduce: bool = True,
        use_fp8: bool = False,
        verbose: bool = False,
        fp8_communication: bool = False,
    ) -> None:
        given = dict(locals())
        options.refuse_changed(self, given, _GEMINI_REFUSED)
        scaling = options.loss_scaling(self, precision, given)
        if shard_param_frac not in {0.0, 1.0}:
            raise UsageError(
                f"GeminiPlugin: shard_param_frac={shard_param_frac}: FSDP2 keeps gathered parameters to the backward "
                "(0.0) or frees them after the forward (1.0)"
            )
        policy = options.precision_policy(precision, float32_outputs=force_outputs_fp32)
        super().__init__(mixed_precision=policy, reshard_after_forward=shard_param_frac == 1.0)
        self._settle(precision, scaling, max_norm, norm_type, extra_dp_size, master_weights=master_weights)


_SILENT = "nothing is printed here"
_LOW_LEVEL_ZERO_REFUSED = {
    "reduce_bucket_size_in_m": options.BUCKETS,
    "communication_dtype": options.REDUCTION,
    "overlap_communication": options.OVERLAP,
    "overlap_allgather": options.ALLGATHER,
    "cpu_offload": options.OFFLOAD,
    "verbose": _SILENT,
    "fp8_communication": options.FP8,
    "use_fp8": options.FP8,
}
_CHUNKS = "FSDP2 shards each parameter over all ranks, without chunks and without placing them"
_GEMINI_REFUSED = (
    dict.fromkeys(
        ("chunk_config_dict", "chunk_init_device", "placement_policy", "max_prefetch", "warmup_non_model_data_ratio",
         "steady_cuda_cap_ratio", "strict_ddp_mode", "search_range_m", "hidden_dim", "min_chunk_size_m", "memstats",
         "gpu_margin_mem_ratio"),
        _CHUNKS,
    )
    | dict.fromkeys(("offload_optim_frac", "offload_param_frac", "pin_memory"), options.OFFLOAD)
    | dict.fromkeys(
        ("enable_all_optimization", "enable_fused_normalization", "enable_flash_attention",
         "enable_sequence_parallelism", "enable_jit_fused"),
        options.SHARDFORMER,
    )
    | {
        "tp_size": "use HybridParallelPlugin(tp_size=...)",
        "enable_async_reduce": options.OVERLAP,
        "use_fp8": options.FP8,
        "verbose": _SILENT,
        "fp8_communication": options.FP8,
    }
)  # fmt: skip
