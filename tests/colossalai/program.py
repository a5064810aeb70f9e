"""Save and load through the real Booster on two ranks; each check reports "ok" or what went wrong."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import colossalai
import pytest
import torch
import torch.distributed as dist
from coati.utils.ckpt_io import load_checkpoint, load_json, save_checkpoint, save_json
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.cluster import DistCoordinator
from torch import nn

import shardpoint
from shardpoint.booster import TorchDDPPlugin as NativeDDP
from shardpoint.booster import TorchFSDPPlugin as NativeFSDP
from shardpoint.errors import ChecksumError, MismatchError, PeerError, StorageError, UnsupportedFormatError
from tests.colossalai import cpu
from tests.distributed.reporting import run_and_report
from tests.training import Net, flip, net, optimizer_state, same_bits, weights

RANK = int(os.environ["RANK"])
PLUGINS: dict[str, Callable[[], Any]] = {
    "ddp": TorchDDPPlugin,
    "zero1": lambda: LowLevelZeroPlugin(stage=1, precision="fp32"),
    "zero2": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
}


class Run:
    """One run under the real Booster."""

    def __init__(self, plugin: str, seed: int, width: int = 5) -> None:
        self.booster = Booster(plugin=PLUGINS[plugin]())
        torch.manual_seed(seed)
        model = Net(width)
        model.frozen.requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        self.bare = model
        self.model, self.optimizer, _, _, self.scheduler = self.booster.boost(model, optimizer, lr_scheduler=scheduler)

    def train(self, steps: range) -> list[float]:
        losses = []
        for number in steps:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + RANK))
            used = sum(parameter.sum() for parameter in (self.bare.frozen, self.bare.unused))
            loss = self.model(x).square().mean() + 0 * used
            self.booster.backward(loss, self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, root: Path, step: int) -> None:
        save_checkpoint(
            save_dir=root, booster=self.booster, model=self.model, optimizer=self.optimizer,
            lr_scheduler=self.scheduler, epoch=1, step=step, batch_size=32, coordinator=DistCoordinator(),
        )  # fmt: skip

    def load(self, path: Path) -> tuple[int, int, int]:
        return load_checkpoint(path, self.booster, self.model, self.optimizer, self.scheduler)

    def own_save(self, path: Path) -> None:
        """Save as ColossalChat's `save_checkpoint` does."""
        (path / "modeling").mkdir(parents=True, exist_ok=True)
        self.booster.save_model(self.model, str(path / "modeling"), shard=True)
        self.booster.save_optimizer(self.optimizer, str(path / "optimizer"), shard=True)
        self.booster.save_lr_scheduler(self.scheduler, str(path / "lr_scheduler"))
        if RANK == 0:
            save_json({"epoch": 1, "step": 3, "sample_start_index": 96}, path / "running_states.json")
        dist.barrier()


def saved(out: Path, plugin: str) -> tuple[Run, Path]:
    run = Run(plugin, 1)
    run.train(range(3))
    run.save(out, 3)
    return run, out / "epoch-1_step-3"


def goes_on(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin)
    assert load_json(path / "running_states.json") == {"epoch": 1, "step": 3, "sample_start_index": 96}
    other = Run(plugin, 7)
    assert other.load(path) == (1, 3, 96)
    assert same_bits(weights(other.bare), weights(run.bare))
    assert other.train(range(3, 6)) == run.train(range(3, 6))
    assert same_bits(weights(other.bare), weights(run.bare))


def is_all_or_nothing(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin)
    whole = run.booster.save_optimizer

    def fails(*args: Any, **options: Any) -> None:
        whole(*args, **options)
        if dist.get_world_size() - 1 == RANK:
            raise OSError(28, "No space left on device")

    with (
        patch.object(run.booster, "save_optimizer", fails),
        pytest.raises((PeerError, OSError, StorageError), match="No space left"),
    ):
        run.save(out, 4)
    assert sorted(item.name for item in out.glob("epoch*")) == ["epoch-1_step-3"]
    dist.barrier()
    if RANK == 0:
        flip(next(path.glob("modeling/pytorch_model*.bin")))
    dist.barrier()
    other = Run(plugin, 7)
    before = {name: tensor.clone() for name, tensor in weights(other.bare).items()}
    with pytest.raises((ChecksumError, PeerError), match="pytorch_model"):
        other.load(path)
    assert same_bits(weights(other.bare), before)


def refuses_what_would_be_skipped(plugin: str, out: Path) -> None:
    _, path = saved(out, plugin)
    wider = Run(plugin, 7, width=6)
    before = {name: tensor.clone() for name, tensor in weights(wider.bare).items()}
    with pytest.raises((MismatchError, PeerError)) as caught:
        wider.load(path)
    assert "head.weight: stored F32 [1, 5], the model has F32 [1, 6]" in str(caught.value)
    assert same_bits(weights(wider.bare), before)
    other = Run(plugin, 7)
    other.bare.register_parameter("later", nn.Parameter(torch.ones(2)))
    del other.bare.unused
    with pytest.raises((MismatchError, PeerError)) as caught:
        other.load(path)
    assert "missing later" in str(caught.value)
    assert "unexpected unused" in str(caught.value)


def goes_on_natively(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin)
    own = out / "own" / "epoch-1_step-3"
    run.own_save(own)
    real = Run(plugin, 5)
    assert real.load(own) == (1, 3, 96)
    assert same_bits(weights(real.bare), weights(run.bare))
    native_states: list[dict[str, torch.Tensor]] = []
    for source in (path, own):
        for native_plugin in (NativeDDP, NativeFSDP):
            booster = shardpoint.Booster(plugin=native_plugin())
            bare = net(9)
            bare.frozen.requires_grad_()
            model: nn.Module = bare
            optimizer = torch.optim.AdamW(bare.parameters(), lr=0.9)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            model, optimizer, *_ = booster.boost(model, optimizer)
            assert load_checkpoint(source, booster, model, optimizer, scheduler) == (1, 3, 96)
            assert same_bits(weights(model), weights(run.bare))
            native_states.append(optimizer_state(model, optimizer))
            assert scheduler.state_dict() == run.scheduler.state_dict()
    assert all(same_bits(state, native_states[0]) for state in native_states)
    assert any(tensor.abs().max() > 0 for tensor in native_states[0].values())
    if plugin == "ddp":
        assert same_bits(native_states[0], optimizer_state(run.bare, run.optimizer.unwrap()))


def what_shardpoint_wrote_is_not_given_to_it(out: Path) -> None:
    booster, model = shardpoint.Booster(), net(0)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, *_ = booster.boost(model, optimizer)
    nothing: Any = None
    save_checkpoint(out, booster, model, optimizer, nothing, 1, 3, 32, DistCoordinator())
    with pytest.raises((UnsupportedFormatError, PeerError), match="Shardpoint's own Booster"):
        Run("ddp", 1).load(out / "epoch-1_step-3")


def checks() -> dict[str, Callable[[Path], None]]:
    found: dict[str, Callable[[Path], None]] = {
        f"{plugin}_{check.__name__}": functools.partial(check, plugin)
        for plugin in PLUGINS
        for check in (goes_on, is_all_or_nothing, refuses_what_would_be_skipped, goes_on_natively)
    }
    return found | {"what_shardpoint_wrote_is_not_given_to_it": what_shardpoint_wrote_is_not_given_to_it}


if __name__ == "__main__":
    cpu.install()
    colossalai.launch_from_torch()
    run_and_report(checks(), lambda name: Path(sys.argv[1]) / name)
    dist.destroy_process_group()
