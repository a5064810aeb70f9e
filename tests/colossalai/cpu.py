"""What the real ColossalAI needs to be told to run on a CPU; nothing of the package is changed.

Source: `colossalai.accelerator.set_accelerator`, its own extension point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


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

    set_device = set_stream = empty_cache = synchronize

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


def install() -> None:
    set_accelerator(Cpu())
    setattr(torch.Tensor, "record_stream", lambda *_: None)  # noqa: B010 - CPU tensors have no stream
