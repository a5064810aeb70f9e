"""How a model is spread over the ranks: the plugin base, DDP, and FSDP2."""

# ruff: noqa: FBT001, FBT002 - the parameters, booleans included, are ColossalAI's, and are called by position there

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardpoint.booster import blocks as blocks_module
from shardpoint.booster import launch, repoint
from shardpoint.errors import UsageError

_BROADCAST_BYTES = 256 * 1024 * 1024


class Plugin(ABC):
    """Spread one model over the ranks, in place where it can; the `Booster` does what is common to all plugins.

    Attributes:
        controls_precision: the plugin itself computes in lower precision, so the Booster's `mixed_precision` has no
            place beside it.
    """

    controls_precision: ClassVar[bool] = False

    @abstractmethod
    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Spread the model, and make the optimizer follow it in place.

        Args:
            model: as the user made it, or a module that this plugin has already spread.
            optimizer: one made from the model's parameters; its groups are updated, the object stays.
            device: where to train; None leaves the choice to the plugin.

        Returns:
            The module to call in training.

        Raises:
            UsageError: something that was given cannot be honoured; model and optimizer are as they were.

        Collective:
            Every rank.
        """

    @abstractmethod
    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Accumulate gradients without synchronising them until the context ends.

        Raises:
            UsageError: this plugin has not spread the model.
        """


class TorchDDPPlugin(Plugin):
    """Replicate the model with `DistributedDataParallel`.

    The parameters are `DistributedDataParallel`'s. Unlike ColossalAI's plugin, BatchNorm layers stay what they are:
    call `torch.nn.SyncBatchNorm.convert_sync_batchnorm` before `boost` if their statistics should be common. A model
    without trainable parameters (a reference model) is made equal on all ranks and returned unwrapped: there is
    nothing to reduce.

    Args:
        broadcast_buffers: rank 0's buffers replace the others' at the start and in every forward.
        bucket_cap_mb: the size of a bucket of gradients, in MiB.
        find_unused_parameters: look in every forward for parameters that will get no gradient.
        check_reduction: only False: torch has no such check any more.
        gradient_as_bucket_view: gradients are views of the buckets.
        static_graph: the graph is the same in every iteration.

    Raises:
        UsageError: `check_reduction` is set.
    """

    def __init__(
        self,
        broadcast_buffers: bool = True,
        bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
    ) -> None:
        if check_reduction:
            raise UsageError("check_reduction=True: torch ignores it since its reducer always checks; leave it out")
        self.broadcast_buffers = broadcast_buffers
        self.bucket_cap_mb = bucket_cap_mb
        self.find_unused_parameters = find_unused_parameters
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.static_graph = static_graph

    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Move the model to the training device and wrap it; a wrapped model is returned as it is.

        Raises:
            UsageError: a parameter is on the meta device or is sharded already, or the optimizer is not the model's.

        Collective:
            Every rank; rank 0's parameters become everyone's.
        """
        if isinstance(model, DistributedDataParallel):
            if optimizer is not None:
                repoint.optimized_names(model, optimizer)
            return model
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise UsageError(f"{name} is on the meta device: give it memory (model.to_empty, load) before boost()")
            if isinstance(parameter, DTensor):
                raise UsageError(
                    f"{name} is a DTensor; TorchDDPPlugin replicates whole parameters: use TorchFSDPPlugin"
                )
        launch.join_ranks()
        move(model, optimizer, _where_it_is(model, device) or launch.training_device(device))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            _broadcast_states(model, [dist.group.WORLD])
            return model
        if self.broadcast_buffers:
            return self._wrap(model, forward_sync_buffers=True)
        with warnings.catch_warnings():
            # torch wants forward_sync_buffers=False instead, but that would still overwrite the ranks' buffers once.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return self._wrap(model, broadcast_buffers=False)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the wrapped model's own `no_sync`.

        Raises:
            UsageError: the model is not wrapped, though it has parameters to train.
        """
        if isinstance(model, DistributedDataParallel):
            return cast("AbstractContextManager[None]", model.no_sync())
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError("no_sync: the model is not wrapped by TorchDDPPlugin; pass what boost() returned")
        return nullcontext()

    def _wrap(
        self, model: nn.Module, *, forward_sync_buffers: bool | None = None, broadcast_buffers: bool | None = None
    ) -> DistributedDataParallel:
        return DistributedDataParallel(
            model,
            broadcast_buffers=broadcast_buffers,
            forward_sync_buffers=forward_sync_buffers,
            bucket_cap_mb=self.bucket_cap_mb,
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            static_graph=self.static_graph,
        )


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
            scaling the loss is the caller's.
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
        mesh = self._mesh(model, device)
        self._check_reshard(mesh)
        if self.sync_module_states:
            _broadcast_states(model, [mesh.get_group(axis) for axis in range(mesh.ndim)])

        attributes = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
        for _, module in [*blocks, ("", model)]:
            fully_shard(module, mesh=mesh, mp_policy=self.policy, reshard_after_forward=self.reshard_after_forward)
        for name, parameter in model.named_parameters():
            for key, value in attributes[name].items():
                if not hasattr(parameter, key):
                    setattr(parameter, key, value)
        if optimizer is not None and names is not None:
            repoint.repoint(model, optimizer, names)
        return model

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

    def _mesh(self, model: nn.Module, device: str | torch.device | None) -> DeviceMesh:
        launch.join_ranks()
        _, world_size = launch.rank_and_world()
        if self.hsdp_shape is not None and self.hsdp_shape[0] * self.hsdp_shape[1] != world_size:
            replicas, shards = self.hsdp_shape
            raise UsageError(f"hsdp_shape={self.hsdp_shape} needs {replicas * shards} ranks; there are {world_size}")
        if self.mesh is None:
            # Made once: a mesh makes process groups, and models that train together (actor, critic) share them.
            where = (_where_it_is(model, device) or launch.training_device(device)).type
            if self.hsdp_shape is None:
                self.mesh = init_device_mesh(where, (world_size,), mesh_dim_names=("shard",))
            else:
                self.mesh = init_device_mesh(where, self.hsdp_shape, mesh_dim_names=("replicate", "shard"))
        if self.mesh.get_coordinate() is None:
            raise UsageError(f"rank {dist.get_rank()} is not in the mesh {self.mesh}")
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


def move(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> None:
    """Move a model, and an optimizer's state with it.

    Raises:
        UsageError: the optimizer is not the model's.
    """
    names = None if optimizer is None else repoint.optimized_names(model, optimizer)
    if all(tensor.device == device for tensor in [*model.parameters(), *model.buffers()]):
        return
    model.to(device)
    if optimizer is not None and names is not None:
        repoint.repoint(model, optimizer, names)


def _where_it_is(model: nn.Module, requested: str | torch.device | None) -> torch.device | None:
    """Return the accelerator that the user has already put the model on, if nothing else was asked for."""
    if requested is not None:
        return None
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return device if device.type not in {"cpu", "meta"} else None


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


@torch.no_grad()
def _broadcast_states(model: nn.Module, groups: list[dist.ProcessGroup | None]) -> None:
    """Give every rank the parameters and buffers of the first, one axis of the mesh after the other."""
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if not groups or id(tensor) in seen or tensor.is_meta or isinstance(tensor, DTensor) or not tensor.numel():
            continue
        seen.add(id(tensor))
        whole = tensor.detach().contiguous()
        # As bytes: gloo refuses fp8, int16 and uint16.
        for part in whole.view(-1).view(torch.uint8).split(_BROADCAST_BYTES):
            for group in groups:
                _broadcast(part, group)
        if whole.data_ptr() != tensor.data_ptr() and not torch.equal(whole, tensor):
            tensor.copy_(whole)


def _broadcast(part: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    backends = dist.get_backend_config(group)
    if f"{part.device.type}:" in backends:
        dist.broadcast(part, group=group, group_src=0)
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise UsageError(
            f"the process group ({backends}) cannot move tensors of {part.device}: use gloo, or move the model"
        )
    there = part.to(accelerator)
    dist.broadcast(there, group=group, group_src=0)
    part.copy_(there)
