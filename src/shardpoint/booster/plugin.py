"""What a plugin is: one way to spread a model over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer


class Plugin(ABC):
    """Spread one model over the ranks, in place where it can; the `Booster` does what is common to all plugins.

    Attributes:
        controls_precision: the plugin itself computes in lower precision, so the Booster's `mixed_precision` has no
            place beside it.
    """

    controls_precision: ClassVar[bool] = False

    @abstractmethod
    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, device: str | torch.device | None = None
    ) -> nn.Module:
        """Spread the model, and make the optimizer follow it in place.

        Args:
            model: as the user made it, or a module that this plugin has already spread.
            optimizer: one made from the model's parameters; its groups are updated, the object stays.
            device: where to train; None leaves the choice to the plugin.

        Returns:
            The module to call in training.

        Raises:
            UsageError: something that was given cannot be honoured; model and optimizer are as they were.

        Collective:
            Every rank.
        """

    @abstractmethod
    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Accumulate gradients without synchronising them until the context ends.

        Raises:
            UsageError: this plugin has not spread the model.
        """
