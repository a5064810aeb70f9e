"""What sets a training run up on several ranks: `Booster`, its plugins, `DistCoordinator`."""

from __future__ import annotations

from shardpoint.booster.booster import Booster
from shardpoint.booster.coordinator import DistCoordinator
from shardpoint.booster.ddp import TorchDDPPlugin
from shardpoint.booster.fsdp import TorchFSDPPlugin
from shardpoint.booster.hybrid import HybridParallelPlugin
from shardpoint.booster.plugin import Plugin
from shardpoint.booster.zero import GeminiPlugin, LowLevelZeroPlugin

__all__ = [
    "Booster",
    "DistCoordinator",
    "GeminiPlugin",
    "HybridParallelPlugin",
    "LowLevelZeroPlugin",
    "Plugin",
    "TorchDDPPlugin",
    "TorchFSDPPlugin",
]
