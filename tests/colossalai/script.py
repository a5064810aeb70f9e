"""What does ColossalChat's `train_sft.py` call, in which order and with which arguments?

The save inside of the loop is that of its reward-model trainer; `SFTTrainer` calls the same with the same names, once
for each epoch, when there is nothing left to go on with.

Source: ColossalAI, `applications/ColossalChat/examples/training_scripts/train_sft.py`, `coati/trainer/{sft,rm}.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from coati.utils import load_checkpoint, save_checkpoint
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossalai.cluster import DistCoordinator
from colossalai.nn.lr_scheduler import CosineAnnealingWarmupLR
from colossalai.nn.optimizer import HybridAdam
from transformers import AutoModelForCausalLM

from shardpoint.data import StatefulDistributedSampler

NUM_SAMPLES, BATCH_SIZE = 16, 2
_kept: list[Any] = []  # a hybrid plugin destroys its groups when it is collected, on each rank sometime


def plugin_of(name: str) -> Any:
    if name == "gemini":
        return GeminiPlugin(precision="bf16", placement_policy="static", initial_scale=2**16, max_norm=1.0)
    if name == "zero2":
        return LowLevelZeroPlugin(stage=2, precision="bf16", initial_scale=2**16, max_norm=1.0)
    return HybridParallelPlugin(
        tp_size=2, pp_size=1, zero_stage=0, parallel_output=False, max_norm=1.0, precision="bf16", microbatch_size=1
    )


def train_sft(plugin_name: str, pretrain: Path, save_dir: Path, checkpoint_path: Path | None = None) -> list[float]:
    """Train what is left of one epoch, saving in the middle of it; return the losses."""
    coordinator = DistCoordinator()
    model = AutoModelForCausalLM.from_pretrained(
        pretrain, torch_dtype=torch.bfloat16, trust_remote_code=False, attn_implementation="eager"
    )
    plugin = plugin_of(plugin_name)
    _kept.append(plugin)
    booster = Booster(plugin=plugin)
    optim = HybridAdam(model_params=model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, adamw_mode=True)
    samples = torch.randint(0, 64, (NUM_SAMPLES, 8), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": one, "labels": one, "attention_mask": torch.ones_like(one)} for one in samples]
    train_dataloader = plugin.prepare_dataloader(
        dataset=dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        distributed_sampler_cls=StatefulDistributedSampler,
    )
    num_steps = len(train_dataloader)
    lr_scheduler = CosineAnnealingWarmupLR(optimizer=optim, total_steps=num_steps, warmup_steps=1, eta_min=0.1 * 1e-3)
    torch.set_default_dtype(torch.bfloat16)
    model, optim, _, train_dataloader, lr_scheduler = booster.boost(
        model=model, optimizer=optim, lr_scheduler=lr_scheduler, dataloader=train_dataloader
    )
    torch.set_default_dtype(torch.float)

    start_epoch = 0
    if checkpoint_path is not None:
        start_epoch, start_step, sampler_start_idx = load_checkpoint(
            load_dir=checkpoint_path, booster=booster, model=model, optimizer=optim, lr_scheduler=lr_scheduler
        )
        coordinator.print_on_master(f"Loaded checkpoint {checkpoint_path} at epoch {start_epoch} step {start_step}")
        # Ours counts the samples of the whole job, that of ColossalChat those of one rank.
        job_index = sampler_start_idx * train_dataloader.sampler.num_replicas
        train_dataloader.sampler.set_start_index(start_index=job_index)

    model.train()
    losses: list[float] = []
    for i, batch in enumerate(train_dataloader):
        batch_size = batch["input_ids"].size(0)
        outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        booster.backward(loss=outputs.loss, optimizer=optim)
        optim.step()
        optim.zero_grad()
        lr_scheduler.step()
        losses.append(outputs.loss.item())
        if i + 1 == num_steps // 2 and checkpoint_path is None:
            save_checkpoint(
                save_dir=save_dir,
                booster=booster,
                model=model,
                optimizer=optim,
                lr_scheduler=lr_scheduler,
                epoch=start_epoch,
                step=i + 1,
                batch_size=batch_size,
                coordinator=coordinator,
            )
    return losses
