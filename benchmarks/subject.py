"""What is saved and loaded: a Llama-like model and its Adam state on FSDP2, or many small tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.rank import Rank

_BYTES_PER_PARAMETER = 12  # a float32 weight and Adam's two moments


@dataclass(frozen=True)
class LlamaShape:
    """The shape of a Llama.

    Examples:
        >>> LlamaShape.of(2.0)
        LlamaShape(hidden=768, intermediate=2048, layers=17, vocabulary=32000)
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, size_gb: float) -> LlamaShape:
        """Choose a shape whose float32 weights and Adam moments take about `size_gb` GB together."""
        widths = [(0.05, 128), (0.3, 256), (0.9, 512), (4.0, 768), (16.0, 1024)]
        hidden = next((width for limit, width in widths if size_gb <= limit), 2048)
        intermediate = (8 * hidden // 3 + 63) // 64 * 64
        vocabulary = 32000 if size_gb > 0.9 else 4000
        per_layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
        wanted = size_gb * 1e9 / _BYTES_PER_PARAMETER - 2 * vocabulary * hidden
        return cls(hidden, intermediate, max(round(wanted / per_layer), 1), vocabulary)

    def model(self) -> nn.Module:
        """Make the model, with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            use_cache=False,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model


@dataclass
class Subject:
    """A training state on this rank.

    Attributes:
        model: as a training loop calls it.
        optimizer: AdamW over its parameters, with state; None where only a model is saved.
        vocabulary: token ids are below this; 0 where the model is no language model.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    vocabulary: int = 0

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """Return what this rank holds, by a name of our own: views of the live weights and moments."""
        return {name: local_of(tensor) for name, tensor in self._tensors()}

    def num_bytes(self) -> int:
        """Return the bytes of the weights and moments, over all ranks, each byte counted once."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def num_local_bytes(self) -> int:
        """Return the bytes that this rank holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.local_tensors().values())

    def forward_backward(self, num_tokens: int) -> None:
        """Compute gradients from random tokens."""
        tokens = torch.randint(self.vocabulary, (1, num_tokens))
        self.model(input_ids=tokens, labels=tokens).loss.backward()

    def checksums(self) -> dict[str, float]:
        """Return a sum of each tensor's bits on this rank, to see whether a load gave the bytes back."""
        return {
            name: int(tensor.detach().reshape(-1).view(torch.int32).to(torch.int64).sum().item())
            for name, tensor in self.local_tensors().items()
        }

    def clear(self) -> None:
        """Set everything that this rank holds to zero."""
        with torch.no_grad():
            for tensor in self.local_tensors().values():
                tensor.zero_()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter
            if self.optimizer is not None:
                state = self.optimizer.state[parameter]
                yield f"optimizer.{name}.exp_avg", state["exp_avg"]
                yield f"optimizer.{name}.exp_avg_sq", state["exp_avg_sq"]


class ManyTensors(nn.Module):
    """A model of very many small parameters.

    Args:
        num_tensors: how many.
        num_elements: of each, in float32.
    """

    def __init__(self, num_tensors: int, num_elements: int) -> None:
        super().__init__()
        rows = num_elements // 16
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(rows, 16)) for _ in range(num_tensors))

    def forward(self) -> torch.Tensor:
        """Return the sum of everything."""
        return torch.stack([weight.sum() for weight in self.weights]).sum()


def build_llama(rank: Rank, *, size_gb: float) -> dict[str, Any]:
    """Build the Llama and its random Adam state, sharded by `TorchFSDPPlugin` over all ranks.

    Returns:
        The number of bytes, over all ranks and on this one, the shape, and the number of tensors.
    """
    _start(rank)
    shape = LlamaShape.of(size_gb)
    model, optimizer = _boosted("fsdp", shape.model(), with_optimizer=True)
    assert optimizer is not None  # asked for
    fill_moments(optimizer)
    rank.subject = Subject(model, optimizer, shape.vocabulary)
    rank.kept["shape"] = shape
    return _facts(rank.subject) | {"shape": vars(shape)}


def build_rows(rank: Rank, *, num_tensors: int, num_rows: int, num_columns: int) -> dict[str, Any]:
    """Build a model of tensors `[rows, columns]`, sharded by rows, without an optimizer."""
    _start(rank)
    plain = nn.Sequential(*(nn.Linear(num_columns, num_rows, bias=False) for _ in range(num_tensors)))
    model, _ = _boosted("fsdp", plain, with_optimizer=False)
    rank.subject = Subject(model, None)
    return _facts(rank.subject)


def build_many(rank: Rank, *, plugin: str, num_tensors: int) -> dict[str, Any]:
    """Build a model of tensors of 1 KB under "fsdp" or "ddp", without an optimizer."""
    _start(rank)
    model, _ = _boosted(plugin, ManyTensors(num_tensors, 256), with_optimizer=False)
    rank.subject = Subject(model, None)
    return _facts(rank.subject)


def fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give an Adam the state that it has after a step, with random moments."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {"exp_avg": torch.empty_like(parameter), "exp_avg_sq": torch.empty_like(parameter)}
            for moment in moments.values():
                local_of(moment).uniform_(1e-6, 1e-3)
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **{k: m.detach() for k, m in moments.items()}}


def _start(rank: Rank) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(rank.rank)


def _boosted(plugin: str, model: nn.Module, *, with_optimizer: bool) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    from shardpoint.booster import Booster, TorchDDPPlugin, TorchFSDPPlugin

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if with_optimizer else None
    booster = Booster(plugin=TorchFSDPPlugin() if plugin == "fsdp" else TorchDDPPlugin())
    model, optimizer, *_ = booster.boost(model, optimizer)
    return model, optimizer


def _facts(subject: Subject) -> dict[str, Any]:
    return {
        "num_bytes": subject.num_bytes(),
        "num_local_bytes": subject.num_local_bytes(),
        "num_tensors": len(subject.local_tensors()),
    }


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, as a view."""
    local = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local
