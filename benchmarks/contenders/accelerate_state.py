"""Accelerate's `save_state`, of a model of the same shape. On CPU its FSDP plugin is ignored, so that it is DDP."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.contenders import Contender
from benchmarks.rank import Rank
from benchmarks.subject import fill_moments


class SaveState(Contender):
    """`Accelerator.save_state` of a model and an optimizer that it has prepared itself.

    Memory:
        Another training state, whole on every rank.
    """

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        self._accelerator = Accelerator(cpu=True)
        model = rank.kept["shape"].model()
        self._model, optimizer = self._accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-6))
        fill_moments(optimizer.optimizer)

    def save(self, index: int) -> Path:
        """Save model, optimizer and random state."""
        path = self.home / str(index)
        self._accelerator.save_state(str(path))
        return path
