"""How a model is sharded by FSDP2: `TorchFSDPPlugin`."""

# ruff: noqa: FBT001, FBT002 - the parameters, booleans included, are called by position in ColossalAI

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardpoint.booster import blocks as blocks_module
from shardpoint.booster import launch, masters, placing, repoint
from shardpoint.booster.plugin import Plugin
from shardpoint.errors import UsageError


class TorchFSDPPlugin(Plugin):
    """Shard the model with FSDP2: `fully_shard` on every transformer block, then on the root.

    The model is changed in place: its class becomes `FSDP<Name>` (still an instance of the original), its parameters
    DTensors. A model on the meta device is sharded as it is, for `to_empty` and a load afterwards; its optimizer is
    made after that, and boosted by a second call.

    Args:
        mesh: the ranks to shard over: 1-D (FSDP), or 2-D with named axes (HSDP: replicate over the first, shard over
            the second). None takes all ranks in 1-D.
        hsdp_shape: `(replicas, shards)` instead of a 2-D mesh; their product is the number of ranks.
        blocks: the blocks' classes or class names. None finds them: a transformers model's `_no_split_modules`, else
            the repeated members of its module lists. `()` shards the root alone.
        mixed_precision: `"bf16"` and `"fp16"` compute in that dtype and reduce gradients in float32, while parameters
            and optimizer stay as they are; a `MixedPrecisionPolicy` says it in full. fp16 comes without loss scaling:
            scaling the loss is the caller's (a `torch.amp.GradScaler`, saved as `TrainState.grad_scaler`).
        reshard_after_forward: free the gathered parameters after a forward (True), keep them until the backward
            (False), or reshard to so many ranks (an int); None frees all but the root's.
        sync_module_states: rank 0's parameters and buffers replace the others' before sharding, as in DDP. Without it,
            ranks that initialised differently make a mixture of models. Parameters on the meta device are left alone.

    Raises:
        UsageError: the arguments contradict each other.
    """

    controls_precision = True

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        hsdp_shape: tuple[int, int] | None = None,
        blocks: blocks_module.BlockClasses | None = None,
        mixed_precision: Literal["bf16", "fp16"] | MixedPrecisionPolicy | None = None,
        reshard_after_forward: bool | int | None = None,
        sync_module_states: bool = True,
    ) -> None:
        if mesh is not None and hsdp_shape is not None:
            raise UsageError("TorchFSDPPlugin: give a mesh or hsdp_shape, not both")
        if mesh is not None and (mesh.ndim not in {1, 2} or (mesh.ndim == 2 and not mesh.mesh_dim_names)):  # noqa: PLR2004
            raise UsageError(f"TorchFSDPPlugin: the mesh must be 1-D, or 2-D with named axes; this one is {mesh}")
        self.mesh = mesh
        self.hsdp_shape = None if hsdp_shape is None else _pair(hsdp_shape)
        self.blocks = blocks
        self.policy = _policy(mixed_precision)
        self.reshard_after_forward = reshard_after_forward
        self.sync_module_states = sync_module_states
        self._unsynced_depth: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Shard the model in place, and point the optimizer at the sharded parameters, group by group, by name.

        A model whose root is sharded already is left as it is; its optimizer is only checked.

        Raises:
            UsageError: the optimizer is not the model's, or something it or the model carries cannot be sharded;
                model and optimizer are as they were.

        Collective:
            Every rank of the mesh; rank 0's parameters become everyone's unless `sync_module_states=False`.
        """
        names = None if optimizer is None else repoint.optimized_names(model, optimizer)
        if isinstance(model, FSDPModule):
            return model
        if isinstance(model, DistributedDataParallel):
            raise UsageError("the model is wrapped by DistributedDataParallel; give TorchFSDPPlugin the bare model")
        if optimizer is not None and names is not None:
            repoint.check_can_shard(optimizer, names)
        repoint.check_unused(model)
        blocks = blocks_module.find_blocks(model, self.blocks)
        blocks_module.check_groups(model, blocks)
        self._check_masters(model, optimizer, names)
        mesh = self._mesh(model, device)
        self._check_reshard(mesh)
        if self._holds_masters:
            masters.hold(model)
        if self.sync_module_states:
            placing.broadcast_states(model, [mesh.get_group(axis) for axis in range(mesh.ndim)])

        shard(model, blocks, mesh, self.policy, self.reshard_after_forward)
        if optimizer is not None and names is not None:
            repoint.repoint(model, optimizer, names)
        return model

    @property
    def _holds_masters(self) -> bool:
        """Whether trainable parameters are converted to float32."""
        return False

    def _check_masters(self, model: nn.Module, optimizer: Optimizer | None, names: repoint.GroupNames | None) -> None:
        if self._holds_masters:
            masters.check_unstepped(self, model, optimizer, names)

    @contextmanager
    def _unsynced(self, model: nn.Module) -> Iterator[None]:
        sharded = cast("FSDPModule", model)
        depth = self._unsynced_depth.get(model, 0)
        self._unsynced_depth[model] = depth + 1
        if depth == 0:
            sharded.set_requires_gradient_sync(requires_gradient_sync=False)
        try:
            yield
        finally:
            self._unsynced_depth[model] = depth
            if depth == 0:
                sharded.set_requires_gradient_sync(requires_gradient_sync=True)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients local (whole, unreduced) in the context; the next backward after it reduces the sum.

        Raises:
            UsageError: the model is not sharded.
        """
        if not isinstance(model, FSDPModule):
            raise UsageError("no_sync: the model is not sharded by FSDP2; pass what boost() returned")
        return self._unsynced(model)

    def _share_of_data(self) -> tuple[int, int]:
        if self.mesh is None:
            return super()._share_of_data()
        share = 0
        for axis, index in enumerate(_coordinate(self.mesh)):
            share = share * self.mesh.size(axis) + index
        return share, self.mesh.size()

    def _mesh(self, model: nn.Module, device: str | torch.device | None) -> DeviceMesh:
        launch.join_ranks()
        _, world_size = launch.rank_and_world()
        if self.hsdp_shape is not None and self.hsdp_shape[0] * self.hsdp_shape[1] != world_size:
            replicas, shards = self.hsdp_shape
            raise UsageError(f"hsdp_shape={self.hsdp_shape} needs {replicas * shards} ranks; there are {world_size}")
        if self.mesh is None:
            # Made once: a mesh makes process groups, and models that train together (actor, critic) share them.
            where = (placing.where_it_is(model, device) or launch.training_device(device)).type
            if self.hsdp_shape is None:
                self.mesh = init_device_mesh(where, (world_size,), mesh_dim_names=("shard",))
            else:
                self.mesh = init_device_mesh(where, self.hsdp_shape, mesh_dim_names=("replicate", "shard"))
        _coordinate(self.mesh)
        return self.mesh

    def _check_reshard(self, mesh: DeviceMesh) -> None:
        size, wanted = mesh.size(mesh.ndim - 1), self.reshard_after_forward
        if wanted is None or isinstance(wanted, bool):
            return
        if not 1 < wanted < size or size % wanted:
            raise UsageError(
                f"reshard_after_forward={wanted}: as a number of ranks it must divide the {size} that a parameter is "
                "sharded over, and be neither 1 (say False) nor all of them (say True)"
            )


def shard(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool | int | None,
) -> None:
    """Shard a model in place, block by block and then the root; what a user has set on its parameters stays on them."""
    attributes = repoint.attributes(model)
    for _, module in [*blocks, ("", model)]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    repoint.keep_attributes(model, attributes)


def _coordinate(mesh: DeviceMesh) -> list[int]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
    return list(coordinate)


def _pair(hsdp_shape: Sequence[int]) -> tuple[int, int]:
    shape = tuple(hsdp_shape)
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):  # noqa: PLR2004 - a pair
        raise UsageError(f"TorchFSDPPlugin: hsdp_shape={hsdp_shape!r} is not (replicas, shards)")
    return shape[0], shape[1]


def _policy(mixed_precision: str | MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    if isinstance(mixed_precision, MixedPrecisionPolicy):
        return mixed_precision
    if mixed_precision is None:
        return MixedPrecisionPolicy()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        raise UsageError(f"mixed_precision={mixed_precision!r} is not 'bf16', 'fp16', a MixedPrecisionPolicy or None")
    return MixedPrecisionPolicy(param_dtype=dtypes[mixed_precision], reduce_dtype=torch.float32)
