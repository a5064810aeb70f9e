"""Do votes and verdicts come out as they went in, and is what is no vote refused?"""

from __future__ import annotations

import msgspec
import pytest

from shardpoint.comm.votes import (
    Agreed,
    Done,
    EachItsOwn,
    Failed,
    Raised,
    decode_verdict,
    decode_vote,
    encode,
    failed_vote,
)
from shardpoint.errors import DistributedError


@pytest.mark.parametrize(
    "vote", [Done("t", b"\x00\xff"), Failed(topic="t", type="E", message="m", traceback="tb", ours=False)]
)
def test_a_vote_comes_out_as_it_went_in(vote: Done | Failed) -> None:
    assert decode_vote(encode(vote)) == vote


@pytest.mark.parametrize("verdict", [Agreed(b"\x80"), Raised({"type": "E", "details": {"n": 2**60}}), EachItsOwn()])
def test_a_verdict_comes_out_as_it_went_in(verdict: Agreed | Raised | EachItsOwn) -> None:
    assert decode_verdict(encode(verdict)) == verdict


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x80\x04.", msgspec.msgpack.encode(["odd", "t", b""]), encode(EachItsOwn())]
)
def test_what_is_no_vote_is_refused(data: bytes) -> None:
    with pytest.raises(DistributedError, match="one release"):
        decode_vote(data)


def test_a_message_that_is_no_text_travels_escaped() -> None:
    assert failed_vote("t", OSError("no such file: a\udcffb")).message == "no such file: a\\udcffb"
    vote = failed_vote("t\t", OSError("\udcff"))
    assert decode_vote(encode(vote)) == vote
