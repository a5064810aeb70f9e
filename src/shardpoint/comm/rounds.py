"""How does a round of voting go, whatever carries the votes?

`RoundComm.agree` holds the rules of `Comm.agree` once. A transport (threads in one process, a c10d store) only moves
bytes: it posts and fetches votes and verdicts, and says which signs of life it has seen.

The rules, in short: one vote from every rank, one verdict from the coordinator. A rank that has voted does nothing on
its own account until it hears the verdict, or sees that the coordinator is lost.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from shardpoint.comm.liveness import Beat, Watch
from shardpoint.comm.votes import (
    COORDINATOR,
    MAX_NAMED,
    Agreed,
    Done,
    EachItsOwn,
    Failed,
    Raised,
    checked_bytes,
    decode_verdict,
    decode_vote,
    encode,
    failed_vote,
    peer_error,
    raised_verdict,
    rank_names,
)
from shardpoint.errors import CheckpointError, CollectiveTimeout, DistributedError, PeerError, UsageError, revive


def agree_alone(work: Callable[[], bytes], decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
    """Run a round in a group of one rank: errors are raised as they are."""
    return checked_bytes(decide([checked_bytes(work(), "work")]), "decide")


class RoundComm(ABC):
    """Run the rounds of a `Comm` over a transport that only posts and fetches bytes.

    Every method that a transport adds is called from the thread that runs the round or closes the comm. A transport
    raises `DistributedError` when it is gone for good, and nothing else.

    Args:
        rank: this rank.
        world_size: how many ranks there are.
        silence_s: seconds without a beat after which a rank is dead.
        stall_s: seconds without progress after which a rank is stalled.
        look_s: seconds between two looks at the beats.
    """

    def __init__(self, rank: int, world_size: int, *, silence_s: float, stall_s: float, look_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._look_s = look_s
        self._next_round = 0
        self._heard = -1
        self._posted_verdict = -1
        self._uncollected: list[int] = []
        self._lost_ranks: set[int] = set()
        self._broken: str | None = None
        self._moved = 0
        self._moved_lock = threading.Lock()
        self._in_round = threading.Lock()

    # What a transport adds.

    @abstractmethod
    def _post_vote(self, number: int, vote: bytes) -> None:
        """Send this rank's vote to the coordinator."""

    @abstractmethod
    def _fetch_vote(self, number: int, rank: int) -> bytes | None:
        """Return a rank's vote and remove it, or None while it is not there; on the coordinator only."""

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

    def agree(self, topic: str, work: Callable[[], bytes], decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """Run one collective round (see `Comm.agree`)."""
        if not self._in_round.acquire(blocking=False):
            text = f"{topic}: another round is running on this comm; one comm serves one thread at a time"
            raise UsageError(text)
        try:
            self._refuse_if_broken(topic)
            if self.world_size == 1:
                return agree_alone(work, decide)
            number = self._next_round
            self._next_round += 1
            return self._lead(number, topic, work, decide) if self.is_coordinator else self._follow(number, topic, work)
        finally:
            self._in_round.release()

    def _beat(self, count: int) -> Beat:
        return Beat(count=count, moved=self._moved, heard=self._heard, left=self._broken)

    def _follow(self, number: int, topic: str, work: Callable[[], bytes]) -> bytes:
        """Take part in a round as a rank that does not decide."""
        vote, caught = self._vote(topic, work)
        with self._breaking(topic):
            try:
                self._post_vote(number, vote)
                if caught is not None and not isinstance(caught, Exception):
                    self._has_heard(number)
                else:
                    verdict = self._await_verdict(number, topic)
                    self._has_heard(number)
            except CollectiveTimeout:
                raise
            except DistributedError as error:
                # What carries the votes is gone, and the coordinator with it, as far as this rank can ever know.
                text = f"{topic}: rank {self.rank} can no longer reach the coordinator: {error}"
                raise CollectiveTimeout(text, waiting_for=[COORDINATOR]) from error
        if caught is not None and not isinstance(caught, Exception):
            raise caught
        outcome = decode_verdict(verdict)
        if isinstance(outcome, Agreed):
            return outcome.payload
        if isinstance(outcome, Raised):
            told = revive(outcome.fields)
            if isinstance(told, CollectiveTimeout):
                self._break(str(told))
            raise told from caught
        if caught is None:
            text = f"{topic}: the verdict is that every rank failed, but rank {self.rank} did not"
            raise DistributedError(text)
        raise caught

    def _lead(
        self, number: int, topic: str, work: Callable[[], bytes], decide: Callable[[Sequence[bytes]], bytes]
    ) -> bytes:
        """Take part in a round as the coordinator."""
        vote, caught = self._vote(topic, work)
        if caught is not None and not isinstance(caught, Exception):
            # Interrupted: the others must know now, not when the slowest of them has voted.
            self._uncollected.append(number)
            self._conclude(number, topic, raised_verdict(topic, self.world_size, self._alone_failed(topic, caught)))
            raise caught
        with self._breaking(topic):
            try:
                votes = [decode_vote(data) for data in self._collect(number, topic, vote)]
            except CollectiveTimeout as error:
                # Order: the verdict first. A rank that sees the coordinator leave without one would blame rank 0.
                self._lost_ranks.update(error.waiting_for)
                self._conclude(number, topic, raised_verdict(topic, self.world_size, error))
                raise error from caught
        refusal = self._refusal(topic, votes)
        if refusal is not None:
            self._conclude(number, topic, raised_verdict(topic, self.world_size, refusal))
            raise refusal from caught
        if caught is not None and all(isinstance(vote, Failed) for vote in votes):
            self._conclude(number, topic, EachItsOwn())
            raise caught
        return self._decide(number, topic, [vote.payload for vote in votes if isinstance(vote, Done)], decide)

    def _decide(
        self, number: int, topic: str, votes: Sequence[bytes], decide: Callable[[Sequence[bytes]], bytes]
    ) -> bytes:
        try:
            payload = checked_bytes(decide(votes), "decide")
        except CheckpointError as error:
            self._conclude(number, topic, raised_verdict(topic, self.world_size, error))
            raise
        except BaseException as error:
            told = self._alone_failed(topic, error)
            self._conclude(number, topic, raised_verdict(topic, self.world_size, told))
            if isinstance(error, Exception):
                raise told from error
            raise
        self._conclude(number, topic, Agreed(payload))
        return payload

    def _vote(self, topic: str, work: Callable[[], bytes]) -> tuple[bytes, BaseException | None]:
        caught: BaseException | None = None
        self.progress(1)
        try:
            vote = encode(Done(topic=topic, payload=checked_bytes(work(), "work")))
        except BaseException as error:  # noqa: BLE001 - it is voted, and raised again when the round ends
            caught = error
            vote = encode(failed_vote(topic, error))
        self.progress(1)
        return vote, caught

    def _refusal(self, topic: str, votes: Sequence[Done | Failed]) -> CheckpointError | None:
        """Return the error that all ranks raise for these votes; None where `decide` runs or each raises its own."""
        apart = {rank: vote.topic for rank, vote in enumerate(votes) if vote.topic != topic}
        if apart:
            rank, other = next(iter(apart.items()))
            text = f"the ranks are in different rounds: the coordinator in {topic!r}, rank {rank} in {other!r}"
            return DistributedError(text)
        failed = {rank: vote for rank, vote in enumerate(votes) if isinstance(vote, Failed)}
        alike = {(vote.type, vote.message, vote.ours) for vote in failed.values()}
        if not failed or (len(failed) == len(votes) and len(alike) == 1 and failed[COORDINATOR].ours):
            return None
        return peer_error(topic, self.world_size, failed)

    def _alone_failed(self, topic: str, error: BaseException) -> PeerError:
        return peer_error(topic, self.world_size, {self.rank: failed_vote(topic, error)})

    def _conclude(self, number: int, topic: str, verdict: Agreed | Raised | EachItsOwn) -> None:
        """Send the verdict.

        When that fails the decision stands all the same, and what was decided (committed, perhaps) is what this rank
        reports: the comm is broken, and its next round says so. The others cannot hear the verdict, and time out.
        """
        try:
            with self._breaking(topic):
                self._post_verdict(number, encode(verdict))
                self._posted_verdict = number
                self._has_heard(number)
        except DistributedError:
            return

    def _collect(self, number: int, topic: str, own: bytes) -> list[bytes]:
        """Return all votes in the order of the ranks.

        Raises:
            CollectiveTimeout: ranks that have not voted are lost.
        """
        votes = {self.rank: own}
        watch = Watch(self._peers(), silence_s=self._silence_s, stall_s=self._stall_s, look_s=self._look_s)
        for rank in self._peers():
            since = time.monotonic()
            while rank not in votes and not self._take(number, rank, votes, watch):
                self._refuse_if_broken(topic)
                if watch.is_due():
                    self._judge(number, topic, votes, watch)
                self._pause(time.monotonic() - since)
        self._retire(number)
        for old in self._uncollected:
            for rank in self._peers():
                self._fetch_vote(old, rank)
        self._uncollected.clear()
        return [votes[rank] for rank in range(self.world_size)]

    def _take(self, number: int, rank: int, votes: dict[int, bytes], watch: Watch) -> bool:
        """Take a rank's vote, if it is there."""
        vote = self._fetch_vote(number, rank)
        if vote is None:
            return False
        votes[rank] = vote
        watch.forget(rank)
        self.progress(1)
        return True

    def _judge(self, number: int, topic: str, votes: dict[int, bytes], watch: Watch) -> None:
        """Look at the ranks that have not voted, and give up if any is lost."""
        lost, moved = watch.look(self._beats([rank for rank in self._peers() if rank not in votes]))
        for rank in list(lost):
            # Order: a rank that voted and was lost afterwards has voted.
            if self._take(number, rank, votes, watch):
                del lost[rank]
        if lost:
            self._time_out(topic, lost)
        if moved:
            self.progress(1)  # who waits for the coordinator must see that it waits for someone alive

    def _await_verdict(self, number: int, topic: str) -> bytes:
        """Return the verdict.

        Raises:
            CollectiveTimeout: the coordinator is lost.
        """
        # The coordinator counts as stalled a little later than anyone that it waits for: it gets to say who that is.
        stall_s = self._stall_s + 2 * self._look_s + 1.0
        watch = Watch([COORDINATOR], silence_s=self._silence_s, stall_s=stall_s, look_s=self._look_s)
        since = time.monotonic()
        while True:
            verdict = self._fetch_verdict(number)
            if verdict is not None:
                return verdict
            self._refuse_if_broken(topic)
            if watch.is_due():
                lost, _moved = watch.look(self._beats([COORDINATOR]))
                if lost:
                    # Order: a coordinator that decided and was lost afterwards has decided.
                    verdict = self._fetch_verdict(number)
                    if verdict is None:
                        self._time_out(topic, lost)
                    return verdict
            self._pause(time.monotonic() - since)

    def _peers(self) -> range:
        return range(1, self.world_size)

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

    def _has_heard(self, number: int) -> None:
        self._heard = number
        self._announce()

    def _break(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason
            self._announce()

    @contextmanager
    def _breaking(self, topic: str) -> Iterator[None]:
        """Break the comm when what is done inside raises: this rank then cannot know where the others are."""
        try:
            yield
        except BaseException as error:
            self._break(str(error) if isinstance(error, CheckpointError) else f"{topic}: {type(error).__name__}")
            raise
