"""How are votes and verdicts written down, and which error do failed votes add up to?

They are msgpack, in the array form of the structs below; nothing that travels is executable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shardpoint.errors import CheckpointError, DistributedError, Failure, PeerError, to_fields

COORDINATOR = 0
MAX_TRACEBACKS = 16  # every rank reads every failure: with 1,000 failing ranks, 8,000 characters from each are too many
MAX_NAMED = 8  # a message names this many ranks; the error's attributes name all


class Done(msgspec.Struct, frozen=True, array_like=True, tag_field="outcome", tag="done"):
    """The vote of a rank whose work succeeded."""

    topic: str
    payload: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag_field="outcome", tag="failed"):
    """The vote of a rank whose work raised.

    Attributes:
        ours: True when the error is a `CheckpointError`.
    """

    topic: str
    type: str
    message: str
    traceback: str
    ours: bool


class Share(msgspec.Struct, frozen=True, array_like=True):
    """What ranks whose work succeeded voted, in one.

    Attributes:
        topic: of their round.
        ranks: whose votes these are.
        payload: their payloads, merged; empty where the round fails in any case.
    """

    topic: str
    ranks: list[int]
    payload: bytes


class Bundle(msgspec.Struct, frozen=True, array_like=True, tag_field="outcome", tag="bundle"):
    """What a rank hands on: its own vote and those that it took, each rank's exactly once.

    Attributes:
        shares: of the ranks whose work succeeded.
        failed: the others' votes.
        lost: ranks that were waited for in vain, with the reasons; the round fails, and nobody need wait any longer.
        orphans: ranks whose votes this rank should have taken and did not: whoever reads this takes them.
    """

    shares: list[Share]
    failed: list[tuple[int, Failed]]
    lost: dict[int, str]
    orphans: list[int]


class Agreed(msgspec.Struct, frozen=True, array_like=True, tag="agreed"):
    """The verdict of a round that succeeded."""

    payload: bytes


class Raised(msgspec.Struct, frozen=True, array_like=True, tag="raised"):
    """The verdict that all ranks raise this error: what `errors.to_fields` returned."""

    fields: dict[str, Any]


class EachItsOwn(msgspec.Struct, frozen=True, array_like=True, tag="own"):
    """The verdict of a round in which every rank failed alike: each raises what its own work raised."""


def encode(value: msgspec.Struct) -> bytes:
    """Return a vote, a verdict or a beat as bytes."""
    return msgspec.msgpack.encode(value)


def decode(data: bytes, kind: Any) -> Any:
    """Return what `encode` was given.

    Raises:
        DistributedError: the bytes are something else: the ranks run different releases.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        text = f"a peer sent what this release does not read ({error}); run one release of shardpoint on every rank"
        raise DistributedError(text) from error


def decode_vote(data: bytes) -> Done | Failed | Bundle:
    """Return what a rank voted, or handed on (raises as `decode`)."""
    vote: Done | Failed | Bundle = decode(data, Done | Failed | Bundle)
    return vote


def decode_verdict(data: bytes) -> Agreed | Raised | EachItsOwn:
    """Return what the coordinator decided (raises as `decode`)."""
    verdict: Agreed | Raised | EachItsOwn = decode(data, Agreed | Raised | EachItsOwn)
    return verdict


def _printable(value: Any) -> Any:
    """Return JSON values whose texts are valid Unicode: a path may hold surrogates, which msgpack refuses."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


def failed_vote(topic: str, error: BaseException) -> Failed:
    """Return the vote of a rank whose work raised `error`."""
    failure = Failure.of(error)
    return Failed(
        topic=topic,
        type=failure.type,
        message=_printable(failure.message),
        traceback=_printable(failure.traceback),
        ours=isinstance(error, CheckpointError),
    )


def peer_error(topic: str, world_size: int, failed: Mapping[int, Failed]) -> PeerError:
    """Return the error that all ranks raise when those in `failed` did."""
    ranks = sorted(failed)
    failures = {
        rank: Failure(
            type=failed[rank].type,
            message=failed[rank].message,
            traceback=failed[rank].traceback if position < MAX_TRACEBACKS else "",
        )
        for position, rank in enumerate(ranks)
    }
    first = failures[ranks[0]]
    others = "" if len(ranks) == 1 else f" (and ranks {rank_names(ranks[1:])}: see .failures)"
    text = f"{topic}: rank {ranks[0]} of {world_size} failed{others}: {first.type}: {first.message}"
    return PeerError(text, failures=failures)


def rank_names(ranks: Sequence[int]) -> str:
    """Return ranks as a text: the first few, and how many more."""
    shown = ", ".join(str(rank) for rank in ranks[:MAX_NAMED])
    return shown if len(ranks) <= MAX_NAMED else f"{shown} and {len(ranks) - MAX_NAMED} more"


def raised_verdict(topic: str, world_size: int, error: CheckpointError) -> Raised:
    """Return the verdict that everybody raises `error`, or a `PeerError` where its attributes cannot travel."""
    verdict = Raised(_printable(to_fields(error)))
    try:
        encode(verdict)
    except (TypeError, ValueError, OverflowError):
        verdict = Raised(_printable(to_fields(peer_error(topic, world_size, {COORDINATOR: failed_vote(topic, error)}))))
    return verdict


def checked_bytes(value: Any, source: str) -> bytes:
    """Return what `work` or `decide` returned, if it is bytes; otherwise raise TypeError."""
    if not isinstance(value, bytes | bytearray | memoryview):
        text = f"`{source}` must return bytes, not {type(value).__name__}"
        raise TypeError(text)
    return bytes(value)
