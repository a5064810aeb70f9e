"""Is each vote counted once, and does a bundle say all that the parent must know?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shardpoint.comm.tally import Tally
from shardpoint.comm.votes import Bundle, Done, Failed, Share, decode_vote, encode
from shardpoint.errors import DistributedError


def failure(number: int, topic: str = "t") -> Failed:
    return Failed(topic=topic, type="E", message=f"m{number}", traceback=f"tb{number}", ours=False)


def sorted_letters(payloads: Sequence[bytes]) -> bytes:
    return bytes(sorted(b"".join(payloads)))


def test_a_rank_alone_sends_its_vote_as_it_is() -> None:
    tally = Tally([])
    tally.add(3, Done("t", b"a"))
    tally.settle(sorted_letters)
    assert tally.handed_on() == Done("t", b"a")
    tally = Tally([])
    tally.add(3, failure(3))
    assert tally.handed_on() == failure(3)


def test_votes_are_merged_into_one_share_and_kept_apart_without_a_merge() -> None:
    for merge, shares in (
        (sorted_letters, [Share("t", [1, 3, 4], b"abc")]),
        (None, [Share("t", [1], b"b"), Share("t", [3], b"a"), Share("t", [4], b"c")]),
    ):
        tally = Tally([3, 4])
        tally.add(4, Done("t", b"c"))
        tally.add(1, Done("t", b"b"))
        assert tally.pending == [3]
        tally.add(3, Done("t", b"a"))
        assert tally.pending == []
        tally.settle(merge)
        assert decode_vote(encode(tally.handed_on())) == Bundle(shares, [], {}, [])


def test_where_one_failed_nothing_is_merged_and_only_failures_travel() -> None:
    tally = Tally([3, 4])
    tally.add(1, Done("t", b"large"))
    tally.add(3, failure(3))
    tally.add(4, Bundle([Share("t", [9], b"large")], [(10, failure(10))], {}, []))
    tally.settle(lambda _: pytest.fail("it was merged"))
    assert tally.handed_on() == Bundle([Share("t", [1, 9], b"")], [(3, failure(3)), (10, failure(10))], {}, [])


def test_other_topics_are_not_merged_and_stay_known() -> None:
    tally = Tally([3])
    tally.add(1, Done("t", b"a"))
    tally.add(3, Done("u", b"a"))
    tally.settle(lambda _: pytest.fail("it was merged"))
    assert tally.topics() == {1: "t", 3: "u"}


def test_the_tracebacks_of_the_lowest_failing_ranks_travel() -> None:
    tally = Tally(range(1, 40))
    for rank in reversed(range(40)):
        tally.add(rank, failure(rank))
    tally.settle(None)
    assert [bool(vote.traceback) for vote in tally.failed.values()] == [True] * 16 + [False] * 24
    assert [vote.message for vote in tally.failed.values()] == [f"m{rank}" for rank in range(40)]


def test_who_could_not_take_a_vote_names_it_and_it_is_waited_for() -> None:
    tally = Tally([3, 4])
    tally.add(1, failure(1))
    bundle = tally.handed_on()
    assert isinstance(bundle, Bundle)
    assert bundle.orphans == [3, 4]
    above = Tally([1, 2])
    assert above.add(1, bundle) == [3, 4]
    assert above.pending == [2, 3, 4]
    above.add(3, Done("t", b""))
    assert above.pending == [2, 4]
    assert above.awaited == [1, 2, 3, 4]


def test_a_failed_merge_is_the_failure_of_who_merged() -> None:
    tally = Tally([3])
    tally.add(1, Done("t", b"a"))
    tally.add(3, Done("t", b"b"))
    tally.fail(1, failure(1))
    assert tally.handed_on() == Bundle([Share("t", [3], b"")], [(1, failure(1))], {}, [])


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2, 2], [0, 1, 3]])
def test_votes_that_are_missing_or_come_twice_are_noticed(ranks: list[int]) -> None:
    tally = Tally([9])
    tally.add(9, Bundle([Share("t", ranks, b"")], [], {}, []))
    with pytest.raises(DistributedError, match="same fan-out"):
        tally.check_whole(3)
    Tally([]).check_whole(0)
