"""How a model is replicated: `TorchDDPPlugin`."""

# ruff: noqa: FBT001, FBT002 - the parameters, booleans included, are ColossalAI's, and are called by position there

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardpoint.booster import launch, placing, repoint
from shardpoint.booster.plugin import Plugin
from shardpoint.errors import UsageError


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
        placing.move(model, optimizer, placing.where_it_is(model, device) or launch.training_device(device))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            placing.broadcast_states(model, [dist.group.WORLD])
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
