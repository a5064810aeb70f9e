"""How does opening a `DataLoader` leave the global random state alone, which a resume has just restored?

`iter(DataLoader(...))` draws a base seed for its workers, workers or not: from torch's global random state, unless the
loader has a `generator`. A run that resumes in the middle of an epoch opens its loader once more than the uninterrupted
run, and would draw other dropout masks and sample other tokens from there on.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from torch import distributed as dist
from torch.utils.data import DataLoader

from shardpoint.errors import UsageError

LoaderT = TypeVar("LoaderT", bound=DataLoader)  # type: ignore[type-arg]  # a bound cannot be generic


def with_own_generator(loader: LoaderT) -> LoaderT:
    """Give a loader a generator of its own, where it has none, and return it. `Booster.boost` does so too.

    The generator is seeded from what `torch.manual_seed` was given, and from the rank: the workers' seeds still depend
    on both. Nothing is drawn.

    Args:
        loader: a `DataLoader`, or a class made from it (`StatefulDataLoader`); changed in place.

    Raises:
        UsageError: it is none.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> loader = with_own_generator(DataLoader(range(4), batch_size=2))
        >>> before = torch.get_rng_state()
        >>> batches = iter(loader)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    if not isinstance(loader, DataLoader):
        raise UsageError(f"a {type(loader).__name__} is no torch.utils.data.DataLoader")
    if loader.generator is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        digest = hashlib.sha256(f"loader:{torch.initial_seed()}:{rank}".encode()).digest()
        loader.generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return loader
