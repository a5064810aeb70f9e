"""How a model is cut by tensor parallelism and sharded by FSDP2 at once: `HybridParallelPlugin`."""

# ruff: noqa: FBT001, FBT002, PLR0913, PLR0917 - the parameters are ColossalAI's, and may be given by position

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardpoint.booster import blocks as blocks_module
from shardpoint.booster import (
    clipping,
    fsdp,
    launch,
    loss_scale,
    masters,
    options,
    placing,
    precision,
    repoint,
    tensor_parallel,
)
from shardpoint.booster.plugin import Plugin
from shardpoint.errors import UsageError


class HybridParallelPlugin(Plugin):
    """Cut the model over `tp_size` ranks by its own `tp_plan`, and shard it by FSDP2 over the rest of the ranks.

    Ranks that follow each other cut a model together (the mesh is `[dp, tp]`), and must be given the same batch; the
    groups are data parallel. Whole numbers of heads go to each rank. Where `tp_size` is the number of ranks there is no
    FSDP2: parameters that no rank cuts (norms) are then plain tensors with equal gradients on all ranks, and since
    torch cannot step them together with cut ones, `foreach` is set to False in the optimizer's groups. torch's
    `clip_grad_norm_` raises on such a model: use `max_norm`, or `Booster.clip_grad_norm_`.

    The parameters are ColossalAI's, in its order; an option that is not described here is refused, unless it has
    ColossalAI's default. What is different: there is no Shardformer (transformers' modules run as they are), the
    vocabulary is not padded, and the model's outputs are whole on all ranks.

    Args:
        tp_size: over how many ranks each model is cut; it divides the number of ranks.
        pp_size: only 1; the options of pipelines are without effect then, as they are in ColossalAI.
        sp_size: only None or 1; the options of sequence parallelism are without effect then.
        precision: `"bf16"` (default; ColossalAI's is fp16): under FSDP2 forward and backward compute in bfloat16 and
            gradients are reduced in float32; without it the forward runs under `torch.autocast`, as
            `Booster(mixed_precision="bf16")` does. In both cases the parameters themselves are the master weights:
            trained ones that are not float32 are converted in place, and checkpoints hold them so. `"fp16"`: the same
            in float16, with a dynamic loss scale, as `LowLevelZeroPlugin`'s. `"fp32"`: everything is computed in the
            parameters' own dtype.
        zero_stage: 0, 1 or 2. FSDP2 keeps gathered parameters from forward to backward, and shards parameters,
            gradients and optimizer between steps: the three are the same here, and none needs more memory than
            ColossalAI's.
        enable_all_optimization: refused, as Shardformer's other options.
        enable_fused_normalization: see `enable_all_optimization`.
        enable_flash_attention: see `enable_all_optimization`.
        enable_jit_fused: see `enable_all_optimization`.
        enable_sequence_parallelism: only False.
        sequence_parallelism_mode: see `sp_size`.
        parallel_output: a hint: outputs are whole in any case, and so is the loss.
        num_microbatches: see `pp_size`.
        microbatch_size: see `pp_size`.
        initial_scale: as `LowLevelZeroPlugin`'s, as the six after it: where fp16's loss scale begins.
        min_scale: see `initial_scale`.
        growth_factor: see `initial_scale`.
        backoff_factor: see `initial_scale`.
        growth_interval: see `initial_scale`.
        hysteresis: see `initial_scale`.
        max_scale: see `initial_scale`.
        max_norm: clip gradients to this 2-norm in each `optimizer.step()`; 0 does not clip.
        broadcast_buffers: refused, as DDP's other options: FSDP2 is used.
        ddp_bucket_cap_mb: see `broadcast_buffers`.
        find_unused_parameters: see `broadcast_buffers`.
        check_reduction: see `broadcast_buffers`.
        gradient_as_bucket_view: see `broadcast_buffers`.
        static_graph: see `broadcast_buffers`.
        zero_bucket_size_in_m: refused: FSDP2 has no buckets.
        cpu_offload: refused.
        communication_dtype: refused: gradients are reduced in float32, or in their own dtype (fp32).
        overlap_communication: only True.
        custom_policy: refused: set `model.tp_plan`.
        pp_style: see `pp_size`.
        num_model_chunks: see `pp_size`.
        scheduler_nodes: see `pp_size`.
        num_layers_per_stage: see `pp_size`.
        gradient_checkpoint_config: refused: call `model.gradient_checkpointing_enable()`.
        enable_metadata_cache: see `pp_size`.
        make_vocab_size_divisible_by: refused: the vocabulary is cut unevenly where it does not divide.
        dp_outside: only True.
        overlap_p2p: see `pp_size`.
        overlap_allgather: refused.
        fp8_communication: refused.
        use_fp8: refused.
        inner_ring_size: see `sp_size`.

    Attributes:
        tp_size: as given.
        pp_size: 1, for scripts that ask whether there is a pipeline.
        sp_size: 1, likewise.
        mesh: the `[dp, tp]` mesh, once a model is configured.

    Raises:
        UsageError: an option cannot be honoured.
    """

    controls_precision = True

    def __init__(
        self,
        tp_size: int,
        pp_size: int = 1,
        sp_size: int | None = None,
        precision: str = "bf16",
        zero_stage: int = 0,
        enable_all_optimization: bool = False,
        enable_fused_normalization: bool = False,
        enable_flash_attention: bool = False,
        enable_jit_fused: bool = False,
        enable_sequence_parallelism: bool = False,
        sequence_parallelism_mode: str | None = None,
        parallel_output: bool = True,
        num_microbatches: int | None = None,
        microbatch_size: int | None = None,
        initial_scale: float = 2**16,
        min_scale: float = 1,
        growth_factor: float = 2,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2**32,
        max_norm: float = 0,
        broadcast_buffers: bool = True,
        ddp_bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        zero_bucket_size_in_m: int = 12,
        cpu_offload: bool = False,
        communication_dtype: torch.dtype | None = None,
        overlap_communication: bool = True,
        custom_policy: Any = None,
        pp_style: str = "1f1b",
        num_model_chunks: int = 1,
        scheduler_nodes: list[Any] | None = None,
        num_layers_per_stage: list[int] | None = None,
        gradient_checkpoint_config: Any = None,
        enable_metadata_cache: bool = True,
        make_vocab_size_divisible_by: int = 64,
        dp_outside: bool = True,
        overlap_p2p: bool = True,
        overlap_allgather: bool = False,
        fp8_communication: bool = False,
        use_fp8: bool = False,
        inner_ring_size: int | None = None,
    ) -> None:
        given = dict(locals())
        options.refuse_changed(self, given, _REFUSED)
        scaling = options.loss_scaling(self, precision, given)
        if sp_size not in {None, 1}:
            raise UsageError(f"HybridParallelPlugin: sp_size={sp_size} cannot be honoured: {_SEQUENCE}")
        if type(tp_size) is not int or tp_size < 1:
            raise UsageError(f"HybridParallelPlugin: tp_size={tp_size!r} is not a number of ranks")
        if zero_stage not in {0, 1, 2}:
            raise UsageError(f"HybridParallelPlugin: zero_stage={zero_stage} is not 0, 1 or 2")
        if max_norm:
            clipping.check_norm(max_norm, 2.0)
        self.tp_size = tp_size
        self.pp_size = self.sp_size = 1
        self.precision = precision
        self._scaling = scaling
        self.zero_stage = zero_stage
        self.max_norm = max_norm
        self.mesh: DeviceMesh | None = None
        self._spread_here: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._fsdp = fsdp.TorchFSDPPlugin(mixed_precision=options.precision_policy(precision))

    @property
    def dp_size(self) -> int:
        """How many groups of ranks train on different data."""
        return launch.rank_and_world()[1] // self.tp_size

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The ranks that hold this rank's part of the model for other data; its rank here is the data's.

        Raises:
            UsageError: no model has been configured yet.
        """
        return self._known_mesh().get_group("dp")

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The ranks that cut one model together.

        Raises:
            UsageError: no model has been configured yet.
        """
        return self._known_mesh().get_group("tp")

    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Cut and shard the model in place, and point the optimizer at the new parameters, group by group, by name.

        A model that this plugin has spread already is left as it is; its optimizer is only checked.

        Raises:
            UsageError: the optimizer is not the model's or has stepped already, the ranks do not divide by `tp_size`,
                or something about the model cannot be cut or sharded; model and optimizer are as they were.

        Collective:
            Every rank; rank 0's parameters become everyone's.
        """
        names = None if optimizer is None else repoint.optimized_names(model, optimizer)
        if model not in self._spread_here:
            self._spread(model, optimizer, names, device)
            self._spread_here.add(model)
        if optimizer is not None and self._scaling is not None:
            loss_scale.scale_steps(optimizer, self._scaling, on_all_ranks=True)
        if optimizer is not None and self.max_norm:
            clipping.clip_before_steps(optimizer, self.max_norm, 2.0)
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients local in the context, where FSDP2 would reduce them; tensor parallelism alone reduces none.

        Raises:
            UsageError: the model is not spread.
        """
        if model not in self._spread_here:
            raise UsageError("no_sync: the model is not spread by HybridParallelPlugin; pass what boost() returned")
        return self._fsdp.no_sync(model) if isinstance(model, FSDPModule) else nullcontext()

    def _share_of_data(self) -> tuple[int, int]:
        rank, world_size = launch.rank_and_world()
        self._check_ranks(world_size)
        return rank // self.tp_size, world_size // self.tp_size  # the mesh is [dp, tp], before it is made, too

    def _check_ranks(self, world_size: int) -> None:
        if world_size % self.tp_size:
            raise UsageError(f"HybridParallelPlugin: tp_size={self.tp_size} does not divide the {world_size} ranks")

    def _spread(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        names: repoint.GroupNames | None,
        device: str | torch.device | None,
    ) -> None:
        cuts, alone = self._check(model, optimizer, names)
        blocks = [] if alone else blocks_module.find_blocks(model)
        if not alone:
            blocks_module.check_groups(model, blocks)
        where = self._join(model, device)
        mesh = self._known_mesh()
        if self.precision != "fp32":
            masters.hold(model)
        placing.broadcast_states(model, [mesh.get_group(axis) for axis in range(mesh.ndim)])
        if alone:
            placing.move(model, optimizer, where)
        if cuts:
            tensor_parallel.cut(model, cuts, mesh["tp"])
        if not alone:
            fsdp.shard(model, blocks, mesh["dp"], self._fsdp.policy, reshard_after_forward=False)
        else:
            low = options.low_dtype(self.precision)
            if low is not None:
                precision.autocast_model(model, where.type, low)
        if optimizer is not None and names is not None:
            repoint.repoint(model, optimizer, names)
            if alone:
                tensor_parallel.step_one_by_one(optimizer)

    def _check(
        self, model: nn.Module, optimizer: Optimizer | None, names: repoint.GroupNames | None
    ) -> tuple[list[tensor_parallel.Cut], bool]:
        """Return what is cut, and whether tensor parallelism stands alone, once nothing speaks against it."""
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if sharded or isinstance(model, DistributedDataParallel | FSDPModule):
            raise UsageError("the model is spread over ranks already; give HybridParallelPlugin the bare model")
        if self.precision != "fp32":
            masters.check_unstepped(self, model, optimizer, names)
        repoint.check_unused(model)
        _, world_size = launch.rank_and_world()
        self._check_ranks(world_size)
        cuts = tensor_parallel.find_cuts(model, self.tp_size) if self.tp_size > 1 else []
        alone = bool(cuts) and self.tp_size == world_size
        if optimizer is not None and names is not None:
            _check_unstepped(optimizer, names)
            if alone:
                tensor_parallel.check_steps_one_by_one(optimizer)
        return cuts, alone

    def _join(self, model: nn.Module, device: str | torch.device | None) -> torch.device:
        launch.join_ranks()
        where = placing.where_it_is(model, device) or launch.training_device(device)
        if self.mesh is None:
            # Made once: a mesh makes process groups, and models that train together (actor, critic) share them.
            shape = (dist.get_world_size() // self.tp_size, self.tp_size)
            self.mesh = init_device_mesh(where.type, shape, mesh_dim_names=("dp", "tp"))
        return where

    def _known_mesh(self) -> DeviceMesh:
        if self.mesh is None:
            raise UsageError("HybridParallelPlugin makes its mesh with the first model: boost one before")
        return self.mesh


def _check_unstepped(optimizer: Optimizer, names: repoint.GroupNames) -> None:
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], group_names, strict=True):
            if repoint.has_state(optimizer, parameter):
                raise UsageError(f"the optimizer has state of {name} already: boost before the first step, then resume")


_PIPELINE = "there is no pipeline parallelism here"
_SEQUENCE = "there is no sequence parallelism here"
_DDP = "FSDP2 spreads the model over data-parallel ranks, not DDP"
_REFUSED = (
    {"pp_size": _PIPELINE, "enable_sequence_parallelism": _SEQUENCE}
    | dict.fromkeys(
        ("enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused"),
        options.SHARDFORMER,
    )
    | dict.fromkeys(
        ("broadcast_buffers", "ddp_bucket_cap_mb", "find_unused_parameters", "check_reduction",
         "gradient_as_bucket_view", "static_graph"),
        _DDP,
    )
    | {
        "zero_bucket_size_in_m": options.BUCKETS,
        "cpu_offload": options.OFFLOAD,
        "communication_dtype": options.REDUCTION,
        "overlap_communication": options.OVERLAP,
        "custom_policy": "the model's own tp_plan says how it is cut",
        "gradient_checkpoint_config": "call model.gradient_checkpointing_enable()",
        "make_vocab_size_divisible_by": "the vocabulary is not padded",
        "dp_outside": "ranks that follow each other cut one model",
        "overlap_allgather": options.ALLGATHER,
        "fp8_communication": options.FP8,
        "use_fp8": options.FP8,
    }
)  # fmt: skip
