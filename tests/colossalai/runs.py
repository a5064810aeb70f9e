"""What does a run under the real Booster train, save and load: a small net, or a Llama where a plugin shards one?"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from coati.utils.ckpt_io import load_checkpoint, save_checkpoint, save_json
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.cluster import DistCoordinator
from colossalai.nn.lr_scheduler import CosineAnnealingWarmupLR
from colossalai.nn.optimizer import HybridAdam
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training import Net

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
VOCABULARY = 128  # what ColossalAI pads it to: it does not save the optimizer of a padded one


def hybrid(**options: Any) -> Callable[[], Any]:
    return lambda: HybridParallelPlugin(**({"tp_size": 1, "pp_size": 1, "precision": "fp32"} | options))


PLUGINS: dict[str, Callable[[], Any]] = {
    "ddp": TorchDDPPlugin,
    "zero1": lambda: LowLevelZeroPlugin(stage=1, precision="fp32"),
    "zero2": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
    "gemini": lambda: GeminiPlugin(precision="bf16", initial_scale=1),
    "hybrid": hybrid(),
    "tp2": hybrid(tp_size=2),
    "pp2": hybrid(pp_size=2, num_microbatches=2),
    # Only where the loss of bits is looked at.
    "zero1_bf16": lambda: LowLevelZeroPlugin(stage=1, precision="bf16"),
    "zero1_fp16": lambda: LowLevelZeroPlugin(stage=1, precision="fp16", initial_scale=4, growth_interval=2),
    "hybrid_bf16": hybrid(precision="bf16"),
    "hybrid_zero1_bf16": hybrid(precision="bf16", zero_stage=1),
    "tp2_zero1_bf16": hybrid(tp_size=2, precision="bf16", zero_stage=1),
}


@functools.cache
def one_for_all(plugin: str) -> Any:
    """Return the plugin that all runs use: a hybrid one that is collected destroys its groups, each rank sometime."""
    return PLUGINS[plugin]()


SMALL = ("ddp", "zero1", "zero2", "zero1_bf16", "zero1_fp16")


def llama(seed: int, *, tied: bool = False, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 16} | sizes | options
    return LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=tied, attn_implementation="eager"))


def small(seed: int, *, tied: bool = False, width: int = 5, later: bool = False) -> Net:
    assert not tied
    torch.manual_seed(seed)
    model = Net(width)
    model.frozen.requires_grad_()
    if later:
        model.register_parameter("later", nn.Parameter(torch.ones(2)))
    return model


def in_order(parameters: Iterable[nn.Parameter]) -> Any:
    return list(parameters)


def turned(parameters: Iterable[nn.Parameter]) -> Any:
    return list(parameters)[::-1]


def in_two_groups(parameters: Iterable[nn.Parameter]) -> Any:
    first, *rest = parameters
    return [{"params": [first]}, {"params": rest}]


class Run:
    """One run under the real Booster."""

    def __init__(
        self,
        plugin: str,
        seed: int,
        *,
        tied: bool = False,
        order: Callable[[Iterable[nn.Parameter]], Any] = in_order,
        step_lr: bool = False,
        warm: bool = False,
        lora: bool = False,
        **shape: Any,
    ) -> None:
        self.booster = Booster(plugin=one_for_all(plugin))
        self.is_small = plugin in SMALL and not lora
        self.is_pipeline = plugin.startswith("pp2")
        self.bare: Any = (small if self.is_small else llama)(seed, tied=tied, **shape)
        if lora:
            adapters = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.0)
            self.bare = self.booster.enable_lora(self.bare, lora_config=adapters)
        kind = HybridAdam if plugin == "gemini" or warm else torch.optim.AdamW
        optimizer = kind(order(self.bare.parameters()), lr=0.05 if self.is_small else 0.01)
        scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        if step_lr:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        if warm:
            scheduler = CosineAnnealingWarmupLR(optimizer, total_steps=20, warmup_steps=2)
        self.model, self.optimizer, _, _, self.scheduler = self.booster.boost(
            self.bare, optimizer, lr_scheduler=scheduler
        )

    def train(self, steps: range) -> list[float | None]:
        return [self._step(number) for number in steps]

    def _step(self, number: int) -> float | None:
        if self.is_small:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + RANK))
            dtype = self.bare.head.weight.dtype
            used = sum(
                getattr(self.bare, name).sum() for name in ("frozen", "unused", "later") if hasattr(self.bare, name)
            )
            loss = self.model(x.to(dtype)).square().mean() + 0 * used
        else:
            ids = torch.randint(0, VOCABULARY // 2, (4, 8), generator=torch.Generator().manual_seed(number))
            batch = {"input_ids": ids, "labels": ids}
            if self.is_pipeline:
                data: Iterator[Any] = iter([batch])
                out = self.booster.execute_pipeline(
                    data, self.model, lambda output, _: output.loss, self.optimizer, return_loss=True
                )
                loss = out["loss"]
            else:
                loss = self.model(**batch).loss
        if not self.is_pipeline:
            self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return None if loss is None else float(loss.item())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what this rank holds."""
        return {name: tensor.detach().clone() for name, tensor in self.model.unwrap().state_dict().items()}

    def save(self, root: Path, step: int, *, optimizer: bool = True) -> Path:
        given: Any = self.optimizer if optimizer else None
        save_checkpoint(
            save_dir=root, booster=self.booster, model=self.model, optimizer=given,
            lr_scheduler=self.scheduler, epoch=1, step=step, batch_size=32, coordinator=DistCoordinator(),
        )  # fmt: skip
        return root / f"epoch-1_step-{step}"

    def load(self, path: Path, *, optimizer: bool = True) -> tuple[int, int, int]:
        return load_checkpoint(path, self.booster, self.model, self.optimizer if optimizer else None, self.scheduler)

    def own_save(self, path: Path) -> None:
        """Save as ColossalChat's `save_checkpoint` does."""
        (path / "modeling").mkdir(parents=True, exist_ok=True)
        self.booster.save_model(self.model, str(path / "modeling"), shard=True)
        self.booster.save_optimizer(self.optimizer, str(path / "optimizer"), shard=True)
        self.booster.save_lr_scheduler(self.scheduler, str(path / "lr_scheduler"))
        if RANK == 0:
            save_json({"epoch": 1, "step": 3, "sample_start_index": 96}, path / "running_states.json")
        dist.barrier()


def saved(out: Path, plugin: str, *, tied: bool = False, **shape: Any) -> tuple[Run, Path]:
    run = Run(plugin, 1, tied=tied, **shape)
    run.train(range(3))
    return run, run.save(out, 3)


def stored_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights' files by torch alone."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((path / "modeling").glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def stored_states(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read the optimizer's files by torch alone: `<parameter>.<state>` -> tensor, by the model's order."""
    names = [name for name, _ in model.named_parameters()]
    found: dict[str, torch.Tensor] = {}
    for file in sorted((path / "optimizer").glob("pytorch_optim*-0*.bin")):
        for number, states in torch.load(file, weights_only=True).items():
            found |= {f"{names[number]}.{state}": torch.as_tensor(value) for state, value in states.items()}
    return found
