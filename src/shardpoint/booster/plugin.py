"""What a plugin is: one way to spread a model over the ranks."""

# ruff: noqa: FBT001, FBT002 - the parameters of `prepare_dataloader`, booleans included, are ColossalAI's

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from shardpoint.booster import launch
from shardpoint.data.prepared import prepare_dataloader


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

    def prepare_dataloader(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 1024,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
        distributed_sampler_cls: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        """Return a loader of this rank's share of a data set; ranks that cut one model together get the same batches.

        It may be called before `Booster.boost`, and before torch.distributed is initialised under torchrun. The order
        of an epoch is a function of `(seed, epoch)`, the same on any number of ranks: a permutation drawn from a hash
        of the two, or the data set's own order. It is not the order that torch's `DistributedSampler` draws. Batches
        of `batch_size` samples that follow each other in it go to the shares in turn.

        To resume to the sample, give `loader.sampler` as `TrainState.sampler`, and tell it before each save what the
        whole job has consumed: `loader.sampler.set_start_index(step * loader.sampler.batch_size)`; `set_epoch` chooses
        the epoch. After `load_checkpoint`, `set_start_index` takes the returned index if `save_checkpoint` was given
        the batch size of the whole job.

        Args:
            dataset: with a length and indices.
            batch_size: samples of one batch of one rank.
            shuffle: whether each epoch has an order of its own.
            seed: of the order, and of the workers. torch, numpy and random are seeded in each worker from it, from the
                epoch and its start index, from the share and from the worker's number; ColossalAI's workers, of all
                ranks and in all epochs, draw the same numbers instead. What a data set draws without workers comes
                from the global random state.
            drop_last: True leaves out the end of the epoch that does not fill a batch of every share. False leaves out
                nothing: the last batches of all shares are smaller, and equal, for which fewer samples than there are
                shares may be repeated.
            pin_memory: as `DataLoader`'s.
            num_workers: as `DataLoader`'s.
            distributed_sampler_cls: what makes the sampler, called with the data set, `num_replicas`, `rank` and
                `shuffle`, as ColossalAI does; None, `StatefulDistributedSampler` or a class made from it gets the other
                settings, too.
            kwargs: `DataLoader`'s other options.

        Raises:
            UsageError: the data set has no length, a number is out of range, `sampler` or `batch_sampler` is given, or
                the ranks that were started do not fit the plugin.
        """
        share, num_shares = self._share_of_data()
        return prepare_dataloader(
            dataset,
            batch_size,
            share=share,
            num_shares=num_shares,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            sampler_class=distributed_sampler_cls,
            options={"pin_memory": pin_memory, "num_workers": num_workers, **kwargs},
        )

    def _share_of_data(self) -> tuple[int, int]:
        """Return which share of the data this rank trains on, and how many there are."""
        return launch.rank_and_world()
