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
) -> Verdict:
    """Run one round with typed ballots and a typed verdict.

    Args:
        comm: the ranks.
        topic: for errors; the same on all ranks.
        work: this rank's part; a finding that it raises becomes its ballot.
        ballot_type: a msgspec-encodable type.
        decide: runs on the coordinator with all ballots in rank order.
        verdict_type: a msgspec-encodable type.

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
            return b"-" + msgspec.json.encode(to_fields(error))

    def judge(votes: Sequence[bytes]) -> bytes:
        for ballot in votes:
            if ballot[:1] == b"-":
                fields: dict[str, Any] = msgspec.json.decode(ballot[1:])
                raise revive(fields)
        ballots = [msgspec.msgpack.decode(ballot[1:], type=ballot_type) for ballot in votes]
        return msgspec.msgpack.encode(decide(ballots))

    return msgspec.msgpack.decode(comm.agree(topic, vote, judge), type=verdict_type)


def with_modified_target(error: CheckpointError) -> CheckpointError:
    """Return a finding that says that bytes of the target had changed already."""
    if isinstance(error, CorruptionError):
        error.target_modified = True
    return error
