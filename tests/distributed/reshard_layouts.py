"""Which layouts the reshard matrix has: how each spreads its family's model, trains it, and gathers it by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional

from shardpoint import Booster
from shardpoint.booster import HybridParallelPlugin, LowLevelZeroPlugin, Plugin, TorchDDPPlugin, TorchFSDPPlugin
from tests.training import whole

VOCABULARY = 251  # neither two nor four ranks cut it evenly
NUM_SEQUENCES = 4


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of all runs; its eps keeps tiny gradients from deciding a step by their sign."""
    return torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.95), eps=1e-4)


class Run:
    """A model being trained: the same global batch at a step, whatever it is spread over."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data_rank: int = 0, data_size: int = 1
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.data_rank, self.data_size = data_rank, data_size

    def loss(self, number: int) -> torch.Tensor:
        """Return this rank's loss at a step."""
        raise NotImplementedError

    def train(self, steps: range) -> list[float]:
        """Train; return the global batch's loss at each step."""
        losses = []
        for number in steps:
            loss = self.loss(number)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            common = loss.detach().double()
            if self.data_size > 1:
                dist.all_reduce(common)
                common /= dist.get_world_size()
            losses.append(common.item())
        return losses

    def inner(self) -> nn.Module:
        """Return the model without DDP."""
        model = self.model
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return parameters and `opt.<parameter>.<state>`, whole."""
        found = {}
        for name, parameter in self.inner().named_parameters():
            found[name] = self.whole(name, parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"opt.{name}.{key}"] = self.whole(name, value)
        return found

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Gather one tensor, by torch itself."""
        del name
        return whole(tensor)


@dataclass(frozen=True)
class Layout:
    """One way to spread a family's model.

    Attributes:
        name: its id in the tests.
        size: over how many ranks.
        make: a fresh run, from a seed.
        arithmetic: layouts with the same compute bit for bit the same; by default nobody but the layout itself.
    """

    name: str
    size: int
    make: Callable[[int], Run]
    arithmetic: str = ""

    def __post_init__(self) -> None:
        if not self.arithmetic:
            object.__setattr__(self, "arithmetic", self.name)


# ---- a transformers model under the plugins


class LlamaRun(Run):
    def loss(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, VOCABULARY, (NUM_SEQUENCES, 6), generator=generator)
        ids = ids.chunk(self.data_size)[self.data_rank]
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def llama_run(plugin: Plugin | None, data_size: int, seed: int) -> LlamaRun:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=40, intermediate_size=54, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True)  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    optimizer = adamw(model.parameters())
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight, "the tie is lost"
    rank = dist.get_rank() * data_size // dist.get_world_size() if dist.is_initialized() else 0
    return LlamaRun(model, optimizer, rank, data_size)


LLAMA = [
    Layout("one", 1, lambda seed: llama_run(None, 1, seed)),
    Layout("ddp2", 2, lambda seed: llama_run(TorchDDPPlugin(), 2, seed)),
    Layout("fsdp2", 2, lambda seed: llama_run(TorchFSDPPlugin(), 2, seed)),
    Layout("fsdp4", 4, lambda seed: llama_run(TorchFSDPPlugin(), 4, seed)),
    Layout("hsdp2x2", 4, lambda seed: llama_run(LowLevelZeroPlugin(precision="fp32", extra_dp_size=2), 4, seed)),
    Layout("tp2", 2, lambda seed: llama_run(HybridParallelPlugin(tp_size=2, precision="fp32"), 1, seed)),
    Layout("tp2xfsdp2", 4, lambda seed: llama_run(HybridParallelPlugin(tp_size=2, precision="fp32"), 2, seed)),
]


# ---- layers on different ranks


class Stack(nn.Module):
    """Layers in a row; a stage has some of them, under the names that they have in the whole."""

    def __init__(self, mine: range) -> None:
        super().__init__()
        sizes = [3, 7, 5, 9, 1]
        made = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(4)]
        self.layers = nn.ModuleDict({str(i): made[i] for i in mine})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def points(number: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(number))


class StackRun(Run):
    def loss(self, number: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(points(number).chunk(self.data_size)[self.data_rank]).square().mean()
        return loss


class StageRun(Run):
    """One rank of a pipeline: activations go up, gradients come down."""

    shapes = (3, 7, 5, 9)

    def train(self, steps: range) -> list[float]:
        rank, size = dist.get_rank(), dist.get_world_size()
        losses = []
        for number in steps:
            given = points(number)
            if rank > 0:
                given = torch.empty(4, self.shapes[rank * 4 // size])
                dist.recv(given, rank - 1)
                given.requires_grad_()
            result = self.model(given)
            loss = torch.zeros(())
            if rank < size - 1:
                dist.send(result.detach(), rank + 1)
                gradient = torch.empty_like(result)
                dist.recv(gradient, rank + 1)
                result.backward(gradient)
            else:
                loss = result.square().mean()
                loss.backward()
            if rank > 0:
                assert given.grad is not None
                dist.send(given.grad, rank - 1)
            self.optimizer.step()
            self.optimizer.zero_grad()
            common = loss.detach().double()
            dist.broadcast(common, size - 1)
            losses.append(common.item())
        return losses

    def gathered(self) -> dict[str, torch.Tensor]:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, super().gathered())
        return {name: tensor for part in parts for name, tensor in part.items()}


def stack_run(seed: int, plugin: Plugin | None = None, data_size: int = 1) -> StackRun:
    torch.manual_seed(seed)
    model: nn.Module = Stack(range(4))
    optimizer = adamw(model.parameters())
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    return StackRun(model, optimizer, dist.get_rank() if data_size > 1 else 0, data_size)


def stage_run(seed: int) -> StageRun:
    torch.manual_seed(seed)
    per_rank = 4 // dist.get_world_size()
    first = dist.get_rank() * per_rank
    model = Stack(range(first, first + per_rank))
    return StageRun(model, adamw(model.parameters()))


STAGES = [
    Layout("one", 1, stack_run, "in a row"),
    Layout("stages2", 2, stage_run, "in a row"),
    Layout("stages4", 4, stage_run, "in a row"),
    Layout("fsdp2", 2, lambda seed: stack_run(seed, TorchFSDPPlugin(), 2)),
    Layout("fsdp4", 4, lambda seed: stack_run(seed, TorchFSDPPlugin(), 4)),
    Layout("ddp2", 2, lambda seed: stack_run(seed, TorchDDPPlugin(), 2)),
]


# ---- experts on a mesh axis


class Experts(nn.Module):
    """Six experts, weighted by a router; over four ranks the last has none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 6)
        self.up = nn.Parameter(torch.randn(6, 3, 4) / 2)
        self.down = nn.Parameter(torch.randn(6, 4, 2) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.router(x).softmax(-1).t().unsqueeze(-1)  # [experts, points, 1]
        given = x.unsqueeze(0).expand(6, -1, -1)
        up, down = self.up, self.down
        if not isinstance(up, DTensor):
            result: torch.Tensor = (torch.bmm(torch.tanh(torch.bmm(given, up)), down) * share).sum(0)
            return result
        assert isinstance(down, DTensor)
        mesh, (index,) = up.device_mesh, up.device_mesh.get_coordinate() or (0,)
        # Each rank lets its experts see all points; what they say is summed. The ranks' shares of the gradients of what
        # went in are summed on the way back.
        partial = [Partial()]
        mine = slice(min(6, index * -(-6 // mesh.size())), min(6, (index + 1) * -(-6 // mesh.size())))
        entered = DTensor.from_local(given, mesh, [Replicate()], run_check=False).to_local(grad_placements=partial)
        weighted = DTensor.from_local(share, mesh, [Replicate()], run_check=False).to_local(grad_placements=partial)
        said = torch.bmm(torch.tanh(torch.bmm(entered[mine], up.to_local())), down.to_local()) * weighted[mine]
        return (
            DTensor.from_local(said.sum(0), mesh, partial, run_check=False).redistribute(None, [Replicate()]).to_local()
        )


def experts_run(seed: int, layout: str, data_size: int = 1) -> StackRun:
    torch.manual_seed(seed)
    model: nn.Module = Experts()
    rank = 0
    if layout == "ep":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
        _spread(model, mesh, ("up", "down"))
    elif layout == "epxfsdp":
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        _spread(model, both["ep"], ("up", "down"))
        # One of the two is cut along another dim, the other along the experts once more (a strided shard).
        fully_shard(model, mesh=both["dp"], shard_placement_fn=lambda p: Shard(1) if p.shape == (6, 4, 2) else None)
        rank = both.get_local_rank("dp")
    elif layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        rank = dist.get_rank()
    return StackRun(model, adamw(model.parameters()), rank, data_size)


def _spread(model: nn.Module, mesh: DeviceMesh, names: tuple[str, ...]) -> None:
    for name in names:
        parameter = model.get_parameter(name)
        spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(model, name, nn.Parameter(spread))


EXPERTS = [
    Layout("one", 1, lambda seed: experts_run(seed, "one")),
    Layout("ep2", 2, lambda seed: experts_run(seed, "ep")),
    Layout("ep4", 4, lambda seed: experts_run(seed, "ep")),
    Layout("fsdp2", 2, lambda seed: experts_run(seed, "fsdp", 2)),
    Layout("ep2xfsdp2", 4, lambda seed: experts_run(seed, "epxfsdp", 2)),
]


# ---- packed weights: gate and up in one tensor, each of them cut


class Packed(nn.Module):
    inner = 7  # gate and up have 7 rows each: two ranks have 4 and 3 of each

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.gate_up = nn.Parameter(torch.randn(2 * self.inner, 5) / 2)
        self.down = nn.Parameter(torch.randn(5, self.inner) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.enter(x))
        gate_up, down = self.gate_up, self.down
        if not isinstance(gate_up, DTensor):
            gate, up = (x @ gate_up.t()).chunk(2, -1)
            return (functional.silu(gate) * up) @ down.t()
        assert isinstance(down, DTensor)
        mesh, partial = gate_up.device_mesh, [Partial()]
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=partial)
        gate, up = (x @ gate_up.to_local().t()).chunk(2, -1)
        result = (functional.silu(gate) * up) @ down.to_local().t()
        return DTensor.from_local(result, mesh, partial, run_check=False).redistribute(None, [Replicate()]).to_local()


class PackedRun(StackRun):
    """Packed weights are put together here by hand: torch need not know how for every layout."""

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != "gate_up" or not isinstance(tensor, DTensor) or not any(map(_is_strided, tensor.placements)):
            return super().whole(name, tensor)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, tensor.to_local().detach().clone())
        halves = [torch.cat(parts[tp::2]) for tp in range(2)]  # FSDP cut what tensor parallelism had cut before
        pairs = [half.chunk(2) for half in halves]
        return torch.cat([pair[0] for pair in pairs] + [pair[1] for pair in pairs])


def _is_strided(placement: object) -> bool:
    return isinstance(placement, _StridedShard)


def packed_run(seed: int, layout: str, data_size: int = 1) -> PackedRun:
    torch.manual_seed(seed)
    model: nn.Module = Packed()
    rank = 0
    if layout.startswith("tp"):
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        _pack(model, mesh["tp"])
        if layout == "tpxfsdp":
            fully_shard(model, mesh=mesh["dp"])
            rank = mesh.get_local_rank("dp")
    elif layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        rank = dist.get_rank()
    return PackedRun(model, adamw(model.parameters()), rank, data_size)


def _pack(model: nn.Module, mesh: DeviceMesh) -> None:
    gate, up = model.get_parameter("gate_up").detach().chunk(2)
    index = mesh.get_local_rank()
    local = torch.cat([gate.chunk(2)[index], up.chunk(2)[index]])
    placement = _StridedShard(0, split_factor=2)
    shape = torch.Size((2 * Packed.inner, 5))
    packed = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=(5, 1))
    model.gate_up = nn.Parameter(packed)
    down = distribute_tensor(model.get_parameter("down").detach(), mesh, [Shard(1)], src_data_rank=None)
    model.down = nn.Parameter(down)


PACKED = [
    Layout("one", 1, lambda seed: packed_run(seed, "one")),
    Layout("tp2", 2, lambda seed: packed_run(seed, "tp")),
    Layout("fsdp2", 2, lambda seed: packed_run(seed, "fsdp", 2)),
    Layout("fsdp4", 4, lambda seed: packed_run(seed, "fsdp", 4)),
    Layout("tp2xfsdp2", 4, lambda seed: packed_run(seed, "tpxfsdp", 2)),
]

FAMILIES: dict[str, list[Layout]] = {"llama": LLAMA, "stages": STAGES, "experts": EXPERTS, "packed": PACKED}
