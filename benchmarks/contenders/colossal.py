"""ColossalAI 0.5.0, in an environment of its own. On CPU it needs to be told a few things.

It expects an accelerator that it knows; its own extension point, `set_accelerator`, takes one that has nothing to wait
for. Nothing of the package is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import colossalai
import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin
from torch import nn

from benchmarks.contenders import Contender
from benchmarks.rank import Rank
from benchmarks.subject import LlamaShape, Subject


class _NothingToWaitFor:
    """A stream, or an event, of a device that computes at once."""

    def _at_once(self, *_: Any) -> None:
        """Be done."""

    wait_stream = synchronize = wait_event = record = wait = _at_once

    def record_event(self, *_: Any) -> _NothingToWaitFor:
        """Return an event that has happened."""
        return self


class _Cpu(CpuAccelerator):  # type: ignore[misc]
    """A CPU under the name that ZeRO asks for."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"  # LowLevelZeroPlugin refuses every name but cuda and npu

    def synchronize(self, *_: Any) -> None:
        """Be synchronous."""

    set_device = set_stream = empty_cache = synchronize

    def current_device(self) -> torch.device:
        """Return the only device."""
        return torch.device("cpu")

    def Stream(self, *_: Any, **__: Any) -> _NothingToWaitFor:  # noqa: N802 - its name there
        """Return a stream."""
        return _NothingToWaitFor()

    Event = current_stream = default_stream = Stream

    @contextlib.contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        """Enter a stream."""
        yield


def start(rank: Rank, *, size_gb: float) -> dict[str, Any]:
    """Join the ranks. Each contender builds its own model, of the same shape as the others'."""
    colossalai.launch_from_torch()
    set_accelerator(_Cpu())
    setattr(torch.Tensor, "record_stream", lambda *_: None)  # noqa: B010 - CPU tensors have no stream
    torch.manual_seed(rank.rank)
    rank.kept["shape"] = LlamaShape.of(size_gb)
    rank.subject = Subject(nn.Linear(1, 1), None)
    return {"version": colossalai.__version__}


class _Boosted(Contender):
    """A model and its Adam under a plugin of ColossalAI."""

    def __init__(self, rank: Rank, home: Path, plugin: Any) -> None:
        super().__init__(rank, home)
        shape: LlamaShape = rank.kept["shape"]
        model = shape.model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
        self._booster = Booster(plugin=plugin)
        self._model, self._optimizer, *_ = self._booster.boost(model, optimizer)
        tokens = torch.randint(shape.vocabulary, (1, 4))
        # A step is taken, since the optimizers save only the states that a step has made.
        self._booster.backward(self._model(input_ids=tokens, labels=tokens).loss, self._optimizer)
        self._optimizer.step()
        self._optimizer.zero_grad()
        inner = getattr(self._optimizer, "optim", self._optimizer)
        for state in inner.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].uniform_(1e-6, 1e-3)

    def save(self, index: int) -> Path:
        """Save as `coati.utils.ckpt_io.save_checkpoint` does."""
        path = self.home / str(index)
        (path / "modeling").mkdir(parents=True, exist_ok=True)
        self._booster.save_model(self._model, str(path / "modeling"), shard=True)
        self._booster.save_optimizer(self._optimizer, str(path / "optimizer"), shard=True)
        return path


class Zero(_Boosted):
    """Moments sharded over the ranks, and gathered by rank 0 to be written."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home, LowLevelZeroPlugin(stage=2, precision="fp32"))


class Ddp(_Boosted):
    """Everything on every rank, written by rank 0."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home, TorchDDPPlugin())
