"""Do ranks whose clocks and signals differ decide alike about each call, in as few rounds as that needs?"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from unittest.mock import patch

import pytest

from shardpoint.comm import Comm, in_process_comms
from shardpoint.engine import PendingSave, SaveResult, schedule
from shardpoint.engine.background import BackgroundSaver
from shardpoint.engine.ballots import agree
from shardpoint.engine.schedule import Schedule
from shardpoint.errors import SaveCancelledError, UsageError
from shardpoint.events import Event
from shardpoint.policies import At, Every, OnPreemption, SavePolicy


class Background:
    """Stands for saves behind the training: `wait` ends them."""

    def __init__(self, pending: Sequence[PendingSave] = ()) -> None:
        self.pending = list(pending)
        self.num_waits = 0

    @property
    def num_in_flight(self) -> int:
        return sum(not pending.done() for pending in self.pending)

    def wait(self) -> None:
        self.num_waits += 1
        for pending in self.pending:
            if not pending.done():
                cancelled = SaveCancelledError("cancelled")
                pending.finish(cancelled if pending.is_cancelled else result(pending.name))


@dataclass
class Rank:
    """One rank with a clock of its own."""

    comm: Comm
    now: float
    policies: Sequence[SavePolicy]
    when_busy: Literal["wait", "skip"] = "wait"
    events: list[Event] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    background: Background | None = None

    def __post_init__(self) -> None:
        self.schedule = Schedule(
            self.policies, self.events.append, max_in_flight=1, when_busy=self.when_busy, clock=lambda: self.now
        )

    def call(self, step: int, *, force: bool = False) -> bool:
        saver = cast("BackgroundSaver | None", self.background)
        found = self.schedule.next_call(self.comm, saver)
        return self.schedule.is_due(found, self.comm, saver, step, f"step-{step}", force=force)

    def signalled(self, number: int = signal.SIGTERM) -> None:
        assert self.schedule._watch is not None
        self.schedule._watch.note(number)


def result(name: str) -> SaveResult:
    return SaveResult(name, f"runs/{name}", "0" * 32, 1, 0, 0, 0.0)


def saved(name: str, began: float, ended: float) -> PendingSave:
    pending = PendingSave(name, began)
    pending.finish(result(name))
    pending._ended = ended
    return pending


Job = tuple[list[Rank], Callable[..., list[bool]]]


@contextmanager
def job(*policies: SavePolicy, world_size: int = 3, when_busy: Literal["wait", "skip"] = "wait") -> Iterator[Job]:
    """Give ranks, each with another time on its clock, and what has all of them call `save`."""
    rounds: list[tuple[int, str]] = []

    def counted(comm: Comm, topic: str, *args: Any, **options: Any) -> Any:
        rounds.append((comm.rank, topic))
        return agree(comm, topic, *args, **options)

    comms = in_process_comms(world_size, look_s=0.05, fanout=2)
    ranks = [Rank(comm, 1000.0 * comm.rank, policies, when_busy) for comm in comms]
    with ThreadPoolExecutor(world_size) as pool, patch.object(schedule, "agree", counted):

        def call(step: int, *, force: bool = False) -> list[bool]:
            rounds.clear()
            found = list(pool.map(lambda rank: rank.call(step, force=force), ranks))
            for rank in ranks:
                rank.topics = [topic for number, topic in rounds if number == rank.comm.rank]
            assert len({tuple(rank.topics) for rank in ranks}) == 1
            return found

        yield ranks, call
    for comm in comms:
        comm.close()


def test_policies_that_go_by_steps_cost_no_round() -> None:
    with job(Every(steps=4), At([5])) as (ranks, call):
        assert [all(call(step)) for step in range(1, 9)] == [False, False, False, True, True, False, False, True]
        call(9, force=True)
        assert ranks[0].topics == []


def test_only_the_coordinators_clock_counts() -> None:
    with job(Every(seconds=10)) as (ranks, call):
        for rank in ranks[1:]:
            rank.now += 100
        assert call(1) == [False] * 3
        assert ranks[0].topics == ["save: when"]
        ranks[0].now += 9.9
        assert call(2) == [False] * 3
        ranks[0].now += 0.2
        ranks[1].now -= 5000
        assert call(3) == [True] * 3
        assert call(4) == [False] * 3


def test_seconds_count_from_the_last_save_whatever_asked_for_it_and_from_a_resume() -> None:
    with job(Every(seconds=10), Every(steps=100)) as (ranks, call):
        ranks[0].now += 9
        assert all(call(100))
        ranks[0].now += 9
        assert not any(call(101))
        assert all(call(102, force=True))
        ranks[0].now += 9
        assert not any(call(103))
        ranks[0].now += 1
        assert all(call(104))
        ranks[0].now += 10
        for rank in ranks:
            rank.schedule.resumed("step-90", 90)
        assert not any(call(91))
        ranks[0].now += 10
        assert all(call(92))


def test_a_resume_is_where_steps_count_from() -> None:
    with job(At([5, 9])) as (ranks, call):
        for rank in ranks:
            rank.schedule.resumed("step-6", 6)
        assert [all(call(step)) for step in (7, 8, 10, 11)] == [False, False, True, False]


def test_what_asks_seldom_costs_a_round_seldom() -> None:
    with job(Every(seconds=10, check_every=3), OnPreemption(check_every=2)) as (ranks, call):
        rounds, due = [], []
        for step in range(1, 13):
            ranks[0].now += 10
            due.append(all(call(step)))
            rounds.append(len(ranks[0].topics))
        assert rounds == [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1]
        assert due == [number > 0 for number in rounds]


@pytest.mark.parametrize("to", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_a_signal_to_any_rank_has_all_ranks_save_at_the_same_call(to: list[int]) -> None:
    with job(OnPreemption(grace_s=20), Every(steps=100)) as (ranks, call):
        assert call(1) == [False] * 3
        for rank in to:
            ranks[rank].now += 2
            ranks[rank].signalled(signal.SIGUSR1)
            ranks[rank].now += 3 + rank
        assert not any(rank.schedule.preempted for rank in ranks)
        assert call(2) == [True] * 3
        assert ranks[0].topics == ["save: when", "save: preempted"]
        assert all(rank.schedule.preempted for rank in ranks)
        assert [event.kind for event in ranks[0].events] == ["preempted"]
        assert f"rank {max(to)} got SIGUSR1, {17 - max(to)}.0 s" in ranks[0].events[0].message
        assert not ranks[1].events
        # Once: from here on it is as if there were no such policy.
        ranks[1].signalled(signal.SIGTERM)
        assert call(3) == [False] * 3
        assert ranks[0].topics == []
        assert call(100) == [True] * 3
        assert all(rank.schedule.preempted for rank in ranks)


@pytest.mark.parametrize("left_s,starts", [(7.1, True), (6.9, False)])
def test_a_save_is_started_if_the_longest_of_the_last_three_fits(left_s: float, starts: bool) -> None:
    with job(OnPreemption(grace_s=20), Every(steps=2)) as (ranks, call):
        assert not any(call(1))
        for rank in ranks:
            for number, seconds in enumerate((50.0, 3.0, 7.0, 2.0)):
                rank.schedule.started(saved(f"step-{number}", rank.now, rank.now + seconds))
                rank.now += 60
        ranks[2].signalled()
        ranks[2].now += 20 - left_s
        assert call(2) == [starts] * 3
        (event,) = ranks[0].events
        assert ("step-3 is what stands" in event.message) == (not starts)
        assert event.key == ("" if starts else "step-3")
        assert all(rank.schedule.preempted for rank in ranks)
        # The step counts as seen only where it was saved: who goes on gets it later.
        assert call(3) == [not starts] * 3


def test_a_save_that_is_forced_is_started_in_any_case() -> None:
    with job(OnPreemption(grace_s=20)) as (ranks, call):
        for rank in ranks:
            rank.schedule.started(saved("a", rank.now - 30, rank.now))
        ranks[1].signalled()
        assert call(1, force=True) == [True] * 3
        assert "none is started" in ranks[0].events[0].message


def test_before_there_was_a_save_one_is_tried_however_little_is_left() -> None:
    with job(OnPreemption(grace_s=20)) as (ranks, call):
        ranks[1].signalled()
        ranks[1].now += 500
        assert call(1) == [True] * 3


def test_a_save_that_failed_tells_nothing_and_a_resumed_checkpoint_stands() -> None:
    with job(OnPreemption(grace_s=20)) as (ranks, call):
        for rank in ranks:
            rank.schedule.resumed("resumed", 4)
            rank.schedule.started(saved("a", rank.now, rank.now + 21))
            failed = PendingSave("b", rank.now)
            failed.finish(RuntimeError("disk"))
            rank.schedule.started(failed)
            rank.schedule._measure()
            rank.schedule.resumed("again", 4)
            rank.now += 30
        ranks[0].signalled()
        assert call(5) == [False] * 3
        assert "again is what stands" in ranks[0].events[0].message


@pytest.mark.parametrize(
    "spent_s,left_s,ends,starts",
    [
        (4.0, 30.0, "committed", True),
        (4.0, 7.0, "committed", False),  # 6 s are left to it, 10 s would be left to do
        (4.0, 5.0, "cancelled", False),
        (40.0, 5.0, "committed", False),  # late already: it may end at any moment
        (40.0, -1.0, "cancelled", False),
    ],
)
def test_what_is_in_flight_is_finished_if_it_fits(spent_s: float, left_s: float, ends: str, starts: bool) -> None:
    with job(OnPreemption(grace_s=20)) as (ranks, call):
        for rank in ranks:
            flying = PendingSave("flying", rank.now + 10)
            rank.schedule.started(saved("before", rank.now, rank.now + 10))
            rank.schedule.started(flying)
            rank.background = Background([flying])
            rank.now += 10 + spent_s
        ranks[1].signalled()
        ranks[1].now += 20 - left_s
        with patch.object(PendingSave, "finish", _finishing_at_once):
            assert call(1) == [starts] * 3
        for rank in ranks:
            assert rank.background is not None
            assert rank.background.num_waits == 1
            failure = rank.background.pending[0].failure
            assert (failure is None) == (ends == "committed")
            assert rank.background.pending[0].was_told == (ends == "cancelled")
        told = [event.message for event in ranks[0].events]
        assert [event.kind for event in ranks[0].events] == ["preempted"] * len(told)
        assert any("flying is given up" in text for text in told) == (ends == "cancelled")
        if not starts:
            assert f"{'flying' if ends == 'committed' else 'before'} is what stands" in told[-1]


_finish = PendingSave.finish


def _finishing_at_once(self: PendingSave, outcome: SaveResult | BaseException) -> None:
    """End a save as if it had taken no time: the ranks' clocks here are not the real one."""
    _finish(self, outcome)
    self._ended = self._began + 10.0


def test_time_that_a_save_waited_for_the_one_before_is_not_its_own() -> None:
    with job(OnPreemption(grace_s=20)) as (ranks, _):
        one = ranks[0].schedule
        one.started(saved("a", 0.0, 10.0))
        one.started(saved("b", 1.0, 14.0))
        one.started(saved("c", 100.0, 103.0))
        assert one._save_needs_s() == 10.0
        assert list(one._durations) == [10.0, 4.0, 3.0]
        ranks[0].now = 201.0
        for began in (200.0, 200.5):
            one.started(PendingSave("d", began))
        assert one._in_flight_needs_s() == 9.0 + 10.0


def test_a_busy_rank_has_all_skip_and_the_policy_wants_the_next_one() -> None:
    with job(Every(steps=4), world_size=2, when_busy="skip") as (ranks, call):
        for rank in ranks:
            rank.background = Background()
        flying = PendingSave("flying", 0.0)
        ranks[1].background = Background([flying])
        assert call(3) == [False] * 2
        assert ranks[0].topics == []
        assert call(4) == [False] * 2
        assert ranks[0].topics == ["save: room"]
        assert [event.kind for event in ranks[0].events] == ["save_skipped"]
        flying.finish(result("flying"))
        assert call(5) == [True] * 2
        assert call(6) == [False] * 2


def test_a_signal_that_no_call_heard_of_is_told_at_the_end() -> None:
    with job(OnPreemption(check_every=5)) as (ranks, call):
        ranks[1].signalled(signal.SIGUSR1)
        assert call(1) == [False] * 3
        for rank in ranks:
            rank.schedule.close()
        assert [len(rank.events) for rank in ranks] == [0, 1, 0]
        assert "SIGUSR1 came after the last call" in ranks[1].events[0].message


def test_two_preemptions_are_refused() -> None:
    with pytest.raises(UsageError, match="several OnPreemption"):
        Schedule([OnPreemption(), OnPreemption()], lambda _: None, max_in_flight=1, when_busy="wait")
