"""Which samples does this rank see next, and how does a job resume in the middle of an epoch on other ranks?

An epoch is one order of the whole data set, a pure function of `(seed, epoch)`. A position in it is the number of
samples that the whole job has consumed, so `(seed, epoch, start_index)` means the same on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import Sampler

from shardpoint.errors import ResumeMismatchError, UsageError

_STATE_FIELDS = {"seed", "epoch", "start_index", "num_samples", "shuffle"}


class StatefulDistributedSampler(Sampler[int]):
    """Yield this rank's share of what is left of an epoch, from a position that does not depend on the ranks.

    It has the name and the methods of ColossalChat's sampler, with three differences. The start index counts the
    samples of the whole job, not those of one rank. No sample is repeated to fill up a rank. And a start index does
    not leak into later epochs: `set_epoch` to another epoch, after this one was iterated, begins at 0.

    What is left of the epoch is cut into micro-batches of `micro_batch_size` consecutive samples; micro-batch `m`
    goes to rank `m % num_replicas`. A step that takes a fixed number of micro-batches therefore sees the same samples
    on any number of ranks that divides it, and after a resume every remaining sample is seen exactly once, whatever
    the number of ranks is then.

    Iterating does not move the position, because a `DataLoader` reads ahead of the training loop: the loop says what
    it has consumed, with `set_start_index`, before it saves. The global random state is neither read nor changed.

    Args:
        dataset: the data set; only its length is used.
        num_replicas: the number of ranks that share the samples; by default those of torch.distributed, or 1.
        rank: this rank; by default torch.distributed's, or 0.
        shuffle: False keeps the data set's own order in every epoch.
        seed: the same on every rank, not negative.
        drop_last: True leaves out the end of an epoch that does not fill a batch, so that every rank gets the same
            number of micro-batches. False leaves out nothing: ranks may then differ by one micro-batch, and a loop
            with a collective in every step (any DDP or FSDP loop) would wait at the end of the epoch for ever.
        micro_batch_size: samples that go to one rank together.
        batch_size: samples of one step of the whole job, a multiple of `micro_batch_size * num_replicas`, which is
            the default. Give it to resume on another number of ranks: `drop_last` then leaves out the same samples.

    Raises:
        UsageError: an argument is out of range, or `batch_size` cannot be shared equally.

    Examples:
        >>> sampler = StatefulDistributedSampler(range(10), num_replicas=2, rank=1, shuffle=False, micro_batch_size=2)
        >>> list(sampler)
        [2, 3, 6, 7]
        >>> sampler.set_start_index(4)
        >>> list(sampler)
        [6, 7]
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        micro_batch_size: int = 1,
        batch_size: int | None = None,
    ) -> None:
        in_group = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if in_group else 1
        if rank is None:
            rank = dist.get_rank() if in_group else 0
        _check_count("num_replicas", num_replicas, low=1)
        _check_count("rank", rank, low=0, high=num_replicas - 1)
        _check_count("seed", seed, low=0)
        _check_count("micro_batch_size", micro_batch_size, low=1)
        unit = micro_batch_size * num_replicas
        batch_size = unit if batch_size is None else batch_size
        _check_count("batch_size", batch_size, low=1)
        if batch_size % unit:
            raise UsageError(
                f"batch_size is {batch_size}, which {num_replicas} ranks cannot share equally in micro-batches of "
                f"{micro_batch_size}; make it a multiple of {unit}"
            )
        self.num_samples = len(dataset)
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.micro_batch_size = micro_batch_size
        self.batch_size = batch_size
        self.epoch = 0
        self.start_index = 0
        self._iterated = False
        self._num_loads = 0

    def __iter__(self) -> Iterator[int]:
        self._iterated = True
        share = _every_nth_chunk(self._left(), self.micro_batch_size, self.rank, self.num_replicas)
        return self._until_loaded(share, self._num_loads)

    def peek(self, num_samples: int) -> list[int]:
        """Return which samples the whole job consumes next, in that order, without moving; fewer at an epoch's end.

        Args:
            num_samples: how many, at most.

        Raises:
            UsageError: `num_samples` is not an integer, or is negative.
        """
        _check_count("num_samples", num_samples, low=0)
        indices: list[int] = self._left()[:num_samples].tolist()
        return indices

    def __len__(self) -> int:
        """Return how many samples this rank gets from the start index to the end of the epoch."""
        whole_rounds, rest = divmod(self._num_left(), self.micro_batch_size * self.num_replicas)
        own_rest = min(max(rest - self.rank * self.micro_batch_size, 0), self.micro_batch_size)
        return whole_rounds * self.micro_batch_size + own_rest

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        The start index is kept when the epoch is the same, or when nothing was iterated since the sampler was made
        or loaded (a resume may call `set_start_index` first). Otherwise the other epoch starts at its beginning.

        Raises:
            UsageError: `epoch` is not an integer, or is negative.
        """
        _check_count("epoch", epoch, low=0)
        if epoch != self.epoch and self._iterated:
            self.start_index = 0
        self.epoch = epoch

    def set_start_index(self, start_index: int) -> None:
        """Say how many samples of this epoch the whole job, all ranks together, has consumed.

        An iteration that is under way is not affected; the next one, and the next save, start there.

        Raises:
            UsageError: `start_index` is not an integer, is negative, or is beyond the end of the data set.
        """
        _check_count("start_index", start_index, low=0, high=self.num_samples)
        self.start_index = start_index

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what gives it a meaning; it is equal on every rank."""
        return {name: getattr(self, name) for name in sorted(_STATE_FIELDS)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a position, its seed included, that any rank of a job of any size returned.

        An iterator that was made before raises `ResumeMismatchError` when it is asked for its next sample.

        Raises:
            UsageError: as `check_state_dict` does. The sampler is then unchanged.
        """
        self.check_state_dict(state_dict)
        self.seed = state_dict["seed"]
        self.epoch = state_dict["epoch"]
        self.start_index = state_dict["start_index"]
        self._iterated = False
        self._num_loads += 1

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` would refuse, without loading it: a resume asks before it changes anything.

        Raises:
            UsageError: fields are missing, unknown or out of range, or the state is of a data set of another length
                or of the other `shuffle`: the position would mean other samples.
        """
        if set(state_dict) != _STATE_FIELDS:
            raise UsageError(
                f"a sampler's state has the fields {sorted(_STATE_FIELDS)}, this one has {sorted(state_dict, key=str)}"
            )
        for name in ("num_samples", "shuffle"):
            if state_dict[name] != getattr(self, name):
                raise UsageError(
                    f"the sampler's state has {name}={state_dict[name]!r} and this sampler {getattr(self, name)!r}: "
                    f"its start index would mean other samples; make the sampler over the same data"
                )
        _check_count("seed", state_dict["seed"], low=0)
        _check_count("epoch", state_dict["epoch"], low=0)
        _check_count("start_index", state_dict["start_index"], low=0, high=self.num_samples)

    def _num_left(self) -> int:
        """Count the samples from the start index to the end, over all ranks, that will be yielded."""
        left = self.num_samples - self.start_index
        return left - left % self.batch_size if self.drop_last else left

    def _left(self) -> torch.Tensor:
        """Return what is left of the epoch's order, over all ranks, as int64 `[num_left]`."""
        return self._order()[self.start_index : self.start_index + self._num_left()]

    def _until_loaded(self, share: Iterator[int], num_loads: int) -> Iterator[int]:
        """Yield a share for as long as no other position is loaded: it would go on from the old one, silently."""
        for index in share:
            if self._num_loads != num_loads:
                text = (
                    "this iterator was made before the sampler's position was restored, so it goes on from the old "
                    "one: make a new iterator of the DataLoader after the resume"
                )
                raise ResumeMismatchError(text, differences=["data: an iterator from before the resume"])
            yield index

    def _order(self) -> torch.Tensor:
        """Return the epoch's order of all samples as int64 `[num_samples]`."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        # Hashed, not added: with seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
        digest = hashlib.sha256(f"{self.seed}:{self.epoch}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randperm(self.num_samples, generator=generator, device="cpu")


def _every_nth_chunk(order: torch.Tensor, chunk_size: int, first: int, stride: int) -> Iterator[int]:
    """Yield the values of chunks `first`, `first + stride`, ... of a one-dimensional tensor."""
    for begin in range(first * chunk_size, len(order), stride * chunk_size):
        yield from order[begin : begin + chunk_size].tolist()


def _check_count(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Raise UsageError unless a value is an integer of the range, both ends included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an integer, not {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {value}; it must be {wanted}")
