"""How does a plugin make the loader of a rank's share of a data set, with ColossalAI's parameters?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from shardpoint.data.sampler import StatefulDistributedSampler, check_count
from shardpoint.errors import UsageError


class PreparedDataLoader(DataLoader[Any]):
    """A `DataLoader` whose workers' seeds follow from what they load, not from which loaders were opened before.

    They are a function of the seed, the sampler's epoch and start index, the share, and the worker: a run that resumed
    at the start of an epoch has those of the run that never stopped. The global random state is neither read nor
    changed.

    Args:
        dataset: the data set.
        seed: not negative.
        share: which of the shares of the data this is.
        generator: None, or a generator of the caller's, which is then used as it is.
        options: `DataLoader`'s.
    """

    def __init__(
        self, dataset: Any, *, seed: int, share: int, generator: torch.Generator | None, **options: Any
    ) -> None:
        own = torch.Generator(device="cpu") if generator is None else None
        super().__init__(dataset, generator=own if generator is None else generator, **options)
        self._own = own
        self._seed = seed
        self._share = share

    def __iter__(self) -> Any:
        """Return the batches from the sampler's start index on."""
        if self._own is not None:
            epoch, start_index = getattr(self.sampler, "epoch", 0), getattr(self.sampler, "start_index", 0)
            text = f"workers:{self._seed}:{epoch}:{start_index}:{self._share}"
            self._own.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
        return super().__iter__()


def prepare_dataloader(
    dataset: Any,
    batch_size: int,
    *,
    share: int,
    num_shares: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    sampler_class: Callable[..., Any] | None,
    options: dict[str, Any],
) -> PreparedDataLoader:
    """Return a loader of one share of a data set.

    Args:
        dataset: with a length and indices.
        batch_size: samples of one batch of this share.
        share: which share, from 0.
        num_shares: how many there are.
        shuffle: as the sampler's.
        seed: of the order of the samples, and of the workers.
        drop_last: leave out the end of the epoch that does not fill a batch of every share.
        sampler_class: None, or `StatefulDistributedSampler`, or a class made from it; another is called as ColossalAI
            calls it, with `num_replicas`, `rank` and `shuffle` only.
        options: `DataLoader`'s other options.

    Raises:
        UsageError: the data set has no length, a number is out of range, or an option belongs to the sampler.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"prepare_dataloader: a {type(dataset).__name__} has no length and no indices to share out: make its "
            "DataLoader yourself"
        )
    taken = sorted({"sampler", "batch_sampler"} & options.keys())
    if taken:
        raise UsageError(
            f"prepare_dataloader makes the sampler: leave {' and '.join(taken)} out, or give distributed_sampler_cls"
        )
    check_count("batch_size", batch_size, low=1)
    check_count("seed", seed, low=0)
    settings: dict[str, Any] = {"num_replicas": num_shares, "rank": share, "shuffle": shuffle}
    make = StatefulDistributedSampler if sampler_class is None else sampler_class
    if isinstance(make, type) and issubclass(make, StatefulDistributedSampler):
        settings |= {"seed": seed, "drop_last": drop_last, "micro_batch_size": batch_size, "pad": not drop_last}
    sampler = make(dataset, **settings)
    return PreparedDataLoader(
        dataset,
        seed=seed,
        share=share,
        generator=options.get("generator"),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        **{name: value for name, value in options.items() if name != "generator"},
    )
