"""Do all ranks end alike when votes travel up a tree, whoever fails, stops, or is slow in it?

The trees are those of fan-out 2: rank 0 takes the votes of 1 and 2, 1 those of 3 and 4, 2 those of 5 and 6, 3 those of
7 and 8, and so on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shardpoint.comm import Comm, in_process_comms
from shardpoint.comm.tree import Tree
from shardpoint.errors import CollectiveTimeout, DistributedError, MismatchError, PeerError, UsageError
from tests.unit.comm.threads import DEADLINE_S, refuse_to_decide, run_threads


def number_of(comm: Comm) -> bytes:
    return b"%d" % comm.rank


def numbers(votes: Sequence[bytes]) -> bytes:
    """Merge sets of numbers, whatever their order, and refuse to see one twice."""
    listed = [int(number) for vote in votes for number in vote.split()]
    assert len(set(listed)) == len(listed)
    return b" ".join(b"%d" % number for number in sorted(listed))


def all_numbers(world_size: int) -> bytes:
    return b" ".join(b"%d" % rank for rank in range(world_size))


def votes_left(comms: Sequence[Comm]) -> Any:
    return comms[0]._room.votes  # type: ignore[attr-defined]


def failing(ranks: Sequence[int], comm: Comm, error: Callable[[str], BaseException] = ValueError) -> bytes:
    if comm.rank in ranks:
        raise error(f"disk of {comm.rank}")
    return number_of(comm)


@pytest.mark.parametrize("fanout", [1, 2, 3])
@pytest.mark.parametrize("world_size", range(2, 21))
def test_decide_gets_all_votes_in_order_or_one_that_is_all(world_size: int, fanout: int) -> None:
    comms = in_process_comms(world_size, fanout=fanout)
    seen: list[list[bytes]] = []

    def decide(votes: Sequence[bytes]) -> bytes:
        seen.append(list(votes))
        return b"verdict"

    def rank_main(comm: Comm) -> list[bytes]:
        return [comm.agree("t", lambda: number_of(comm), decide, merge) for merge in (None, numbers, None)]

    assert run_threads(comms, rank_main) == [[b"verdict"] * 3] * world_size
    in_order = [b"%d" % rank for rank in range(world_size)]
    assert seen == [in_order, [all_numbers(world_size)], in_order]
    assert not votes_left(comms)


def test_no_rank_takes_more_votes_than_the_fanout_and_its_own() -> None:
    sizes: list[int] = []

    def merge(votes: Sequence[bytes]) -> bytes:
        sizes.append(len(votes))
        return numbers(votes)

    comms = in_process_comms(20, fanout=3)
    got = run_threads(comms, lambda comm: comm.agree("t", lambda: number_of(comm), lambda votes: votes[0], merge))
    assert got == [all_numbers(20)] * 20
    assert sorted(sizes) == [2, 4, 4, 4, 4, 4, 4]  # 19 votes are handed on; ranks 0 to 5 take three each, rank 6 one


def test_a_tree_without_branches_is_refused() -> None:
    with pytest.raises(UsageError, match="fanout"):
        in_process_comms(3, fanout=0)


def test_ranks_that_do_not_agree_on_the_tree_decide_nothing() -> None:
    comms: list[Any] = list(in_process_comms(7, fanout=2, look_s=0.01))
    comms[1]._tree = Tree(7, 100)  # it takes no votes, so those of 3 and 4 come to nobody
    errors = run_threads(comms, lambda comm: comm.agree("t", lambda: number_of(comm), refuse_to_decide, numbers))
    assert type(errors[0]) is DistributedError
    assert "of 7 ranks the votes of 5 came" in str(errors[0])
    assert [error.waiting_for for error in errors[1:]] == [[0]] * 6


@pytest.mark.parametrize("ranks", [[0], [1], [3], [9], [1, 4], [0, 2, 6], [1, 3, 7], [8, 9]])
@pytest.mark.parametrize("merge", [None, numbers])
def test_failing_ranks_are_named_on_all_wherever_they_stand(ranks: list[int], merge: Any) -> None:
    comms = in_process_comms(10, fanout=2)
    errors = run_threads(comms, lambda comm: comm.agree("write", lambda: failing(ranks, comm), refuse_to_decide, merge))
    assert [type(error) for error in errors] == [PeerError] * 10
    for rank, error in enumerate(errors):
        assert {r: (f.type, f.message) for r, f in error.failures.items()} == {
            r: ("ValueError", f"disk of {r}") for r in ranks
        }
        assert error.failures == errors[0].failures
        assert all("failing" in failure.traceback for failure in error.failures.values())
        assert (type(error.__cause__) is ValueError) == (rank in ranks)
    assert run_threads(comms, lambda comm: comm.agree("next", lambda: b"", lambda _: b"v")) == [b"v"] * 10
    assert not votes_left(comms)


def test_where_all_fail_alike_each_raises_its_own() -> None:
    originals = [MismatchError("no such tensor", missing=[f"{rank}"]) for rank in range(7)]

    def work(comm: Comm) -> bytes:
        raise originals[comm.rank]

    errors = run_threads(
        in_process_comms(7, fanout=2), lambda comm: comm.agree("t", lambda: work(comm), refuse_to_decide)
    )
    assert all(error is original for error, original in zip(errors, originals, strict=True))


@pytest.mark.parametrize("stray", [1, 3, 6])
@pytest.mark.parametrize("merge", [None, numbers])
def test_a_rank_in_another_round_fails_all_alike(stray: int, merge: Any) -> None:
    def rank_main(comm: Comm) -> bytes:
        topic = "commit" if comm.rank == stray else "open"
        return comm.agree(topic, lambda: number_of(comm), refuse_to_decide, merge)

    errors = run_threads(in_process_comms(7, fanout=2), rank_main)
    assert [type(error) for error in errors] == [DistributedError] * 7
    assert all(f"the coordinator in 'open', rank {stray} in 'commit'" in str(error) for error in errors)


@pytest.mark.parametrize("merging", [0, 1, 3])
@pytest.mark.parametrize("error", [ZeroDivisionError, MismatchError])
def test_a_merge_that_raises_is_the_failure_of_its_rank(merging: int, error: type[Exception]) -> None:
    comms = in_process_comms(8, fanout=2)

    def rank_main(comm: Comm) -> bytes:
        def merge(votes: Sequence[bytes]) -> bytes:
            if comm.rank == merging:
                raise error("cannot merge")
            return numbers(votes)

        return comm.agree("t", lambda: number_of(comm), refuse_to_decide, merge)

    errors = run_threads(comms, rank_main)
    assert [type(e) for e in errors] == [PeerError] * 8
    assert [{r: f.type for r, f in e.failures.items()} for e in errors] == [{merging: error.__name__}] * 8
    assert [type(e.__cause__) for e in errors] == [error if rank == merging else type(None) for rank in range(8)]
    assert run_threads(comms, lambda comm: comm.agree("next", lambda: b"", lambda _: b"v")) == [b"v"] * 8
    assert not votes_left(comms)


@pytest.mark.parametrize(
    "interrupted, stage",
    [(0, "work"), (1, "work"), (3, "work"), (7, "work"), (0, "merge"), (1, "merge"), (3, "merge")],
)
def test_an_interrupted_rank_goes_on_and_its_children_are_taken_over(interrupted: int, stage: str) -> None:
    comms = in_process_comms(10, fanout=2)

    def rank_main(comm: Comm) -> bytes:
        def merge(votes: Sequence[bytes]) -> bytes:
            if stage == "merge" and comm.rank == interrupted:
                raise KeyboardInterrupt
            return numbers(votes)

        def work() -> bytes:
            if stage == "work" and comm.rank == interrupted:
                raise KeyboardInterrupt
            return failing([8] if stage == "work" else [], comm)

        return comm.agree("t", work, refuse_to_decide, merge)

    errors = run_threads(comms, rank_main)
    assert type(errors[interrupted]) is KeyboardInterrupt
    # An interrupted coordinator tells at once; another one's children are heard out, and rank 8 is below 1 and 3.
    expected = {interrupted} | ({8} if stage == "work" and interrupted else set())
    for error in errors[:interrupted] + errors[interrupted + 1 :]:
        assert type(error) is PeerError
        assert set(error.failures) == expected
        assert error.failures[interrupted].type == "KeyboardInterrupt"
    # Nobody is out of step, and what the interrupted round left behind is removed.
    assert run_threads(comms, lambda comm: comm.agree("next", lambda: b"", lambda _: b"v")) == [b"v"] * 10
    assert not votes_left(comms)


def test_an_interrupted_rank_does_not_wait_for_its_children() -> None:
    comms = in_process_comms(7, fanout=2)
    gone = threading.Event()
    in_time: list[bool] = []

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 1:
                raise KeyboardInterrupt
            if comm.rank == 3:
                in_time.append(gone.wait(DEADLINE_S / 2))
            return b""

        try:
            return comm.agree("t", work, refuse_to_decide)
        finally:
            if comm.rank == 1:
                gone.set()

    errors = run_threads(comms, rank_main)
    assert type(errors[1]) is KeyboardInterrupt
    assert [list(errors[rank].failures) for rank in (0, 2, 3, 4, 5, 6)] == [[1]] * 6
    assert in_time == [True]


def test_a_rank_interrupted_while_it_waits_hands_on_what_it_has() -> None:
    comms = in_process_comms(8, fanout=2, look_s=0.01)
    taken = threading.Event()
    waiting: Any = comms[1]
    take, pause = waiting._take, waiting._pause

    def note(told: Any, rank: int) -> bool:
        found = bool(take(told, rank))
        if found and rank == 3:
            taken.set()
        return found

    def interrupt(waited_s: float) -> None:
        if taken.is_set():
            raise KeyboardInterrupt
        pause(waited_s)

    waiting._take, waiting._pause = note, interrupt
    given_up = threading.Event()

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 4:
                given_up.wait(DEADLINE_S)
            return number_of(comm)

        try:
            return comm.agree("t", work, lambda votes: votes[0], numbers)
        finally:
            if comm.rank == 1:
                given_up.set()

    got = run_threads(comms, rank_main)
    assert type(got[1]) is KeyboardInterrupt
    assert got[:1] + got[2:] == [all_numbers(8)] * 7  # it had voted, and so had 3 and 7; 4 was taken by rank 0
    assert not votes_left(comms)
    errors = run_threads(comms, lambda comm: comm.agree("next", lambda: b"", refuse_to_decide))
    assert type(errors[1]) is DistributedError
    assert [error.waiting_for for error in errors[:1] + errors[2:]] == [[1]] * 7


@pytest.mark.parametrize("lost", [[1], [3], [9], [2, 3], [1, 3], [1, 9], [3, 8]])
def test_lost_ranks_are_named_and_the_ranks_below_them_are_not(lost: list[int]) -> None:
    comms = in_process_comms(10, fanout=2, look_s=0.01)
    for rank in lost:
        comms[rank].close()

    def rank_main(comm: Comm) -> Any:
        return None if comm.rank in lost else comm.agree("t", lambda: number_of(comm), refuse_to_decide, numbers)

    errors = [error for rank, error in enumerate(run_threads(comms, rank_main)) if rank not in lost]
    assert [type(error) for error in errors] == [CollectiveTimeout] * (10 - len(lost))
    # Whoever is found first ends the round; a lost rank below a lost one is found with it.
    assert all(error.waiting_for == errors[0].waiting_for for error in errors)
    assert set(errors[0].waiting_for) <= set(lost)
    assert errors[0].waiting_for
    if lost in ([1, 3], [3, 8]):
        assert errors[0].waiting_for == lost
    for comm in comms:
        with pytest.raises(DistributedError, match="can be used no more"):
            comm.agree("next", lambda: b"", refuse_to_decide)


@pytest.mark.parametrize("heard_of", [True, False])
def test_a_lost_child_of_an_interrupted_rank_is_named(heard_of: bool) -> None:
    comms: list[Any] = list(in_process_comms(7, fanout=2, look_s=0.01, stall_s=600.0 if heard_of else 0.3))
    beats = comms[0]._beats
    if heard_of:
        comms[3].close()
    else:
        comms[0]._beats = lambda ranks: beats([rank for rank in ranks if rank != 3])

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 1:
                raise KeyboardInterrupt
            return b""

        return None if comm.rank == 3 else comm.agree("t", work, refuse_to_decide)

    errors = run_threads(comms, rank_main)
    assert type(errors[1]) is KeyboardInterrupt
    assert [errors[rank].waiting_for for rank in (0, 2, 4, 5, 6)] == [[3]] * 5


def test_a_loss_far_away_is_told_while_others_still_work() -> None:
    # Rank 0 waits for 1 first, which works for as long as nobody has heard of the loss of 6, below 2.
    comms = in_process_comms(7, fanout=2, look_s=0.01)
    comms[6].close()
    told = threading.Event()
    in_time: list[bool] = []

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 1:
                in_time.append(told.wait(DEADLINE_S / 2))
            return b""

        if comm.rank == 6:
            return None
        try:
            return comm.agree("t", work, refuse_to_decide)
        finally:
            told.set()

    errors = run_threads(comms, rank_main)
    assert [error.waiting_for for error in errors[:6]] == [[6]] * 6
    assert in_time == [True]


@pytest.mark.parametrize("stalled", [1, 3, 7])
def test_a_stalled_rank_is_named_and_not_who_waits_for_it(stalled: int) -> None:
    comms = in_process_comms(8, fanout=2, stall_s=0.3, look_s=0.01)
    for comm in comms[1:]:
        comm._look_s = 0.25  # type: ignore[attr-defined]  # the coordinator would be the first to lose its patience
    told = threading.Semaphore(0)

    def stall() -> bytes:
        for _ in range(7):
            assert told.acquire(timeout=DEADLINE_S)
        return b"late"

    def rank_main(comm: Comm) -> Any:
        if comm.rank == stalled:
            return comm.agree("t", stall, refuse_to_decide)
        try:
            return comm.agree("t", lambda: b"", refuse_to_decide)
        finally:
            told.release()

    errors = run_threads(comms, rank_main)
    assert [type(error) for error in errors] == [CollectiveTimeout] * 8
    assert [error.waiting_for for error in errors] == [[stalled]] * 8
    assert "no progress" in str(errors[0])


def test_who_waits_for_a_slow_rank_is_not_given_up() -> None:
    # Rank 7 takes 4 s, reporting as it goes; 3, 1 and 0 wait for it, each longer than `stall_s` and its own patience.
    comms = in_process_comms(8, fanout=2, stall_s=0.2, look_s=0.01)
    pace = threading.Event()

    def rank_main(comm: Comm) -> bytes:
        def work() -> bytes:
            for _ in range(160 if comm.rank == 7 else 0):
                pace.wait(0.025)
                comm.progress(1)
            return number_of(comm)

        return comm.agree("t", work, lambda votes: votes[0], numbers)

    assert run_threads(comms, rank_main) == [all_numbers(8)] * 8


def test_an_interrupted_coordinator_is_heard_by_ranks_that_still_wait_for_others() -> None:
    comms = in_process_comms(7, fanout=2)
    heard = threading.Event()
    in_time: list[bool] = []

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 0:
                raise KeyboardInterrupt
            if comm.rank == 3:
                in_time.append(
                    heard.wait(DEADLINE_S / 2)
                )  # rank 1 takes the votes of 3, and hears of the end before 3 votes
            return b""

        try:
            return comm.agree("t", work, refuse_to_decide)
        finally:
            if comm.rank == 1:
                heard.set()

    errors = run_threads(comms, rank_main)
    assert type(errors[0]) is KeyboardInterrupt
    assert [type(error) for error in errors[1:]] == [PeerError] * 6
    assert in_time == [True]
    assert run_threads(comms, lambda comm: comm.agree("next", lambda: b"", lambda _: b"v")) == [b"v"] * 7
    assert not votes_left(comms)


def test_a_coordinator_that_left_is_noticed_by_ranks_that_still_wait_for_others() -> None:
    comms = in_process_comms(7, fanout=2, look_s=0.01)
    comms[0].close()
    heard = threading.Event()
    in_time: list[bool] = []

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 3:
                in_time.append(heard.wait(DEADLINE_S / 2))
            return b""

        if comm.rank == 0:
            return None
        try:
            return comm.agree("t", work, refuse_to_decide)
        finally:
            if comm.rank == 1:
                heard.set()

    errors = run_threads(comms, rank_main)[1:]
    assert [error.waiting_for for error in errors] == [[0]] * 6
    assert in_time == [True]


def test_many_rounds_in_a_tree_stay_in_step_and_leave_nothing_behind() -> None:
    comms = in_process_comms(11, fanout=2)

    def rank_main(comm: Comm) -> list[bytes]:
        return [comm.agree(f"{n}", lambda: number_of(comm), lambda votes: votes[0], numbers) for n in range(50)]

    assert run_threads(comms, rank_main) == [[all_numbers(11)] * 50] * 11
    assert not votes_left(comms)
