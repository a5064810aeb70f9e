"""What may the engine ask of a group of ranks? The `Comm` protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Comm(Protocol):
    """Let the ranks of a group agree on one outcome, or all fail with one error.

    There is one operation, `agree`: a round in which every rank works and votes, and the coordinator decides. No rank
    leaves a round believing something else than the others, short of the coordinator's death (see `agree`).

    Attributes:
        rank: this process's rank in this group, from 0.
        world_size: how many ranks the group has.
    """

    rank: int
    world_size: int

    @property
    def is_coordinator(self) -> bool:
        """Say whether this rank decides: True on rank 0 of the group, and nowhere else."""

    def agree(
        self,
        topic: str,
        work: Callable[[], bytes],
        decide: Callable[[Sequence[bytes]], bytes],
        merge: Callable[[Sequence[bytes]], bytes] | None = None,
    ) -> bytes:
        """Run one collective round: every rank works, the coordinator decides, every rank gets the verdict.

        `work()` runs on every rank; what it returns, or the error that it raises, is the rank's *vote*. When no vote is
        an error, the coordinator runs `decide(votes)`, and what that returns is the *verdict*. A round has no deadline:
        it goes on for as long as every rank that is waited for shows signs of life and of progress.

        Votes may travel to the coordinator over other ranks. With `merge` these make one payload of several on the way,
        so that no rank ever handles more than a few; `decide` then gets one payload, in which all are merged.

        Args:
            topic: what the round is about, in a word or two. It stands in every error's message, and must be the same
                on all ranks: ranks that meet in one round with different topics all fail.
            work: this rank's part. Long work should report what it moved through `progress`.
            decide: runs on the coordinator alone: without `merge` with all votes in the order of the ranks, with it
                with a list of one, what `merge` made of all of them. (A single vote is not merged: in a group of one
                rank `decide` gets it as it is.)
            merge: makes one payload of two or more, each of which is a vote or was merged itself. It must be
                associative and commutative, for votes are merged in any grouping and order; it runs on any rank, and
                only while no vote is an error. Where it raises, that rank failed, as if its `work` had raised. What
                must be refused is better kept for `decide` to see. Given on all ranks, or on none.

        Returns:
            The verdict, the same bytes on every rank.

        Raises:
            PeerError: the `work` of at least one rank raised, or `decide` raised something other than a
                `CheckpointError`. All ranks raise it with the same `failures`; where the original error was raised it
                is the `__cause__`.
            CheckpointError: what `decide` raised: the same class with the same attributes on every rank. Also what
                `work` raised where *every* rank's `work` raised the same class with the same message: then each rank
                raises its own.
            CollectiveTimeout: ranks died, left, or made no progress, while others waited for them; `waiting_for` names
                them. The comm is broken from here on. If `waiting_for` contains 0, this rank voted and never
                heard the verdict: **the coordinator may have decided**. If it does not, the coordinator said so
                itself, and `decide` did not run.
            DistributedError: the comm is broken or closed, the topics differ, or what carries the votes is gone.
            UsageError: another round is running on this comm, in another thread or around this call.
            BaseException: `work` or `decide` was interrupted (KeyboardInterrupt, SystemExit). The others get a
                `PeerError` that names this rank; here the interruption goes on as it is. An interrupted `decide` may
                have decided: who cannot afford that doubt turns the interruption into an error that says so.

        In a group of one rank the errors of `work` and `decide` are raised as they are.

        Collective:
            All ranks of the group, in the same order of rounds, each from one thread at a time: one round.
        """

    def progress(self, num_bytes: int) -> None:
        """Report that this rank moved bytes, so that the others know it to be busy and not stalled.

        Cheap, from any thread, at any time. A long operation that moves no bytes (one fsync, one large hash) counts as
        one step: report its bytes when it is done.

        Args:
            num_bytes: how many bytes were moved since the last report; at least 1 to count.
        """

    def close(self) -> None:
        """Leave the group: stop what runs in the background, and remove what this comm left behind, as far as it can.

        Closing twice does nothing. A peer that waits for a rank that has left fails at once with `CollectiveTimeout`.

        Collective:
            All ranks should close, in any order. No rank waits for the others' close; the coordinator lingers for a
            few seconds at most, until the others have heard the last verdict.
        """
