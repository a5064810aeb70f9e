"""How a loss is scaled so that its gradients do not vanish in fp16, and how steps follow: unscaled, or left out.

The scale moves as ColossalAI's does. It belongs to an optimizer, and saves and resumes find it there.

Source: `colossalai.amp.naive_amp.grad_scaler.DynamicGradScaler`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from shardpoint.adapters.grad_scaler import attach_scaler
from shardpoint.booster import clipping
from shardpoint.errors import UsageError


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How a loss scale moves, by ColossalAI's names.

    Attributes:
        initial_scale: where it starts.
        min_scale: it does not fall below; 0 or None is no bound.
        growth_factor: what it grows by.
        backoff_factor: what it shrinks by.
        growth_interval: steps without an overflow, one after the other, after which it grows.
        hysteresis: with how many overflows since it last grew it begins to shrink; each further one shrinks it, too.
        max_scale: it does not rise above; 0 or None is no bound.

    Raises:
        UsageError: one is out of range.
    """

    initial_scale: float = 2**16
    min_scale: float | None = 1
    growth_factor: float = 2
    backoff_factor: float = 0.5
    growth_interval: int = 1000
    hysteresis: int = 2
    max_scale: float | None = 2**32

    def __post_init__(self) -> None:
        """Check the options."""
        low, high = self.bounds
        if not 0 < self.initial_scale < math.inf or not 0 <= low <= self.initial_scale <= high:
            raise UsageError(
                f"initial_scale={self.initial_scale!r} must be positive, and from min_scale={self.min_scale!r} to "
                f"max_scale={self.max_scale!r}"
            )
        if not 1 < self.growth_factor < math.inf or not 0 < self.backoff_factor < 1:
            raise UsageError(
                f"growth_factor={self.growth_factor!r} must be greater than 1, and "
                f"backoff_factor={self.backoff_factor!r} between 0 and 1"
            )
        if self.growth_interval < 1 or self.hysteresis < 0:
            raise UsageError(
                f"growth_interval={self.growth_interval!r} must be at least 1, and hysteresis={self.hysteresis!r} at "
                "least 0"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest scale."""
        return self.min_scale or 0.0, self.max_scale or math.inf


class LossScale:
    """A number that a loss is multiplied by: it grows while gradients stay finite, and shrinks where they do not.

    Args:
        options: how it moves.
    """

    def __init__(self, options: ScaleOptions) -> None:
        self.options = options
        self.scale = float(options.initial_scale)
        self._growth_tracker = 0
        self._hysteresis_tracker = 0

    def update(self, *, overflowed: bool) -> None:
        """Move after a step, or after one that was left out because gradients overflowed."""
        options = self.options
        if overflowed:
            self._growth_tracker = 0
            self._hysteresis_tracker += 1
            if self._hysteresis_tracker >= options.hysteresis:
                self.scale = max(self.scale * options.backoff_factor, options.bounds[0])
            return
        self._growth_tracker += 1
        if self._growth_tracker == options.growth_interval:
            self._growth_tracker = self._hysteresis_tracker = 0
            self.scale = min(self.scale * options.growth_factor, options.bounds[1])

    def state_dict(self) -> dict[str, Any]:
        """Return where it is; the options are the script's."""
        return {
            "scale": self.scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self.scale = state_dict["scale"]
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]


class _ScaledSteps:
    """What is known of one optimizer between two of its steps."""

    def __init__(self, loss_scale: LossScale, *, on_all_ranks: bool) -> None:
        self.loss_scale = loss_scale
        self._on_all_ranks = on_all_ranks
        self._is_scaled = False
        self._overflowed: bool | None = None  # None: gradients are not unscaled yet

    def scaled(self, loss: torch.Tensor, optimizer: Optimizer) -> torch.Tensor:
        if self._overflowed is not None:
            if _gradients(optimizer):
                raise UsageError(
                    "backward: the gradients were clipped, and so unscaled, since the last step: clip after the last "
                    "backward of a step"
                )
            self._overflowed = None  # what was unscaled has been thrown away, without a step
        self._is_scaled = True
        return loss * torch.tensor(self.loss_scale.scale, device=loss.device)  # a tensor makes float16 float32

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, once a step, and ask all ranks whether they are finite."""
        if self._overflowed is not None:
            return
        gradients = _gradients(optimizer)
        if not self._is_scaled:
            if gradients:
                raise UsageError(
                    "with fp16 the loss is scaled in booster.backward(loss, optimizer), and these gradients come from "
                    "elsewhere: call it instead of loss.backward()"
                )
            return
        device = optimizer.param_groups[0]["params"][0].device
        overflowed = torch.zeros((), device=device)
        for gradient in gradients:
            local, _ = clipping.reduced(gradient)
            if local.numel():
                largest = torch.linalg.vector_norm(local, math.inf)  # NaN where one is
                overflowed = torch.maximum(overflowed, (~largest.isfinite()).to(device, torch.float32))
                local.mul_(1.0 / self.loss_scale.scale)
        if self._on_all_ranks:
            # Order: whatever this rank holds, since a shard may overflow where the others do not.
            dist.all_reduce(overflowed, dist.ReduceOp.MAX)
        self._overflowed = bool(overflowed.item())

    def before_step(self, optimizer: Optimizer) -> None:
        """Leave an optimizer nothing but unscaled, finite gradients: none at all where one of a rank's is not.

        A step without gradients changes neither parameters nor states, and is a step for all that watches steps (a
        scheduler, a save behind the training).
        """
        self.unscale(optimizer)
        if self._overflowed is None:
            return
        if self._overflowed:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self.loss_scale.update(overflowed=self._overflowed)
        self._is_scaled, self._overflowed = False, None


_scaled: weakref.WeakKeyDictionary[Optimizer, _ScaledSteps] = weakref.WeakKeyDictionary()


def scale_steps(optimizer: Optimizer, options: ScaleOptions, *, on_all_ranks: bool) -> None:
    """Scale the losses and unscale the steps of an optimizer from now on; a second call changes nothing.

    Hooks run in the order in which they are registered: one that clips comes after this.

    Args:
        optimizer: it steps float32 parameters.
        options: how its scale moves.
        on_all_ranks: whether all ranks train one model, and so step, or leave a step out, together.
    """
    if optimizer in _scaled:
        return
    steps = _scaled[optimizer] = _ScaledSteps(LossScale(options), on_all_ranks=on_all_ranks)
    attach_scaler(optimizer, steps.loss_scale)

    def unscale(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in [*args[1:], kwargs.get("closure")]):
            raise UsageError(
                "with fp16 gradients are unscaled before a step, and a closure computes them in the step: step without"
            )
        steps.before_step(stepped)

    optimizer.register_step_pre_hook(unscale)


def scaled(loss: torch.Tensor, optimizer: Optimizer) -> torch.Tensor:
    """Return the loss as the optimizer's steps expect it: scaled, where they are.

    Raises:
        UsageError: the gradients that are there are unscaled already.
    """
    steps = _scaled.get(optimizer)
    return loss if steps is None else steps.scaled(loss, optimizer)


def unscale(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    """Unscale the gradients of the optimizers that step any of these parameters, where they are scaled.

    Collective:
        Every rank.
    """
    wanted = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        steps = _scaled.get(optimizer)
        if steps is not None and any(id(p) in wanted for group in optimizer.param_groups for p in group["params"]):
            steps.unscale(optimizer)


def scale_of(optimizer: Optimizer) -> float:
    """Return what the optimizer's losses are multiplied by; 1.0 where they are not."""
    steps = _scaled.get(optimizer)
    return 1.0 if steps is None else steps.loss_scale.scale


def _gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
