"""What ranks say to one another in a round: small typed messages, and findings that all ranks raise alike.

An unexpected error of one rank is a `PeerError` everywhere. A *finding* about the checkpoint (it is corrupt, it does
not fit) is the same class with the same attributes on every rank, whichever rank found it: it travels as a vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from shardpoint.comm import Comm
from shardpoint.errors import (
    CheckpointError,
    CorruptionError,
    MismatchError,
    NotFoundError,
    ResumeMismatchError,
    SaveCancelledError,
    TornCheckpointError,
    TornSnapshotError,
    UnsupportedFormatError,
    revive,
    to_fields,
)

FINDINGS = (
    CorruptionError,
    MismatchError,
    NotFoundError,
    ResumeMismatchError,
    SaveCancelledError,
    TornCheckpointError,
    TornSnapshotError,
    UnsupportedFormatError,
)

Ballot = TypeVar("Ballot")
Verdict = TypeVar("Verdict")


def agree(
    comm: Comm,
    topic: str,
    work: Callable[[], Ballot],
    ballot_type: type[Ballot],
    decide: Callable[[Sequence[Ballot]], Verdict],
    verdict_type: type[Verdict],
    merge: Callable[[Sequence[Ballot]], Ballot] | None = None,
) -> Verdict:
    """Run one round with typed ballots and a typed verdict.

    Args:
        comm: the ranks.
        topic: for errors; the same on all ranks.
        work: this rank's part; a finding that it raises becomes its ballot.
        ballot_type: a msgspec-encodable type.
        decide: runs on the coordinator: without `merge` with all ballots in rank order, with it with one.
        verdict_type: a msgspec-encodable type.
        merge: makes one ballot of two or more; associative and commutative, on any rank (see `Comm.agree`).

    Raises:
        CheckpointError: the lowest rank's finding, on every rank; or as `Comm.agree` says.

    Collective:
        All ranks: one round.
    """

    def vote() -> bytes:
        try:
            return b"+" + msgspec.msgpack.encode(work())
        except FINDINGS as error:
            if comm.world_size == 1:
                raise
            return b"-" + msgspec.json.encode((comm.rank, to_fields(error)))

    def ballots_of(votes: Sequence[bytes]) -> list[Ballot]:
        return [msgspec.msgpack.decode(ballot[1:], type=ballot_type) for ballot in votes]

    def judge(votes: Sequence[bytes]) -> bytes:
        finding = _lowest_finding(votes)
        if finding is not None:
            fields: dict[str, Any] = _found(finding)[1]
            raise revive(fields)
        return msgspec.msgpack.encode(decide(ballots_of(votes)))

    def merge_votes(votes: Sequence[bytes]) -> bytes:
        assert merge is not None  # noqa: S101 - handed on only then
        return _lowest_finding(votes) or b"+" + msgspec.msgpack.encode(merge(ballots_of(votes)))

    verdict = comm.agree(topic, vote, judge, None if merge is None else merge_votes)
    return msgspec.msgpack.decode(verdict, type=verdict_type)


def _found(vote: bytes) -> tuple[int, dict[str, Any]]:
    return msgspec.json.decode(vote[1:], type=tuple[int, dict[str, Any]])


def _lowest_finding(votes: Sequence[bytes]) -> bytes | None:
    """Return the vote of the lowest rank among those that found something; None where none did."""
    return min((vote for vote in votes if vote[:1] == b"-"), key=lambda vote: _found(vote)[0], default=None)


def with_modified_target(error: CheckpointError) -> CheckpointError:
    """Return a finding that says that bytes of the target had changed already."""
    if isinstance(error, CorruptionError):
        error.target_modified = True
    return error
