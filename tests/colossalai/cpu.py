"""What the real ColossalAI needs to be told to run on a CPU; nothing of the package is changed.

Source: `colossalai.accelerator.set_accelerator` and `KernelLoader.register_extension`, its own extension points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader


class AtOnce:
    """A stream, or an event, of a device that computes at once."""

    def _done(self, *_: Any) -> None: ...

    wait_stream = synchronize = wait_event = record = wait = _done

    def record_event(self, *_: Any) -> AtOnce:
        return self


class Cpu(CpuAccelerator):  # type: ignore[misc]
    """A CPU under the name that ZeRO asks for."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"

    def synchronize(self, *_: Any) -> None: ...

    set_device = set_stream = empty_cache = reset_peak_memory_stats = synchronize

    def memory_allocated(self, *_: Any) -> int:
        return 0

    max_memory_allocated = memory_allocated

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def Stream(self, *_: Any, **__: Any) -> AtOnce:  # noqa: N802 - its name there
        return AtOnce()

    Event = current_stream = default_stream = Stream

    @contextlib.contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        yield


class AdamOp:
    """The operation of HybridAdam and CPUAdam, whose compiled one is not in the package from PyPI."""

    def __init__(self, *options: Any) -> None:
        self.decoupled = bool(options[-1])

    def step(self, *given: Any) -> None:
        """Do one step in place: the arguments are those of the compiled one, by position."""
        number, lr, beta1, beta2, eps, decay, corrected, weights, grads, first, second, scale = given
        grads = grads.float() / (1.0 if scale == -1 else scale)
        if decay and self.decoupled:
            weights.mul_(1 - lr * decay)
        elif decay:
            grads = grads.add(weights, alpha=decay)
        first.lerp_(grads, 1 - beta1)
        second.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        by1, by2 = (1 - beta1**number, 1 - beta2**number) if corrected else (1.0, 1.0)
        weights.addcdiv_(first, second.div(by2).sqrt_().add_(eps), value=-lr / by1)


class AdamExtension:
    name = "adam_in_torch"
    priority = 1

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None: ...

    def load(self) -> Any:
        return type("Kernels", (), {"CPUAdamOptimizer": AdamOp})


def install() -> None:
    set_accelerator(Cpu())
    CPUAdamLoader.register_extension(AdamExtension)
    setattr(torch.Tensor, "record_stream", lambda *_: None)  # noqa: B010 - CPU tensors have no stream
    if not hasattr(dist, "is_hccl_available"):
        setattr(dist, "is_hccl_available", lambda: False)  # noqa: B010 - pipelines ask, where torch has no NCCL
