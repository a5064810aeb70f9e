"""Do typed ballots merge on the way, and is a finding the same on all ranks, whoever found it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from shardpoint.comm import Comm, SoloComm, in_process_comms
from shardpoint.engine.ballots import agree
from shardpoint.errors import ChecksumError, MismatchError, PeerError
from tests.unit.comm.threads import run_threads


class Count(msgspec.Struct, frozen=True):
    ranks: list[int]


class Total(msgspec.Struct, frozen=True):
    ranks: list[int]
    num_ballots: int


def merged(ballots: Sequence[Count]) -> Count:
    return Count([rank for ballot in ballots for rank in ballot.ranks])


def total(ballots: Sequence[Count]) -> Total:
    return Total(sorted(merged(ballots).ranks), len(ballots))


@pytest.mark.parametrize("world_size", [2, 9])
@pytest.mark.parametrize("merge, num_ballots", [(None, None), (merged, 1)])
def test_decide_gets_every_ballot_or_one_that_is_all(world_size: int, merge: Any, num_ballots: int | None) -> None:
    def rank_main(comm: Comm) -> Total:
        return agree(comm, "t", lambda: Count([comm.rank]), Count, total, Total, merge)

    expected = Total(list(range(world_size)), num_ballots or world_size)
    assert run_threads(in_process_comms(world_size, fanout=2), rank_main) == [expected] * world_size


def test_a_process_alone_decides_on_its_own_ballot() -> None:
    assert agree(SoloComm(), "t", lambda: Count([0]), Count, total, Total, merged) == Total([0], 1)


@pytest.mark.parametrize("merge", [None, merged])
@pytest.mark.parametrize("finders", [[0], [3], [8], [2, 7], [8, 5, 1]])
def test_the_lowest_ranks_finding_is_raised_on_all(merge: Any, finders: list[int]) -> None:
    def rank_main(comm: Comm) -> Total:
        def work() -> Count:
            if comm.rank in finders:
                raise ChecksumError(f"rank {comm.rank} found rot", key="k", expected="0", actual=f"{comm.rank}")
            return Count([comm.rank])

        return agree(comm, "t", work, Count, total, Total, merge)

    errors = run_threads(in_process_comms(9, fanout=2), rank_main)
    assert [type(error) for error in errors] == [ChecksumError] * 9
    assert [error.actual for error in errors] == [f"{min(finders)}"] * 9


def test_an_unexpected_error_beats_a_finding() -> None:
    def rank_main(comm: Comm) -> Total:
        def work() -> Count:
            raise MismatchError("differs") if comm.rank == 1 else OSError("no disk")

        return agree(comm, "t", work, Count, total, Total, merged)

    errors = run_threads(in_process_comms(4, fanout=2), rank_main)
    assert [type(error) for error in errors] == [PeerError] * 4
    assert [sorted(error.failures) for error in errors] == [[0, 2, 3]] * 4
