"""Do ranks that are threads notice one that leaves or stalls?"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from shardpoint.comm import Comm, in_process_comms
from shardpoint.comm.liveness import Beat
from shardpoint.errors import CollectiveTimeout, DistributedError, PeerError, UsageError
from tests.unit.comm.threads import DEADLINE_S, refuse_to_decide, run_threads


def test_ranks_are_numbered_and_one_coordinates() -> None:
    comms = in_process_comms(3)
    assert [(comm.rank, comm.world_size, comm.is_coordinator) for comm in comms] == [
        (0, 3, True),
        (1, 3, False),
        (2, 3, False),
    ]


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 rank"):
        in_process_comms(0)


def test_a_rank_that_leaves_is_named_by_all_others() -> None:
    comms = in_process_comms(3, look_s=0.01)

    def rank_main(comm: Comm) -> Any:
        if comm.rank == 1:
            return comm.close()
        return comm.agree("t", lambda: b"", refuse_to_decide)

    first, _left, third = run_threads(comms, rank_main)
    for error in (first, third):
        assert type(error) is CollectiveTimeout
        assert error.waiting_for == [1]
        assert "rank 1 left: it was closed" in str(error)
    for comm in comms:
        with pytest.raises(DistributedError, match=r"can be used no more.*closed"):
            comm.agree("next", lambda: b"", lambda _: b"")


def test_a_coordinator_that_leaves_is_named_by_all_others() -> None:
    comms = in_process_comms(3, look_s=0.01)

    def rank_main(comm: Comm) -> Any:
        return comm.close() if comm.is_coordinator else comm.agree("t", lambda: b"", refuse_to_decide)

    errors = run_threads(comms, rank_main)[1:]
    assert [type(error) for error in errors] == [CollectiveTimeout] * 2
    assert [error.waiting_for for error in errors] == [[0]] * 2


def test_a_rank_that_voted_and_left_has_voted() -> None:
    comms = in_process_comms(3, look_s=0.01)
    left, looked = threading.Event(), threading.Event()
    coordinator: Any = comms[0]
    beats = coordinator._beats

    def look(ranks: Sequence[int]) -> dict[int, Beat]:
        seen: dict[int, Beat] = beats(ranks)
        if any(beat.left is not None for beat in seen.values()):
            looked.set()
        return seen

    coordinator._beats = look

    def rank_main(comm: Comm) -> Any:
        def work() -> bytes:
            if comm.rank == 2:
                raise KeyboardInterrupt
            if comm.rank == 1:
                # The coordinator waits for this rank, and sees rank 2 leave, whose vote it has not fetched yet.
                assert left.wait(DEADLINE_S)
                looked.wait(DEADLINE_S)
            return b""

        try:
            return comm.agree("t", work, refuse_to_decide)
        finally:
            if comm.rank == 2:
                comm.close()
                left.set()

    first, second, _third = run_threads(comms, rank_main)
    assert looked.is_set()
    for error in (first, second):
        assert type(error) is PeerError
        assert {rank: failure.type for rank, failure in error.failures.items()} == {2: "KeyboardInterrupt"}


@pytest.mark.parametrize("stalled", [0, 1])
def test_a_rank_that_stalls_is_named_by_all_others_and_hears_of_it(stalled: int) -> None:
    comms = in_process_comms(3, stall_s=0.3, look_s=0.01)
    told = threading.Semaphore(0)

    def stall() -> bytes:
        for _ in range(2):
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
    others = [error for rank, error in enumerate(errors) if rank != stalled]
    assert [type(error) for error in others] == [CollectiveTimeout] * 2
    assert [error.waiting_for for error in others] == [[stalled]] * 2
    if stalled != 0:
        assert type(errors[stalled]) is CollectiveTimeout
        assert errors[stalled].waiting_for == [stalled]
    for comm in comms[1:]:
        with pytest.raises(DistributedError):
            comm.agree("next", lambda: b"", lambda _: b"")


@pytest.mark.parametrize("busy", [0, 1])
def test_a_rank_that_makes_progress_is_waited_for(busy: int) -> None:
    # `stall_s` is 0.2 s, and 1.2 s more for the coordinator; the busy rank takes 2 s, reporting as it goes.
    comms = in_process_comms(3, stall_s=0.2, look_s=0.01)
    pace = threading.Event()

    def rank_main(comm: Comm) -> bytes:
        def work() -> bytes:
            for _ in range(80 if comm.rank == busy else 0):
                pace.wait(0.025)
                comm.progress(1)
            return b"done"

        return comm.agree("t", work, b" ".join)

    assert run_threads(comms, rank_main) == [b"done done done"] * 3


def test_closing_from_another_thread_ends_the_round() -> None:
    comms = in_process_comms(2, look_s=0.01)
    working = threading.Event()

    def rank_main(comm: Comm) -> Any:
        if comm.rank == 1:
            assert working.wait(DEADLINE_S)
            return comms[0].close()

        def work() -> bytes:
            working.set()
            return b""

        return comm.agree("t", work, refuse_to_decide)

    error, _ = run_threads(comms, rank_main)
    assert type(error) is DistributedError
    assert "closed" in str(error)


def test_two_groups_do_not_mix() -> None:
    groups = [in_process_comms(2), in_process_comms(2)]

    def rank_main(comm: Comm) -> list[bytes]:
        mine = b"a" if comm in groups[0] else b"b"
        return [comm.agree("t", lambda: mine, b"".join) for _ in range(50)]

    got = run_threads([*groups[0], *groups[1]], rank_main)
    assert got == [[b"aa"] * 50] * 2 + [[b"bb"] * 50] * 2
