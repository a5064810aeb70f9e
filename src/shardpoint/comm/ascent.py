"""How do the votes of a round come up to one rank, whatever carries them?

Votes travel up a tree (`Tree`), the verdict goes from the coordinator to all. What holds however the tree looks:

- A rank takes the votes of its children, adds its own, and hands all on as one bundle, under its own key. It removes
  what it took only after that, so wherever a rank stops, each vote is still under some key.
- A rank that stops in the middle on its own account (an interruption) hands on what it has and names the rest: its
  parent takes those votes itself. One that stops for good has handed on nothing: its parent names it lost, asks its
  children for what they know of others that are lost, and hands that on at once. So a rank is only ever called lost by
  one that waited for it, and the ranks below a lost one are not.
- A rank that waits for someone alive shows progress, so that nobody above gives it up for the slowness of one below.
  Each level has a little more patience than the one below, so that it is the rank itself that is named, not who waited
  for it.
- While it waits, a rank looks for the verdict too: it may come early, from a coordinator that was interrupted or knows
  that others are lost.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from shardpoint.comm.liveness import Beat, Watch
from shardpoint.comm.tally import Merge, Tally
from shardpoint.comm.tree import FANOUT, Tree
from shardpoint.comm.votes import COORDINATOR, MAX_NAMED, decode_vote, encode, rank_names
from shardpoint.errors import CheckpointError, CollectiveTimeout, DistributedError, UsageError


@dataclass(frozen=True, slots=True)
class Round:
    """A round, as one rank takes part in it."""

    number: int
    topic: str
    work: Callable[[], bytes]
    merge: Merge | None
    tally: Tally
    watch: Watch


class Ascent(ABC):
    """Bring votes to a rank, over a transport that only posts and fetches bytes.

    Every method that a transport adds is called from the thread that runs the round or closes the comm. A transport
    raises `DistributedError` when it is gone for good, and nothing else.

    Args:
        rank: this rank.
        world_size: how many ranks there are.
        silence_s: seconds without a beat after which a rank is dead.
        stall_s: seconds without progress after which a rank is stalled.
        look_s: seconds between two looks at the beats.
        fanout: of how many ranks, at most, one rank takes the votes; the same on all ranks.

    Raises:
        UsageError: `fanout` is less than 1.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        silence_s: float,
        stall_s: float,
        look_s: float,
        fanout: int = FANOUT,
    ) -> None:
        if fanout < 1:
            text = f"one rank takes the votes of at least 1 other, not of {fanout}: give a larger fanout"
            raise UsageError(text)
        self.rank = rank
        self.world_size = world_size
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._look_s = look_s
        self._next_round = 0
        self._heard = -1
        self._posted_verdict = -1
        self._tree = Tree(world_size, fanout)
        self._uncollected: list[tuple[int, int]] = []
        self._lost_ranks: set[int] = set()
        self._broken: str | None = None
        self._moved = 0
        self._moved_lock = threading.Lock()
        self._in_round = threading.Lock()

    # What a transport adds.

    @abstractmethod
    def _post_vote(self, number: int, vote: bytes) -> None:
        """Send this rank's vote, or what it hands on with it, to whoever fetches it."""

    @abstractmethod
    def _fetch_vote(self, number: int, rank: int) -> bytes | None:
        """Return a rank's vote, or None while it is not there; it stays there."""

    @abstractmethod
    def _remove_vote(self, number: int, rank: int) -> None:
        """Remove a rank's vote, if it is there."""

    @abstractmethod
    def _post_verdict(self, number: int, verdict: bytes) -> None:
        """Send the verdict to every rank; on the coordinator only."""

    @abstractmethod
    def _fetch_verdict(self, number: int) -> bytes | None:
        """Return the verdict, or None while it is not there."""

    @abstractmethod
    def _retire(self, number: int) -> None:
        """Remove what rounds before `number` left: every rank has voted in `number`; on the coordinator only."""

    @abstractmethod
    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """Return the newest beat of each of these ranks that was ever heard of."""

    @abstractmethod
    def _pause(self, waited_s: float) -> None:
        """Wait a moment (0.5 s at most) for news, after `waited_s` seconds of waiting for one vote or verdict."""

    @abstractmethod
    def _announce(self) -> None:
        """Make this rank's `_beat()` known soon, without waiting and without raising."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group (see `Comm.close`)."""

    # What the transports share.

    @property
    def is_coordinator(self) -> bool:
        """Say whether this rank decides."""
        return self.rank == COORDINATOR

    def progress(self, num_bytes: int) -> None:
        """Report that this rank moved bytes (see `Comm.progress`)."""
        with self._moved_lock:
            self._moved += max(0, num_bytes)

    def _beat(self, count: int) -> Beat:
        return Beat(count=count, moved=self._moved, heard=self._heard, left=self._broken)

    def _watch(self, ranks: Iterable[int], levels: int) -> Watch:
        """Watch ranks that may wait for others, over so many levels: who is below gets to say who is lost there."""
        stall_s = self._stall_s + levels * (2 * self._look_s + 1.0)
        return Watch(ranks, silence_s=self._silence_s, stall_s=stall_s, look_s=self._look_s)

    def _gather(self, told: Round, coordinator: Watch | None) -> bytes | None:
        """Take the votes of this rank's children, until all are there or someone is lost (`tally.lost` says who).

        Args:
            told: the round.
            coordinator: watches the coordinator; None there.

        Returns:
            None; or the verdict, where that came first.

        Raises:
            CollectiveTimeout: the coordinator is lost.
        """
        tally = told.tally
        try:
            while (pending := tally.pending) and not tally.lost:
                rank, since = pending[0], time.monotonic()
                while not self._take(told, rank):
                    self._refuse_if_broken(told.topic)
                    verdict = None if coordinator is None else self._look_up(told, coordinator)
                    if verdict is not None:
                        self._leave_behind(told)
                        return verdict
                    if told.watch.is_due():
                        self._judge(told)
                    if tally.lost or rank not in tally.pending:
                        break
                    self._pause(time.monotonic() - since)
        except CheckpointError:
            raise
        except BaseException:
            if coordinator is not None:
                # Interrupted: this rank has voted, and so have those whose votes it took. Its parent takes the rest.
                self._hand_on(told)
            raise
        return None

    def _take(self, told: Round, rank: int) -> bool:
        """Take a rank's vote, if it is there, and wait for those that it could not take."""
        vote = self._fetch_vote(told.number, rank)
        if vote is None:
            return False
        orphans = told.tally.add(rank, decode_vote(vote))
        told.watch.forget(rank)
        for orphan in orphans:
            told.watch.add(orphan)
        self.progress(1)
        return True

    def _judge(self, told: Round) -> None:
        """Look at the ranks that have not voted, and note who is lost."""
        tally = told.tally
        for rank in tally.pending:
            if self._tree.children(rank):
                self._take(told, rank)  # it may tell of a lost rank, long before those ahead of it have voted
        lost, moved = told.watch.look(self._beats(tally.pending))
        for rank in list(lost):
            # Order: a rank that voted and was lost afterwards has voted.
            if self._take(told, rank):
                del lost[rank]
        tally.lost.update(lost)
        below = [child for rank in lost for child in self._tree.children(rank)]
        while below:
            # In the place of a lost rank: what its children know, and which of them left too.
            rank = below.pop()
            if self._take(told, rank):
                continue
            beat = self._beats([rank]).get(rank)
            if beat is not None and beat.left is not None:
                tally.lost[rank] = f"left: {beat.left}"
                below += self._tree.children(rank)
        if moved:
            self.progress(1)  # who waits for this rank must see that it waits for someone alive

    def _hand_on(self, told: Round) -> None:
        """Send this rank's vote, with those that it took."""
        self._post_vote(told.number, encode(told.tally.handed_on()))
        # Order: only now, when what was taken is in this rank's own vote.
        self._clear(told)

    def _clear(self, told: Round) -> None:
        """Remove what was taken and, once all below this rank have voted, what earlier rounds left behind there."""
        pending = told.tally.pending
        for rank in told.tally.awaited:
            if rank not in pending:
                self._remove_vote(told.number, rank)
        if not pending:
            for old, rank in self._uncollected:
                self._remove_vote(old, rank)
            self._uncollected.clear()

    def _leave_behind(self, told: Round) -> None:
        """Note that this round ended before all votes were taken: they are removed when those ranks vote again."""
        self._uncollected += [(told.number, rank) for rank in told.tally.awaited]

    def _look_up(self, told: Round, coordinator: Watch) -> bytes | None:
        """Return the verdict, if it is there.

        Raises:
            CollectiveTimeout: the coordinator is lost.
        """
        verdict = self._fetch_verdict(told.number)
        if verdict is not None or not coordinator.is_due():
            return verdict
        lost, _moved = coordinator.look(self._beats([COORDINATOR]))
        if lost:
            # Order: a coordinator that decided and was lost afterwards has decided.
            verdict = self._fetch_verdict(told.number)
            if verdict is None:
                self._time_out(told.topic, lost)
        return verdict

    def _await_verdict(self, told: Round, coordinator: Watch) -> bytes:
        """Return the verdict (raises as `_look_up`)."""
        since = time.monotonic()
        while True:
            verdict = self._look_up(told, coordinator)
            if verdict is not None:
                return verdict
            self._refuse_if_broken(told.topic)
            self._pause(time.monotonic() - since)

    def _time_out(self, topic: str, lost: Mapping[int, str]) -> NoReturn:
        ranks = sorted(lost)
        reasons = "; ".join(f"rank {rank} {lost[rank]}" for rank in ranks[:MAX_NAMED])
        noun = "rank" if len(ranks) == 1 else "ranks"
        text = f"{topic}: waited in vain for {noun} {rank_names(ranks)} of {self.world_size}: {reasons}"
        raise CollectiveTimeout(text, waiting_for=ranks)

    def _refuse_if_broken(self, topic: str) -> None:
        if self._broken is not None:
            text = f"{topic}: this comm can be used no more: {self._broken}"
            raise DistributedError(text)
