"""How does a round of voting go, whatever carries the votes?

`RoundComm.agree` holds the rules of `Comm.agree` once. A transport (threads in one process, a c10d store) only moves
bytes: it posts and fetches votes and verdicts, and says which signs of life it has seen.

The rules, in short: one vote from every rank, one verdict from the coordinator. A rank that has voted does nothing on
its own account until it hears the verdict, or sees that the coordinator is lost. How the votes come to the coordinator
is in `comm/ascent.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shardpoint.comm.ascent import Ascent, Round
from shardpoint.comm.tally import Merge, Tally
from shardpoint.comm.votes import (
    COORDINATOR,
    Agreed,
    Done,
    EachItsOwn,
    Raised,
    checked_bytes,
    decode_verdict,
    encode,
    failed_vote,
    peer_error,
    raised_verdict,
)
from shardpoint.errors import CheckpointError, CollectiveTimeout, DistributedError, PeerError, UsageError, revive


def agree_alone(work: Callable[[], bytes], decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
    """Run a round in a group of one rank: errors are raised as they are."""
    return checked_bytes(decide([checked_bytes(work(), "work")]), "decide")


class RoundComm(Ascent):
    """Run the rounds of a `Comm` over a transport that only posts and fetches bytes; see `Ascent` for the arguments."""

    def agree(
        self,
        topic: str,
        work: Callable[[], bytes],
        decide: Callable[[Sequence[bytes]], bytes],
        merge: Merge | None = None,
    ) -> bytes:
        """Run one collective round (see `Comm.agree`)."""
        if not self._in_round.acquire(blocking=False):
            text = f"{topic}: another round is running on this comm; one comm serves one thread at a time"
            raise UsageError(text)
        try:
            self._refuse_if_broken(topic)
            if self.world_size == 1:
                return agree_alone(work, decide)
            children = self._tree.children(self.rank)
            watch = self._watch(children, max(map(self._tree.levels_below, children), default=0))
            told = Round(self._next_round, topic, work, merge, Tally(children), watch)
            self._next_round += 1
            return self._lead(told, decide) if self.is_coordinator else self._follow(told)
        finally:
            self._in_round.release()

    def _follow(self, told: Round) -> bytes:
        """Take part in a round as a rank that does not decide."""
        topic = told.topic
        caught = self._vote(told)
        with self._breaking(topic):
            try:
                verdict, caught = self._send_and_hear(told, caught)
                self._has_heard(told.number)
            except CollectiveTimeout:
                raise
            except DistributedError as error:
                # What carries the votes is gone, and the coordinator with it, as far as this rank can ever know.
                text = f"{topic}: rank {self.rank} can no longer reach the coordinator: {error}"
                raise CollectiveTimeout(text, waiting_for=[COORDINATOR]) from error
        if caught is not None and (verdict is None or _interrupts(caught)):
            raise caught
        assert verdict is not None  # noqa: S101 - only an interruption does without
        outcome = decode_verdict(verdict)
        if isinstance(outcome, Agreed):
            return outcome.payload
        if isinstance(outcome, Raised):
            raised = revive(outcome.fields)
            if isinstance(raised, CollectiveTimeout):
                self._break(str(raised))
            raise raised from caught
        if caught is None:
            text = f"{topic}: the verdict is that every rank failed, but rank {self.rank} did not"
            raise DistributedError(text)
        raise caught

    def _send_and_hear(self, told: Round, caught: BaseException | None) -> tuple[bytes | None, BaseException | None]:
        """Hand on the votes from this rank's part of the tree, and hear the verdict.

        Returns:
            The verdict, or None where this rank was interrupted and waits for none; what its work or `merge` raised.
        """
        coordinator = self._watch([COORDINATOR], self._tree.levels_below(COORDINATOR))
        if not _interrupts(caught):
            verdict = self._gather(told, coordinator)
            if verdict is not None:
                return verdict, caught
            caught = caught or self._settle(told)
        # An interrupted rank takes no votes: its parent does.
        self._hand_on(told)
        return None if _interrupts(caught) else self._await_verdict(told, coordinator), caught

    def _lead(self, told: Round, decide: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """Take part in a round as the coordinator."""
        number, topic, tally = told.number, told.topic, told.tally
        caught = self._vote(told)
        if caught is not None and _interrupts(caught):
            # The others must know now, not when the slowest of them has voted.
            self._leave_behind(told)
            self._conclude(number, topic, raised_verdict(topic, self.world_size, self._alone_failed(topic, caught)))
            raise caught
        with self._breaking(topic):
            try:
                self._gather(told, None)
                if tally.lost:
                    self._time_out(topic, tally.lost)
            except CollectiveTimeout as error:
                # Order: the verdict first. A rank that sees the coordinator leave without one would blame rank 0.
                self._lost_ranks.update(error.waiting_for)
                self._conclude(number, topic, raised_verdict(topic, self.world_size, error))
                raise error from caught
            self._clear(told)
            self._retire(number)
            tally.check_whole(self.world_size)
        caught = caught or self._settle(told)
        refusal = self._refusal(topic, tally)
        if refusal is not None:
            self._conclude(number, topic, raised_verdict(topic, self.world_size, refusal))
            if caught is not None and _interrupts(caught):
                raise caught
            raise refusal from caught
        if caught is not None and len(tally.failed) == self.world_size:
            self._conclude(number, topic, EachItsOwn())
            raise caught
        return self._decide(number, topic, [share.payload for share in tally.shares], decide)

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

    def _vote(self, told: Round) -> BaseException | None:
        """Do this rank's work, and count its vote; return what the work raised."""
        caught: BaseException | None = None
        self.progress(1)
        try:
            told.tally.add(self.rank, Done(topic=told.topic, payload=checked_bytes(told.work(), "work")))
        except BaseException as error:  # noqa: BLE001 - it is voted, and raised again when the round ends
            caught = error
            told.tally.add(self.rank, failed_vote(told.topic, error))
        self.progress(1)
        return caught

    def _settle(self, told: Round) -> BaseException | None:
        """Merge what this rank has gathered; return what that raised, which is this rank's vote then."""
        if told.tally.lost:
            return None
        try:
            told.tally.settle(told.merge)
        except BaseException as error:  # noqa: BLE001 - it is voted, and raised again when the round ends
            told.tally.fail(self.rank, failed_vote(told.topic, error))
            return error
        self.progress(1)
        return None

    def _refusal(self, topic: str, tally: Tally) -> CheckpointError | None:
        """Return the error that all ranks raise for these votes; None where `decide` runs or each raises its own."""
        apart = {rank: other for rank, other in tally.topics().items() if other != topic}
        if apart:
            rank, other = next(iter(apart.items()))
            text = f"the ranks are in different rounds: the coordinator in {topic!r}, rank {rank} in {other!r}"
            return DistributedError(text)
        failed = tally.failed
        alike = {(vote.type, vote.message, vote.ours) for vote in failed.values()}
        if not failed or (len(failed) == self.world_size and len(alike) == 1 and failed[COORDINATOR].ours):
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

    def _peers(self) -> range:
        return range(1, self.world_size)

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


def _interrupts(error: BaseException | None) -> bool:
    """Say whether an error ends more than the round: KeyboardInterrupt, SystemExit."""
    return error is not None and not isinstance(error, Exception)
