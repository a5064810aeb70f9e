"""What has reached one rank of a round's votes, and what it hands on of them.

Invariant: a rank's vote is in one place only. It is in the tally of the rank itself, then in that of whoever took it; a
bundle names as orphans those that its rank did not take. So at the root each rank's vote is counted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from shardpoint.comm.votes import MAX_TRACEBACKS, Bundle, Done, Failed, Share, checked_bytes
from shardpoint.errors import DistributedError

Merge = Callable[[Sequence[bytes]], bytes]


class Tally:
    """The votes that have reached a rank, by the rank that sent them.

    Args:
        awaited: the ranks whose votes or bundles are still to come.
    """

    def __init__(self, awaited: Iterable[int]) -> None:
        self._children = tuple(awaited)
        self._received: dict[int, Done | Failed | Bundle] = {}
        self._settled: tuple[list[Share], dict[int, Failed]] | None = None
        self.lost: dict[int, str] = {}

    @property
    def awaited(self) -> list[int]:
        """The ranks that are, or were, waited for: the children, and those whom one of these did not take."""
        orphans = [rank for vote in self._received.values() if isinstance(vote, Bundle) for rank in vote.orphans]
        return [*self._children, *orphans]

    @property
    def pending(self) -> list[int]:
        """The ranks that are waited for."""
        return [rank for rank in self.awaited if rank not in self._received]

    def add(self, rank: int, vote: Done | Failed | Bundle) -> Sequence[int]:
        """Count what a rank sent; return the ranks that must be waited for in its place."""
        if isinstance(vote, Bundle):
            self.lost.update(vote.lost)
        # Order: one step counts a vote, all else follows: an interruption finds it counted, or still pending.
        self._received[rank] = vote
        return vote.orphans if isinstance(vote, Bundle) else ()

    @property
    def failed(self) -> dict[int, Failed]:
        """The votes of the ranks whose work raised, ascending."""
        return self._results()[1]

    @property
    def shares(self) -> list[Share]:
        """The votes of the ranks whose work succeeded, by lowest rank."""
        return self._results()[0]

    def _results(self) -> tuple[list[Share], dict[int, Failed]]:
        if self._settled is not None:
            return self._settled
        shares: list[Share] = []
        failed: dict[int, Failed] = {}
        for rank, vote in self._received.items():
            if isinstance(vote, Done):
                shares.append(Share(vote.topic, [rank], vote.payload))
            elif isinstance(vote, Failed):
                failed[rank] = vote
            else:
                shares += vote.shares
                failed.update(vote.failed)
        return sorted(shares, key=lambda share: share.ranks[0]), dict(sorted(failed.items()))

    def topics(self) -> dict[int, str]:
        """Return every rank's topic, ascending by rank."""
        shares, failed = self._results()
        told = {rank: vote.topic for rank, vote in failed.items()}
        told.update({rank: share.topic for share in shares for rank in share.ranks})
        return dict(sorted(told.items()))

    def settle(self, merge: Merge | None) -> None:
        """Make one share of all that came, if the round can still succeed; nothing more is added afterwards.

        If it cannot, what was voted matters no more, only who voted in which round, and who failed how.

        Raises:
            TypeError: `merge` returned something other than bytes.
            Exception: what `merge` raised.
        """
        shares, failed = self._results()
        if failed or len({share.topic for share in shares}) > 1:
            self._settled = _emptied(shares), _shortened(failed)
        elif merge is not None and len(shares) > 1:
            payload = checked_bytes(merge([share.payload for share in shares]), "merge")
            ranks = sorted(rank for share in shares for rank in share.ranks)
            self._settled = [Share(shares[0].topic, ranks, payload)], failed

    def fail(self, rank: int, vote: Failed) -> None:
        """Replace a rank's own vote, which was that it succeeded; nothing more is added afterwards."""
        shares, failed = self._results()
        kept = [Share(share.topic, [other for other in share.ranks if other != rank], b"") for share in shares]
        failed = dict(sorted({**failed, rank: vote}.items()))
        self._settled = _emptied([share for share in kept if share.ranks]), _shortened(failed)

    def handed_on(self) -> Done | Failed | Bundle:
        """Return what the rank sends: a rank that stands for itself alone sends its vote as it is."""
        shares, failed = self._results()
        orphans = self.pending
        if not orphans and not self.lost and len(shares) + len(failed) == 1:
            if failed:
                return next(iter(failed.values()))
            if len(shares[0].ranks) == 1:
                return Done(topic=shares[0].topic, payload=shares[0].payload)
        return Bundle(shares, list(failed.items()), self.lost, orphans)

    def check_whole(self, world_size: int) -> None:
        """Check that each rank's vote is here exactly once.

        Raises:
            DistributedError: it is not: the ranks do not agree on the tree.
        """
        counted = [*self.failed, *(rank for share in self.shares for rank in share.ranks)]
        if sorted(counted) != list(range(world_size)):
            text = f"of {world_size} ranks the votes of {len(set(counted))} came, {len(counted)} in all: give every "
            text += "rank the same fan-out, and run one release of shardpoint on all of them"
            raise DistributedError(text)


def _emptied(shares: Sequence[Share]) -> list[Share]:
    ranks_of: dict[str, list[int]] = {}
    for share in shares:
        ranks_of.setdefault(share.topic, []).extend(share.ranks)
    return [Share(topic, sorted(ranks), b"") for topic, ranks in ranks_of.items()]


def _shortened(failed: Mapping[int, Failed]) -> dict[int, Failed]:
    """Drop the tracebacks that the error will not have: it has those of the lowest failing ranks."""
    return {
        rank: vote if place < MAX_TRACEBACKS else Failed(vote.topic, vote.type, vote.message, "", vote.ours)
        for place, (rank, vote) in enumerate(failed.items())
    }
