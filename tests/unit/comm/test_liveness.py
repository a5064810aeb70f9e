"""Is a rank given up when it must be, and not before?"""

from __future__ import annotations

from shardpoint.comm.liveness import Beat, Watch


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def watch_one(clock: Clock) -> Watch:
    return Watch([3], silence_s=60, stall_s=600, look_s=5, clock=clock)


def test_a_rank_whose_beats_stand_still_is_dead_after_the_silence() -> None:
    clock = Clock()
    watch = watch_one(clock)
    watch.look({3: Beat(count=1, moved=0, heard=-1)})
    clock.now += 59
    assert watch.look({3: Beat(count=1, moved=0, heard=-1)}) == ({}, False)
    clock.now += 1
    assert watch.look({3: Beat(count=1, moved=0, heard=-1)})[0] == {3: "silent for 60 s"}


def test_a_rank_that_beats_but_moves_nothing_is_stalled() -> None:
    clock = Clock()
    watch = watch_one(clock)
    for count in range(120):
        assert watch.look({3: Beat(count=count, moved=7, heard=-1)})[0] == {}
        clock.now += 5
    assert watch.look({3: Beat(count=121, moved=7, heard=-1)})[0] == {3: "no progress for 600 s"}


def test_progress_is_told_and_keeps_a_rank_alive() -> None:
    clock = Clock()
    watch = watch_one(clock)
    for count in range(1000):
        assert watch.look({3: Beat(count=count, moved=count, heard=-1)}) == ({}, True)
        clock.now += 50


def test_a_rank_never_heard_of_has_the_time_of_a_stall() -> None:
    clock = Clock()
    watch = watch_one(clock)
    clock.now += 599
    assert watch.look({})[0] == {}
    clock.now += 1
    assert watch.look({})[0] == {3: "not heard of in 600 s"}


def test_a_rank_that_left_is_lost_at_once() -> None:
    watch = watch_one(Clock())
    assert watch.look({3: Beat(count=1, moved=1, heard=-1, left="it was closed")})[0] == {3: "left: it was closed"}


def test_a_beat_from_before_the_watch_gives_the_full_silence() -> None:
    clock = Clock()
    watch = watch_one(clock)
    clock.now += 30
    watch.look({3: Beat(count=9, moved=9, heard=2)})
    clock.now += 59
    assert watch.look({3: Beat(count=9, moved=9, heard=2)})[0] == {}


def test_a_rank_that_is_forgotten_is_not_judged() -> None:
    clock = Clock()
    watch = watch_one(clock)
    watch.forget(3)
    clock.now += 10_000
    assert watch.look({}) == ({}, False)


def test_the_first_look_is_due_at_once_and_the_next_after_its_time() -> None:
    clock = Clock()
    watch = watch_one(clock)
    assert watch.is_due()
    watch.look({})
    assert not watch.is_due()
    clock.now += 5
    assert watch.is_due()
