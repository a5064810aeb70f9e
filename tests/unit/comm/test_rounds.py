"""Do all ranks of a round end alike, whoever fails, and however?"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest

from shardpoint.comm import Comm, SoloComm, in_process_comms
from shardpoint.errors import (
    ChecksumError,
    CollectiveTimeout,
    CommitUnknownError,
    DistributedError,
    Failure,
    MismatchError,
    PeerError,
    StorageError,
    UsageError,
)
from tests.unit.comm.threads import refuse_to_decide, run_threads


def name_rank(comm: Comm) -> bytes:
    return b"rank %d" % comm.rank


def fail_on(ranks: set[int], error: BaseException | type[BaseException], comm: Comm) -> bytes:
    if comm.rank in ranks:
        raise error
    return name_rank(comm)


def join(votes: Sequence[bytes]) -> bytes:
    return b" | ".join(votes)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_gets_what_the_coordinator_made_of_all_votes(world_size: int) -> None:
    expected = b" | ".join(b"rank %d" % rank for rank in range(world_size))
    got = run_threads(in_process_comms(world_size), lambda comm: comm.agree("names", lambda: name_rank(comm), join))
    assert got == [expected] * world_size


def test_decide_runs_on_the_coordinator_alone() -> None:
    deciders: list[str] = []

    def decide(_votes: Sequence[bytes]) -> bytes:
        deciders.append(threading.current_thread().name)
        return b"v"

    def rank_main(comm: Comm) -> bytes:
        threading.current_thread().name = f"rank {comm.rank}"
        return comm.agree("t", lambda: b"", decide)

    assert run_threads(in_process_comms(3), rank_main) == [b"v"] * 3
    assert deciders == ["rank 0"]


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 2}, {1, 2}])
def test_a_failing_rank_fails_all_with_the_same_error(failing: set[int]) -> None:
    originals = {rank: ValueError(f"disk of {rank}") for rank in failing}

    def rank_main(comm: Comm) -> bytes:
        return comm.agree(
            "write", lambda: fail_on(failing, originals.get(comm.rank, ValueError), comm), refuse_to_decide
        )

    errors = run_threads(in_process_comms(3), rank_main)
    assert [type(error) for error in errors] == [PeerError] * 3
    assert {rank: (f.type, f.message) for rank, f in errors[0].failures.items()} == {
        rank: ("ValueError", f"disk of {rank}") for rank in failing
    }
    assert all(error.failures == errors[0].failures and str(error) == str(errors[0]) for error in errors)
    assert "write" in str(errors[0])
    assert f"rank {min(failing)} of 3" in str(errors[0])
    assert all("fail_on" in failure.traceback for failure in errors[0].failures.values())
    assert [error.__cause__ for error in errors] == [originals.get(rank) for rank in range(3)]


def test_where_all_ranks_fail_alike_each_raises_its_own() -> None:
    originals = [MismatchError("no such tensor: a", missing=[f"a{rank}"]) for rank in range(3)]
    errors = run_threads(
        in_process_comms(3),
        lambda comm: comm.agree("match", lambda: fail_on({0, 1, 2}, originals[comm.rank], comm), join),
    )
    assert all(error is original for error, original in zip(errors, originals, strict=True))


@pytest.mark.parametrize(
    "originals",
    [
        [StorageError("full"), StorageError("full: other text")],
        [StorageError("full"), UsageError("full")],
        [OSError("full"), OSError("full")],
    ],
    ids=["other message", "other class", "not ours"],
)
def test_where_all_ranks_fail_but_not_alike_all_raise_a_peer_error(originals: list[Exception]) -> None:
    errors = run_threads(
        in_process_comms(2), lambda comm: comm.agree("t", lambda: fail_on({0, 1}, originals[comm.rank], comm), join)
    )
    assert [type(error) for error in errors] == [PeerError] * 2
    assert [sorted(error.failures) for error in errors] == [[0, 1]] * 2
    assert [error.__cause__ for error in errors] == originals


@pytest.mark.parametrize(
    "decided",
    [
        MismatchError("differs", missing=["a", "b"], unexpected=["c"], mismatched=["d: [2] is not [3]"]),
        ChecksumError("rot", key="modeling/x#w", expected="00", actual="01", target_modified=True),
        StorageError("disk", key="k", op="rename", errno=28),
        CommitUnknownError("fsync of the root failed", attempt_id="abc"),
        PeerError("nested", failures={1: Failure("OSError", "m", "t")}),
        DistributedError("a path \udcff that is no text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_coordinators_error_is_raised_everywhere_with_its_attributes(decided: Any) -> None:
    def refuse(_votes: Sequence[bytes]) -> NoReturn:
        raise decided

    errors = run_threads(in_process_comms(3), lambda comm: comm.agree("commit", lambda: b"", refuse))
    assert errors[0] is decided
    for error in errors[1:]:
        assert type(error) is type(decided)
        assert error.details() == decided.details()
        assert str(error) == str(decided).replace("\udcff", "\\udcff")


def test_a_foreign_error_of_decide_is_a_failure_of_the_coordinator() -> None:
    original = KeyError("plan")

    def refuse(_votes: Sequence[bytes]) -> NoReturn:
        raise original

    errors = run_threads(in_process_comms(2), lambda comm: comm.agree("plan", lambda: b"", refuse))
    assert [type(error) for error in errors] == [PeerError] * 2
    assert [{rank: f.type for rank, f in error.failures.items()} for error in errors] == [{0: "KeyError"}] * 2
    assert [error.__cause__ for error in errors] == [original, None]


def test_an_error_whose_attributes_cannot_travel_still_fails_every_rank() -> None:
    decided = DistributedError("odd")
    decided.details = lambda: {"what": object()}  # type: ignore[method-assign]

    def refuse(_votes: Sequence[bytes]) -> NoReturn:
        raise decided

    errors = run_threads(in_process_comms(2), lambda comm: comm.agree("t", lambda: b"", refuse))
    assert errors[0] is decided
    assert type(errors[1]) is PeerError
    assert errors[1].failures[0].message == "odd"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("interrupted", [0, 1])
def test_an_interruption_goes_on_here_and_fails_the_others(interrupted: int, interruption: type[BaseException]) -> None:
    comms = in_process_comms(3)
    errors = run_threads(
        comms, lambda comm: comm.agree("t", lambda: fail_on({interrupted}, interruption, comm), refuse_to_decide)
    )
    assert type(errors.pop(interrupted)) is interruption
    assert [type(error) for error in errors] == [PeerError] * 2
    assert [list(error.failures) for error in errors] == [[interrupted]] * 2
    # Nobody is out of step: the next round goes well.
    assert run_threads(comms, lambda comm: comm.agree("next", lambda: b"", lambda _: b"v")) == [b"v"] * 3
    assert not comms[0]._room.votes  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["work", "decide"])
def test_what_is_not_bytes_is_a_failure(stage: str) -> None:
    answer: Any = "text"

    def rank_main(comm: Comm) -> bytes:
        work = (lambda: answer) if stage == "work" and comm.rank == 0 else (lambda: b"")
        return comm.agree("t", work, lambda _: answer)

    errors = run_threads(in_process_comms(2), rank_main)
    assert [type(error) for error in errors] == [PeerError] * 2
    assert errors[1].failures[0].type == "TypeError"
    assert f"`{stage}`" in errors[1].failures[0].message


def test_ranks_that_meet_in_different_rounds_all_fail() -> None:
    comms = in_process_comms(3)

    def rank_main(comm: Comm) -> bytes:
        return comm.agree("commit" if comm.rank == 1 else "open", lambda: b"", refuse_to_decide)

    errors = run_threads(comms, rank_main)
    assert [type(error) for error in errors] == [DistributedError] * 3
    assert all("'open'" in str(error) and "'commit'" in str(error) and "rank 1" in str(error) for error in errors)


def test_a_failure_does_not_break_the_comm() -> None:
    comms = in_process_comms(2)
    run_threads(comms, lambda comm: comm.agree("t", lambda: fail_on({1}, ValueError, comm), refuse_to_decide))
    assert run_threads(comms, lambda comm: comm.agree("t", lambda: name_rank(comm), join)) == [b"rank 0 | rank 1"] * 2


def test_a_round_inside_a_round_is_refused() -> None:
    comms = in_process_comms(2)
    errors = run_threads(
        comms,
        lambda comm: comm.agree("outer", lambda: comm.agree("inner", lambda: b"", lambda _: b""), refuse_to_decide),
    )
    assert [type(error) for error in errors] == [UsageError] * 2


def test_alone_the_errors_are_raised_as_they_are() -> None:
    original = KeyError("x")

    def fail(*_votes: Any) -> NoReturn:
        raise original

    for comm in [SoloComm(), in_process_comms(1)[0]]:
        assert comm.is_coordinator
        with pytest.raises(KeyError) as caught:
            comm.agree("t", fail, refuse_to_decide)
        assert caught.value is original
        with pytest.raises(KeyError) as caught:
            comm.agree("t", lambda: b"", fail)
        assert caught.value is original
        comm.close()
        with pytest.raises(DistributedError, match="closed"):
            comm.agree("t", lambda: b"", lambda _: b"")


def test_the_tracebacks_of_many_failures_are_cut() -> None:
    errors = run_threads(
        in_process_comms(40), lambda comm: comm.agree("t", lambda: fail_on(set(range(1, 40)), ValueError, comm), join)
    )
    failures = errors[39].failures
    assert sorted(failures) == list(range(1, 40))
    assert sum(bool(failure.traceback) for failure in failures.values()) == 16
    assert all(error.failures == failures for error in errors)
    assert len(str(errors[0])) < 500


def test_many_rounds_stay_in_step_and_leave_nothing_behind() -> None:
    comms = in_process_comms(4)

    def as_json(votes: Sequence[bytes]) -> bytes:
        return b"[" + b",".join(votes) + b"]"

    def one_round(comm: Comm, number: int) -> Any:
        return json.loads(comm.agree(f"{number}", lambda: b"%d" % (number * comm.rank), as_json))

    def rank_main(comm: Comm) -> list[Any]:
        return [one_round(comm, number) for number in range(200)]

    assert run_threads(comms, rank_main) == [[[n * rank for rank in range(4)] for n in range(200)]] * 4
    room = comms[0]._room  # type: ignore[attr-defined]
    assert not room.votes
    assert len(room.verdicts) == 1


def test_a_verdict_that_cannot_be_sent_stands_where_it_was_made() -> None:
    comms = in_process_comms(2, look_s=0.01)

    def lose(_number: int, _verdict: bytes) -> None:
        raise DistributedError("the store is gone")

    comms[0]._post_verdict = lose  # type: ignore[attr-defined]
    kept, lost = run_threads(comms, lambda comm: comm.agree("commit", lambda: b"", lambda _: b"committed"))
    assert kept == b"committed"
    assert type(lost) is CollectiveTimeout
    assert lost.waiting_for == [0]
    with pytest.raises(DistributedError, match="the store is gone"):
        comms[0].agree("next", lambda: b"", lambda _: b"")
