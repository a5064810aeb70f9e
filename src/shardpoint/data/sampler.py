"""Which samples does this rank see next, and how does a job resume in the middle of an epoch on other ranks?

An epoch is one order of the whole data set, a pure function of `(seed, epoch)`. A position in it is the number of
samples that the whole job has consumed, so `(seed, epoch, start_index)` means the same on any number of ranks.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import Sampler

from shardpoint.errors import ResumeMismatchError, UsageError

_STATE_FIELDS = {"seed", "epoch", "start_index", "num_samples", "shuffle"}
_SHARE_FIELDS = {"seed", "epoch", "start_index", "num_replicas", "micro_batch_size", "num_yielded"}
_MAX_LOADERS = 8  # of one process, whose base seeds are looked for in a random state


class StatefulDistributedSampler(Sampler[int]):
    """Yield this rank's share of what is left of an epoch, from a position that does not depend on the ranks.

    It has the name and the methods of ColossalChat's sampler, with three differences. The start index counts the
    samples of the whole job, not those of one rank. No sample is repeated to fill up a rank, unless `pad` asks for it.
    And a start index does not leak into later epochs: `set_epoch` to another epoch, after this one was iterated, begins
    at 0.

    What is left of the epoch is cut into micro-batches of `micro_batch_size` consecutive samples; micro-batch `m`
    goes to rank `m % num_replicas`. A step that takes a fixed number of micro-batches therefore sees the same samples
    on any number of ranks that divides it, and after a resume every remaining sample is seen exactly once, whatever
    the number of ranks is then.

    Iterating does not move the position, because a `DataLoader` reads ahead of the training loop: the loop says what
    it has consumed, with `set_start_index`, before it saves. Only torchdata's `StatefulDataLoader` needs no such call:
    it counts what it handed out, and puts that in its own state. The global random state is not changed.

    Training on nothing is an error. Where an iteration has no sample, and `set_epoch` was not called since the last
    one (or since a state was loaded), its first `next` raises; `expect` tells before.

    Args:
        dataset: the data set; only its length is used.
        num_replicas: the number of ranks that share the samples; by default those of torch.distributed, or 1.
        rank: this rank; by default torch.distributed's, or 0.
        shuffle: False keeps the data set's own order in every epoch.
        seed: the same on every rank, not negative.
        drop_last: True leaves out the end of an epoch that does not fill a batch, so that every rank gets the same
            number of micro-batches; a start index is then a multiple of the batch size. False leaves out nothing: ranks
            may then differ by one micro-batch, and a loop with a collective in every step (any DDP or FSDP loop) would
            wait at the end of the epoch for ever, unless `pad` is True.
        micro_batch_size: samples that go to one rank together.
        batch_size: samples of one step of the whole job, a multiple of `micro_batch_size * num_replicas`, which is
            the default. Give it to resume on another number of ranks: `drop_last` then leaves out the same samples.
        pad: True makes ranks equal where `drop_last` is False: what is left for the last round of micro-batches is cut
            into as many equal parts as there are ranks, and the first samples of the epoch are repeated where they do
            not suffice (fewer than `num_replicas` of them, as torch's `DistributedSampler` does). `expect`, `peek` and
            positions count no repeated sample.

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
        pad: bool = False,
    ) -> None:
        in_group = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if in_group else 1
        if rank is None:
            rank = dist.get_rank() if in_group else 0
        # ColossalAI's plugins pass integers of numpy, which a state would not keep as numbers.
        num_replicas, rank = _plain(num_replicas), _plain(rank)
        check_count("num_replicas", num_replicas, low=1)
        check_count("rank", rank, low=0, high=num_replicas - 1)
        check_count("seed", seed, low=0)
        check_count("micro_batch_size", micro_batch_size, low=1)
        unit = micro_batch_size * num_replicas
        batch_size = unit if batch_size is None else batch_size
        check_count("batch_size", batch_size, low=1)
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
        self.pad = pad
        self.epoch = 0
        self.start_index = 0
        self._num_loads = 0
        self._first_index = 0  # where the batches of this epoch are counted from
        self._epoch_is_known = False  # else an index that is given is that of the epoch that is named afterwards
        self._epoch_is_chosen = False  # by `set_epoch`, for the iteration that comes next
        self._cached_order: tuple[tuple[int, int], torch.Tensor] | None = None
        self._restored: tuple[torch.Tensor, Callable[[str], None]] | None = None

    def __iter__(self) -> Iterator[int]:
        """Return this rank's samples from the start index to the end of the epoch.

        The iterator has `state_dict` and `load_state_dict`, for loaders that save what they have handed out.

        Raises:
            UsageError: from the first `next`: there is no sample, and no `set_epoch` asked for this iteration.
        """
        return _Share(self)

    def __len__(self) -> int:
        """Return how many samples this rank gets from the start index to the end of the epoch."""
        num_left = self._num_left(self.start_index)
        whole_rounds = num_left // (self.micro_batch_size * self.num_replicas)
        return whole_rounds * self.micro_batch_size + len(self._micro_batch(whole_rounds, num_left))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        The start index is kept when the epoch is the same; another epoch starts at its beginning. Only before any epoch
        was named (by this, by a loaded state, or by an iteration) may `set_start_index` be called first.

        Raises:
            UsageError: `epoch` is not an integer, or is negative.
        """
        check_count("epoch", epoch, low=0)
        if epoch != self.epoch and self._epoch_is_known:
            self.start_index = self._first_index = 0
        self.epoch = epoch
        self._epoch_is_known = self._epoch_is_chosen = True

    def set_start_index(self, start_index: int, *, other_batch_size: bool = False) -> None:
        """Say how many samples of this epoch the whole job, all ranks together, has consumed.

        An iteration that is under way is not affected; the next one, and the next save, start there.

        Args:
            start_index: `step * batch_size`, of the job; not of one rank, as ColossalChat's sampler has it.
            other_batch_size: True where this epoch was begun with another batch size. With `drop_last` batches are
                then counted from `start_index`; without it there is no difference. A loaded state needs no such word.

        Raises:
            UsageError: `start_index` is not an integer, is negative, or is beyond the end of the data set; or, with
                `drop_last`, no batch begins there: then the end of the epoch would leave out other samples than those
                that the uninterrupted run leaves out, and the index is probably that of one rank.
        """
        check_count("start_index", start_index, low=0, high=self.num_samples)
        first_index = start_index if other_batch_size or start_index == 0 else self._first_index
        if self.drop_last and (start_index < first_index or (start_index - first_index) % self.batch_size):
            counted = f"multiples of {self.batch_size}" + (f", from {first_index} on" if first_index else "")
            raise UsageError(
                f"start_index is {start_index}, but with drop_last the batches of this epoch begin at {counted}: give "
                f"step * batch_size of the whole job, not of one rank; where the epoch was begun with another batch "
                f"size, load the sampler's state, or say set_start_index({start_index}, other_batch_size=True)"
            )
        self._first_index = first_index
        self.start_index = start_index

    def expect(self, num_steps: int) -> None:
        """Refuse to go on where this epoch has fewer steps left than a loop has planned for it.

        Nothing is changed. A loop calls it where it begins, or goes on with, an epoch.

        Args:
            num_steps: steps of `batch_size` samples from the start index on. Without `drop_last` the last one may have
                fewer samples.

        Raises:
            UsageError: fewer are left, or `num_steps` is not an integer, or is negative.
        """
        check_count("num_steps", num_steps, low=0)
        left = -(-self._num_left(self.start_index) // self.batch_size)
        if left < num_steps:
            raise UsageError(f"{num_steps} steps were planned and {left} are left: {self._where(self.start_index)}")

    def peek(self, num_samples: int) -> list[int]:
        """Return the next samples of the whole job, in the order in which it consumes them.

        They start at the position, and go on over the end of the epoch into the next ones; `drop_last` is respected.
        The list is the same on every rank, and on any number of ranks with the same `batch_size`. Nothing is changed,
        and no global random state is read.

        Args:
            num_samples: how many.

        Returns:
            `num_samples` indices into the data set.

        Raises:
            UsageError: `num_samples` is not an integer, or is negative; or an epoch has no sample at all.

        Examples:
            >>> sampler = StatefulDistributedSampler(
            ...     range(6), num_replicas=2, shuffle=False, drop_last=True, batch_size=4
            ... )
            >>> sampler.peek(6)
            [0, 1, 2, 3, 0, 1]
        """
        check_count("num_samples", num_samples, low=0)
        found: list[int] = []
        epoch, start = self.epoch, self.start_index
        while len(found) < num_samples:
            if not self._num_left(0):
                raise UsageError(f"there is no sample to look at: {self._where(start)}")
            taken = min(num_samples - len(found), self._num_left(start))
            if taken:
                found += self._order(self.seed, epoch)[start : start + taken].tolist()
            epoch, start = epoch + 1, 0
        return found

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
        self.start_index = self._first_index = state_dict["start_index"]
        self._epoch_is_known, self._epoch_is_chosen = True, False
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
        check_count("seed", state_dict["seed"], low=0)
        check_count("epoch", state_dict["epoch"], low=0)
        check_count("start_index", state_dict["start_index"], low=0, high=self.num_samples)

    def watch_random_state(self, tell: Callable[[str], None]) -> None:
        """Tell, at the next iteration, if a loader has drawn from torch's random state as it is now.

        A resume calls it, after it restored the random state: `iter(DataLoader(...))` without a `generator` draws a
        base seed from it, and a run that goes on in the middle of an epoch draws one more than the uninterrupted one.

        Args:
            tell: called with one sentence, at most once.
        """
        self._restored = torch.get_rng_state(), tell

    def _open(self, share: _Share) -> None:
        """Note that an iteration begins.

        Raises:
            UsageError: it has no sample, and nobody asked for it.
        """
        if share.num_left == 0 and not (self._epoch_is_chosen and self._num_left(0)):
            raise UsageError(f"nothing is left to iterate over: {self._where(share.start_index)}")
        self._epoch_is_known, self._epoch_is_chosen = True, False
        restored, self._restored = self._restored, None
        if restored is not None and share.start_index > 0 and _base_seeds_were_drawn(restored[0]):
            restored[1](
                "a DataLoader drew its base seed from torch's global random state after that was restored, in the "
                "middle of an epoch: this run draws other random numbers (dropout, sampled tokens) than an "
                "uninterrupted one; give the loader to Booster.boost, to shardpoint.data.with_own_generator, or a "
                "generator= of its own"
            )

    def _where(self, start_index: int) -> str:
        """Say what a position means, and what to do where too little is left."""
        if not self._num_left(0):
            drops = self.drop_last and self.num_samples > 0
            why = f" fills no batch of {self.batch_size} with drop_last" if drops else " is empty"
            return f"a data set of {self.num_samples} samples{why}"
        return (
            f"epoch {self.epoch} has {self._num_left(0)} samples in batches of {self.batch_size}, and start_index is "
            f"{start_index}; where the epoch is finished go on with set_epoch({self.epoch + 1}), else give "
            "set_start_index the samples that the whole job has consumed in this epoch: step * batch_size"
        )

    def check_iteration(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what an iterator's `load_state_dict` would refuse, without loading it.

        Raises:
            UsageError: the fields are not those, or it was on another number of ranks, or with another micro-batch
                size, and stopped in the middle of a micro-batch.
        """
        if set(state_dict) != _SHARE_FIELDS:
            fields = sorted(state_dict, key=str)
            raise UsageError(f"an iteration's state has the fields {sorted(_SHARE_FIELDS)}, this one has {fields}")
        for name in sorted(_SHARE_FIELDS):
            check_count(name, state_dict[name], low=1 if name in {"num_replicas", "micro_batch_size"} else 0)
        dealt = state_dict["num_replicas"], state_dict["micro_batch_size"]
        if dealt != (self.num_replicas, self.micro_batch_size) and state_dict["num_yielded"] % dealt[1]:
            raise UsageError(
                f"the iteration stopped after {state_dict['num_yielded']} samples of each of {dealt[0]} ranks, in the "
                f"middle of a micro-batch of {dealt[1]}: resume it on {dealt[0]} ranks with micro_batch_size={dealt[1]}"
            )

    def _num_left(self, start_index: int) -> int:
        """Count the samples from an index to the end, over all ranks, that will be yielded."""
        left = max(self.num_samples - start_index, 0)
        return left - left % self.batch_size if self.drop_last else left

    def _micro_batch(self, turn: int, num_left: int) -> range:
        """Return this rank's micro-batch of a round, counted from where the iteration starts.

        With `pad` the last one may go over the end, where the epoch's first samples are repeated.
        """
        begin_of_round = turn * self.micro_batch_size * self.num_replicas
        rest = num_left - begin_of_round
        if self.pad and 0 < rest < self.micro_batch_size * self.num_replicas:
            size = -(-rest // self.num_replicas)
            begin = begin_of_round + self.rank * size
            return range(begin, begin + size)
        begin = begin_of_round + self.rank * self.micro_batch_size
        return range(begin, max(begin, min(begin + self.micro_batch_size, num_left)))

    def _order(self, seed: int, epoch: int) -> torch.Tensor:
        """Return an epoch's order of all samples as int64 `[num_samples]`."""
        if self._cached_order is not None and self._cached_order[0] == (seed, epoch):
            return self._cached_order[1]
        if self.shuffle:
            # Hashed, not added: with seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
            digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
            generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))
            order = torch.randperm(self.num_samples, generator=generator, device="cpu")
        else:
            order = torch.arange(self.num_samples, device="cpu")
        if epoch == self.epoch:  # the next one is peeked at, and would push this one out
            self._cached_order = (seed, epoch), order
        return order


class _Share(Iterator[int]):
    """One rank's samples of one iteration, in micro-batches; it can go on where a saved one was.

    With `state_dict` and `load_state_dict` it is what torchdata calls `Stateful`.
    """

    def __init__(self, sampler: StatefulDistributedSampler) -> None:
        self._sampler = sampler
        self._seed, self._epoch = sampler.seed, sampler.epoch
        self.start_index = sampler.start_index
        self._num_yielded = 0
        self._num_loads = 0
        self._order: torch.Tensor | None = None
        self._micro_batch: list[int] = []

    @property
    def num_left(self) -> int:
        """The samples from where it started to the end of the epoch, over all ranks."""
        return self._sampler._num_left(self.start_index)  # noqa: SLF001 - the sampler's own iterator

    def __next__(self) -> int:
        sampler = self._sampler
        if self._order is None:
            sampler._open(self)  # noqa: SLF001 - as above
            self._order = sampler._order(self._seed, self._epoch)  # noqa: SLF001 - as above
            self._num_loads = sampler._num_loads  # noqa: SLF001 - as above
        if self._num_loads != sampler._num_loads:  # noqa: SLF001 - as above
            text = (
                "this iterator was made before the sampler's position was restored, so it goes on from the old one: "
                "make a new iterator of the DataLoader after the resume"
            )
            raise ResumeMismatchError(text, differences=["data: an iterator from before the resume"])
        turn, within = divmod(self._num_yielded, sampler.micro_batch_size)
        if not within or not self._micro_batch:
            own = sampler._micro_batch(turn, self.num_left)  # noqa: SLF001 - as above
            self._micro_batch = self._order[
                [(self.start_index + index) % sampler.num_samples for index in own]
            ].tolist()
        if within >= len(self._micro_batch):
            raise StopIteration
        self._num_yielded += 1
        return self._micro_batch[within]

    def state_dict(self) -> dict[str, int]:
        """Return where it started, and how many samples this rank has had since."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "start_index": self.start_index,
            "num_replicas": self._sampler.num_replicas,
            "micro_batch_size": self._sampler.micro_batch_size,
            "num_yielded": self._num_yielded,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another one was, on any number of ranks.

        Raises:
            UsageError: as `check_iteration` does.
        """
        self._sampler.check_iteration(state_dict)
        num_replicas, micro_batch_size = state_dict["num_replicas"], state_dict["micro_batch_size"]
        start, num_yielded = state_dict["start_index"], state_dict["num_yielded"]
        if (num_replicas, micro_batch_size) != (self._sampler.num_replicas, self._sampler.micro_batch_size):
            start, num_yielded = min(start + num_yielded * num_replicas, self._sampler.num_samples), 0
        self._seed, self._epoch = state_dict["seed"], state_dict["epoch"]
        self.start_index, self._num_yielded = start, num_yielded
        self._order, self._micro_batch = self._sampler._order(self._seed, self._epoch), []  # noqa: SLF001 - as above
        self._num_loads = self._sampler._num_loads  # noqa: SLF001 - as above


def _base_seeds_were_drawn(before: torch.Tensor) -> bool:
    """Tell whether torch's random state is what some loaders' base seeds made of an earlier one."""
    now = torch.get_rng_state()
    probe = torch.Generator(device="cpu")
    probe.set_state(before)
    for _ in range(_MAX_LOADERS):
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=probe)
        if torch.equal(probe.get_state(), now):
            return True
    return False


def _plain(value: Any) -> Any:
    """Return an integer of another library as Python's own; anything else as it is."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def check_count(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Raise UsageError unless a value is an integer of the range, both ends included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an integer, not {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {value}; it must be {wanted}")
