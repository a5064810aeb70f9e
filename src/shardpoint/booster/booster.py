"""How a training run is set up and its parts saved: `Booster`, with ColossalAI's interface."""

# ruff: noqa: FBT001, FBT002 - the parameters, booleans included, are ColossalAI's, and are called by position there

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from shardpoint import engine
from shardpoint.adapters import c10d
from shardpoint.booster import arguments, clipping, lora, loss_scale, placing, precision, repoint
from shardpoint.booster.plugin import Plugin
from shardpoint.data import with_own_generator
from shardpoint.errors import UsageError

_AUTOCAST_SCALE = loss_scale.ScaleOptions(growth_interval=2000, hysteresis=1)  # as torch.amp.GradScaler's


class Booster:
    """Spread a model over the ranks that were started, and save and load the parts of its training state.

    Args:
        device: where to train. None leaves it to the plugin; without a plugin the model stays where it is.
        mixed_precision: `"bf16"` and `"fp16"` run the forward (and the criterion) under `torch.autocast`; not beside a
            plugin that computes in lower precision itself (`TorchFSDPPlugin(mixed_precision=...)`). With fp16
            `backward` scales the loss, a step unscales the gradients and is left out where they are not finite, and the
            scale is saved and restored with the optimizer. It begins at 2**16, grows after 2000 steps without an
            overflow, shrinks with every overflow, and stays between 1 and 2**32.
        plugin: how to spread the model; None trains in this process alone.

    Raises:
        UsageError: an argument is not one of these.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> booster = Booster()
        >>> model, optimizer, *_ = booster.boost(model, optimizer)
        >>> booster.backward(model(torch.ones(2, 4)).mean(), optimizer)
        >>> optimizer.step()
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        mixed_precision: str | None = None,
        plugin: Plugin | None = None,
    ) -> None:
        if plugin is not None and not isinstance(plugin, Plugin):
            raise UsageError(f"plugin is a {type(plugin).__name__}, not one of shardpoint.booster's plugins")
        self._autocast_dtype = precision.autocast_dtype(mixed_precision)
        if mixed_precision is not None and plugin is not None and plugin.controls_precision:
            name = type(plugin).__name__
            raise UsageError(f"mixed_precision belongs to the plugin here: {name}(mixed_precision={mixed_precision!r})")
        self.device = device
        self.mixed_precision = mixed_precision
        self.plugin = plugin
        self._models: weakref.WeakKeyDictionary[Optimizer, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()

    def boost(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> list[Any]:
        """Spread a model, and make its optimizer follow.

        The optimizer returned is the one given: under FSDP2 it steps the sharded parameters afterwards, in the same
        groups, with its state sharded along, and a scheduler bound to it still works. A second optimizer of the same
        model is boosted by a second call.

        Args:
            model: the model; anything that replaces parameters (LoRA, resized embeddings) is done already.
            optimizer: made from the model's parameters.
            criterion: the loss; changed only by `mixed_precision`.
            dataloader: returned; a torch `DataLoader` without a `generator` gets one of its own
                (`shardpoint.data.with_own_generator`), so that opening it draws nothing that a resume has restored.
            lr_scheduler: returned as it is.

        Returns:
            `[model, optimizer, criterion, dataloader, lr_scheduler]`, None where None was given.

        Raises:
            UsageError: the optimizer holds parameters that are not the model's, the scheduler steps another optimizer,
                or the plugin cannot honour what it was given; model and optimizer are as they were.

        Collective:
            Every rank, with a plugin.
        """
        _check_kinds(model, optimizer, lr_scheduler)
        if self.plugin is not None:
            model = self.plugin.configure(model, optimizer, device=self.device)
        elif self.device is not None:
            placing.move(model, optimizer, torch.device(self.device))
        elif optimizer is not None:
            repoint.optimized_names(model, optimizer)
        if self._autocast_dtype is not None:
            inner = model.module if isinstance(model, DistributedDataParallel) else model
            device_type = next((parameter.device.type for parameter in inner.parameters()), "cpu")
            precision.autocast_model(inner, device_type, self._autocast_dtype)
            if criterion is not None:
                criterion = precision.autocast_criterion(criterion, device_type, self._autocast_dtype)
        if optimizer is not None:
            if self._autocast_dtype is torch.float16:
                loss_scale.scale_steps(optimizer, _AUTOCAST_SCALE, on_all_ranks=self.plugin is not None)
            self._models[optimizer] = weakref.ref(model)
        if isinstance(dataloader, DataLoader):
            with_own_generator(dataloader)
        return [model, optimizer, criterion, dataloader, lr_scheduler]

    def model_of(self, optimizer: Optimizer) -> nn.Module:
        """Return the model that an optimizer was boosted with.

        The Booster keeps neither alive: it only knows pairs that the caller still holds.

        Raises:
            UsageError: this Booster has not boosted the optimizer, or the model is gone.
        """
        known = [ref for boosted, ref in self._models.items() if boosted is optimizer]
        model = known[0]() if known else None
        if model is None:
            raise UsageError(
                f"this Booster knows no model of the {type(optimizer).__name__}: boost it first, "
                "booster.boost(model, optimizer), and keep the model that boost() returned"
            )
        return model

    def backward(self, loss: torch.Tensor, optimizer: Optimizer) -> None:
        """Compute the gradients of a loss, times the optimizer's loss scale with fp16.

        Raises:
            UsageError: the optimizer was not boosted (under FSDP2 it would step parameters that are not the model's);
                or with fp16 its gradients were clipped since the last step, and so unscaled.

        Collective:
            Every rank, where gradients are reduced.
        """
        self.model_of(optimizer)
        loss_scale.scaled(loss, optimizer).backward()

    def loss_scale(self, optimizer: Optimizer) -> float:
        """Return what `backward` multiplies the optimizer's losses by: 1.0 without fp16."""
        return loss_scale.scale_of(optimizer)

    def clip_grad_norm_(self, target: nn.Module | Optimizer, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale gradients so that their common norm is at most `max_norm`, whatever they are spread over.

        torch's function of this name raises on models that tensor parallelism cuts, and knows nothing of fp16's loss
        scale, by which gradients are divided here first. Call it between the backward that
        synchronises gradients and the step; plugins with `max_norm` do so by themselves.

        Args:
            target: whose gradients: a boosted model's, or those that an optimizer steps.
            max_norm: the greatest norm.
            norm_type: p of the norm.

        Returns:
            The norm before clipping, a 0-dim tensor.

        Raises:
            UsageError: `max_norm` or `norm_type` is not positive, or gradients are not reduced yet.

        Collective:
            Every rank, where the model is sharded or cut.
        """
        if isinstance(target, Optimizer):
            parameters = [parameter for group in target.param_groups for parameter in group["params"]]
        else:
            parameters = list(target.parameters())
        loss_scale.unscale(parameters, self._models)
        return clipping.clip_grad_norm_(parameters, max_norm, norm_type)

    def no_sync(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None
    ) -> AbstractContextManager[None]:
        """Accumulate gradients in the context without exchanging them; without a plugin there is nothing to exchange.

        Args:
            model: a boosted model; None takes the optimizer's.
            optimizer: a boosted optimizer; None takes the only model that was boosted with an optimizer.

        Raises:
            UsageError: neither is given and there is not exactly one model, or the plugin has not spread it.
        """
        if self.plugin is None:
            return nullcontext()
        if model is None:
            model = self.model_of(optimizer) if optimizer is not None else self._only_model()
        return self.plugin.no_sync(model)

    def enable_lora(
        self,
        model: nn.Module,
        pretrained_dir: str | None = None,
        lora_config: Any = None,
        bnb_quantization_config: Any = None,
        quantize: bool = False,
    ) -> nn.Module:
        """Return the model with LoRA adapters (by peft); call it before making the optimizer and before `boost`.

        Args:
            model: not boosted yet.
            pretrained_dir: a saved adapter directory (or a Hub id) to go on training; its config counts.
            lora_config: a `peft.LoraConfig` for new adapters. Exactly one of the two is given.
            bnb_quantization_config: not supported.
            quantize: not supported.

        Raises:
            UsageError: quantisation is asked for, peft is missing, or the arguments contradict each other.
            NotFoundError: there is no adapter in `pretrained_dir`.
        """
        if quantize or bnb_quantization_config is not None:
            raise UsageError(
                "enable_lora: quantised base weights are not supported; leave the quantisation arguments out"
            )
        return lora.add_lora(model, pretrained_dir, lora_config)

    def save_lora_as_pretrained(
        self, model: nn.Module, checkpoint: str | os.PathLike[str], use_safetensors: bool = False
    ) -> None:
        """Save the adapters as a directory for `PeftModel.from_pretrained`.

        Args:
            model: with adapters, boosted or not.
            checkpoint: the directory.
            use_safetensors: a hint: safetensors is what is written in any case.

        Raises:
            UsageError: the model has no adapters.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.

        Durability:
            On return the directory is whole and survives a crash; after an error nothing of it is visible.
        """
        del use_safetensors
        lora.check_has_adapters(model)
        engine.save_adapter_directory(model, arguments.path(checkpoint), comm=c10d.open_comm())

    def save_model(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_safetensors: bool = False,
        use_async: bool = False,
    ) -> None:
        """Save the weights: one safetensors file, or (`shard=True`) a Hugging Face model directory.

        Args:
            model: boosted or not.
            checkpoint: the file, or the directory.
            shard: a directory of files instead of one file.
            gather_dtensor: only True: what is on disk is always whole tensors.
            prefix: the directory's variant (`model.<prefix>-00001-of-00002.safetensors`); only with `shard`.
            size_per_shard: the largest size of one of the directory's files, in MiB.
            use_safetensors: a hint: safetensors is what is written in any case.
            use_async: only False.

        Raises:
            UsageError: an option has no meaning here, or the file's name promises a pickle.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.

        Durability:
            On return the file or directory is whole and survives a crash; after an error nothing of it is visible.
        """
        del use_safetensors
        arguments.refuse(gather_dtensor=gather_dtensor, use_async=use_async)
        max_file_bytes = arguments.file_bytes(size_per_shard)
        path = arguments.directory_path(checkpoint, prefix) if shard else arguments.file_path(checkpoint, prefix)
        if shard:
            engine.save_model_directory(
                model, path, comm=c10d.open_comm(), max_file_bytes=max_file_bytes, variant=prefix
            )
        else:
            engine.save_model_file(model, path, comm=c10d.open_comm())

    def load_model(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        strict: bool = True,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """Load weights in place.

        Args:
            model: boosted or not, whatever it was spread over when saved.
            checkpoint: a file, or a model directory.
            strict: names that only one side has are an error; False loads what both have. A shape or dtype that differs
                is an error in any case.
            low_cpu_mem_mode: a hint: a load always reads straight into the model's memory.
            num_threads: a hint.

        Raises:
            MismatchError: checkpoint and model differ; the model is as it was.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.
        """
        del low_cpu_mem_mode, num_threads
        engine.load_model(model, arguments.path(checkpoint), comm=c10d.open_comm(), strict=strict)

    def save_optimizer(
        self,
        optimizer: Optimizer,
        checkpoint: str | os.PathLike[str],
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_async: bool = False,
    ) -> None:
        """Save an optimizer's state by parameter name: one safetensors file, or (`shard=True`) a directory.

        Args:
            optimizer: boosted.
            checkpoint: the file, or the directory.
            shard: a directory of files instead of one file.
            gather_dtensor: only True: what is on disk is always whole tensors.
            prefix: the directory's variant; only with `shard`.
            size_per_shard: the largest size of one of the directory's files, in MiB.
            use_async: only False.

        Raises:
            UsageError: the optimizer was not boosted, an option has no meaning here, or the name promises a pickle.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.

        Durability:
            On return the file or directory is whole and survives a crash; after an error nothing of it is visible.
        """
        arguments.refuse(gather_dtensor=gather_dtensor, use_async=use_async)
        max_file_bytes = arguments.file_bytes(size_per_shard)
        path = arguments.directory_path(checkpoint, prefix) if shard else arguments.file_path(checkpoint, prefix)
        model = self.model_of(optimizer)
        if shard:
            engine.save_optimizer_directory(
                optimizer, model, path, comm=c10d.open_comm(), max_file_bytes=max_file_bytes, variant=prefix
            )
        else:
            engine.save_optimizer_file(optimizer, model, path, comm=c10d.open_comm())

    def load_optimizer(
        self,
        optimizer: Optimizer,
        checkpoint: str | os.PathLike[str],
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """Load an optimizer's state in place, by parameter name.

        Args:
            optimizer: boosted.
            checkpoint: a file, or a directory.
            low_cpu_mem_mode: a hint: a load always reads straight into the state's memory.
            num_threads: a hint.

        Raises:
            UsageError: the optimizer was not boosted.
            MismatchError: checkpoint and optimizer differ; the optimizer is as it was.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.
        """
        del low_cpu_mem_mode, num_threads
        model = self.model_of(optimizer)
        engine.load_optimizer(optimizer, model, arguments.path(checkpoint), comm=c10d.open_comm())

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | os.PathLike[str]) -> None:
        """Save a scheduler's state as one JSON file.

        Raises:
            UsageError: the file's name promises a pickle.
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.
        """
        path = arguments.file_path(checkpoint, prefix=None, wanted="*.json")
        engine.save_lr_scheduler(lr_scheduler, path, comm=c10d.open_comm())

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | os.PathLike[str]) -> None:
        """Load a scheduler's state in place.

        Raises:
            CheckpointError: see `shardpoint.errors`.

        Collective:
            Every rank.
        """
        engine.load_lr_scheduler(lr_scheduler, arguments.path(checkpoint), comm=c10d.open_comm())

    def _only_model(self) -> nn.Module:
        models = {id(model): model for model in (known() for known in self._models.values()) if model is not None}
        if len(models) != 1:
            raise UsageError(f"no_sync: give the model or its optimizer; this Booster has boosted {len(models)} models")
        return next(iter(models.values()))


def _check_kinds(model: object, optimizer: object, lr_scheduler: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"boost: model is a {type(model).__name__}, not a torch.nn.Module")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UsageError(f"boost: optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    stepped = getattr(lr_scheduler, "optimizer", None)
    if optimizer is not None and stepped is not None and stepped is not optimizer:
        raise UsageError("boost: the lr_scheduler steps another optimizer than the one given with it")
