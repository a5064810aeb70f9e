"""How a module computes in lower precision without being wrapped: `torch.autocast` around its forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardpoint.errors import UsageError


class AutocastForward:
    """A module's `forward` under autocast, set on the instance: names, class and isinstance stay as they are.

    It holds the module and nothing bound to it, so that a deep copy of the module (a reference model) computes with the
    copy's weights, not the original's.
    """

    def __init__(self, module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        self.module = module
        self.device_type = device_type
        self.dtype = dtype
        self.replaced = vars(module).get("forward")
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward under autocast."""
        forward = self.replaced or functools.partial(type(self.module).forward, self.module)
        with torch.autocast(self.device_type, dtype=self.dtype):
            return forward(*args, **kwargs)


def autocast_dtype(mixed_precision: str | None) -> torch.dtype | None:
    """Return in which dtype the Booster's `mixed_precision` computes; None for as it is.

    Raises:
        UsageError: it is neither None, nor `"bf16"`, nor `"fp16"`.
    """
    dtypes = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        raise UsageError(f"mixed_precision={mixed_precision!r} is neither None nor 'bf16' nor 'fp16'")
    return dtypes[mixed_precision]


def autocast_model(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Run the model's forward under autocast, in place; a second call changes nothing."""
    if not isinstance(vars(model).get("forward"), AutocastForward):
        model.forward = AutocastForward(model, device_type, dtype)


def autocast_criterion(criterion: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """Return the criterion under autocast: autocast computes losses in float32, which such inputs alone would not.

    A module is changed in place and returned; a function is wrapped.
    """
    if isinstance(criterion, nn.Module):
        autocast_model(criterion, device_type, dtype)
        return criterion

    @functools.wraps(criterion)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            return criterion(*args, **kwargs)

    return run
