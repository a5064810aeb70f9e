"""What sets a training run up on several ranks: `Booster`, its plugins, `DistCoordinator`."""

from __future__ import annotations

from shardpoint.booster.booster import Booster
from shardpoint.booster.coordinator import DistCoordinator
from shardpoint.booster.plugins import Plugin, TorchDDPPlugin, TorchFSDPPlugin

__all__ = ["Booster", "DistCoordinator", "Plugin", "TorchDDPPlugin", "TorchFSDPPlugin"]
