"""One file per rank with that rank's shards: `torch.save` and safetensors."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from benchmarks.contenders import Contender


class TorchSave(Contender):
    """`torch.save` of a dict of local tensors."""

    def save(self, index: int) -> Path:
        """Write by path: torch's own file writer is faster than a Python file."""
        path = self.home / str(index)
        path.mkdir(exist_ok=True)
        torch.save(self.subject.local_tensors(), path / f"rank{self.rank.rank}.pt")
        return path

    def load(self, path: Path) -> None:
        """Map the file and copy out of it."""
        stored = torch.load(path / f"rank{self.rank.rank}.pt", mmap=True, weights_only=True)
        for name, tensor in self.subject.local_tensors().items():
            tensor.copy_(stored[name])


class Safetensors(Contender):
    """`safetensors.torch.save_file` of a dict of local tensors."""

    def save(self, index: int) -> Path:
        """Write contiguous tensors (they are contiguous already)."""
        path = self.home / str(index)
        path.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.subject.local_tensors().items()}
        safetensors.torch.save_file(tensors, path / f"rank{self.rank.rank}.safetensors")
        return path

    def load(self, path: Path) -> None:
        """Load the file and copy out of it."""
        stored = safetensors.torch.load_file(path / f"rank{self.rank.rank}.safetensors")
        for name, tensor in self.subject.local_tensors().items():
            tensor.copy_(stored[name])
