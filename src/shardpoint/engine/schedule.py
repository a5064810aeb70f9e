"""Which calls of `Checkpointer.save` save: what the policies say, agreed by the ranks where they could differ.

Steps are the same on all ranks, so policies that go by them cost no round. Clocks and signals are not: a call asks
about them in one round for all policies, and whether it does follows from the number of calls alone, which is the same
on all ranks, whatever else is wrong with a rank's arguments.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from shardpoint.comm import Comm
from shardpoint.engine.background import BackgroundSaver
from shardpoint.engine.ballots import agree
from shardpoint.engine.pending import PendingSave
from shardpoint.events import Event, Listener
from shardpoint.policies import Every, SavePolicy, fits, preemption_of, save_is_due
from shardpoint.preemption import SignalWatch

_NUM_MEASURED = 3


class _Notice(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A signal that came: what is left of its grace period, in seconds; to which rank; and which."""

    left_s: float
    rank: int
    signal: int

    @property
    def text(self) -> str:
        return f"rank {self.rank} got {signal.Signals(self.signal).name}, {self.left_s:.1f} s of its grace period left"


class _Ballot(msgspec.Struct, frozen=True, array_like=True):
    """What a rank knows: the signal that it got, and how long, as it expects, what is asked about takes."""

    notice: _Notice | None
    needed_s: float | None


class _Verdict(msgspec.Struct, frozen=True, array_like=True):
    """Whether a save is due by the clock, the most urgent signal, and whether what was asked about fits."""

    is_time: bool
    notice: _Notice | None
    has_room: bool


@dataclass(frozen=True, slots=True)
class Call:
    """What the ranks agreed on about one call of `save`.

    Attributes:
        is_time: a save is due by the clock.
        may_start: None, but where the ranks have just heard of a preemption: whether a save is to be started.
    """

    is_time: bool = False
    may_start: bool | None = None


class Schedule:
    """Decides about the calls of one `Checkpointer`.

    Args:
        policies: the list that the training loop gave.
        listener: told of what was decided, on the coordinator.
        max_in_flight: how many saves may be under way in the background.
        when_busy: whether a further one waits or is skipped.
        clock: the time in seconds, monotonic, as `PendingSave` tells it.

    Raises:
        UsageError: the policies contradict each other.
    """

    def __init__(
        self,
        policies: Iterable[SavePolicy],
        listener: Listener,
        *,
        max_in_flight: int,
        when_busy: Literal["wait", "skip"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policies = tuple(policies)
        self._timed = [policy for policy in self._policies if isinstance(policy, Every) and policy.seconds is not None]
        self._preemption = preemption_of(self._policies)
        self._watch = SignalWatch(self._preemption.signals, clock) if self._preemption is not None else None
        self._listener = listener
        self._max_in_flight = max_in_flight
        self._when_busy = when_busy
        self._clock = clock
        self._num_calls = 0
        self._previous_step: int | None = None
        self._last_began = clock()
        self._preempted = False
        self._unmeasured: deque[PendingSave] = deque()
        self._durations: deque[float] = deque(maxlen=_NUM_MEASURED)
        self._busy_until = -math.inf
        self._standing = ""

    @property
    def preempted(self) -> bool:
        """Whether the ranks have agreed that the run will be stopped; the same on all of them."""
        return self._preempted

    def open(self) -> None:
        """Begin to watch for signals, where a policy wants that; raises as `SignalWatch.open`."""
        if self._watch is not None:
            self._watch.open()

    def close(self) -> None:
        """End that, and say if a signal came that no call of `save` has heard of."""
        if self._watch is None:
            return
        self._watch.close()
        if self._watch.first is not None and not self._preempted:
            name = signal.Signals(self._watch.first[0]).name
            text = f"{name} came after the last call of `save` that looked for it: nothing was saved because of it"
            self._listener(Event("preempted", text, self._standing, logging.WARNING))

    def resumed(self, name: str, step: int) -> None:
        """Go on from a checkpoint: its step was seen, and seconds count from now."""
        self._standing = name
        self._previous_step = step
        self._last_began = self._clock()

    def started(self, pending: PendingSave) -> None:
        """Take a save into account that was started, or is done."""
        self._unmeasured.append(pending)

    def next_call(self, comm: Comm, background: BackgroundSaver | None) -> Call:
        """Find out what the ranks must agree on before a call of `save` looks at its arguments.

        Args:
            comm: the ranks.
            background: what saves behind the training, if something does.

        Raises:
            DistributedError: as `Comm.agree` says.

        Collective:
            All ranks: no round where policies go by steps; else one, and one more at a preemption.
        """
        self._num_calls += 1
        periods = [policy.check_every for policy in self._timed]
        if self._preemption is not None and not self._preempted:
            periods.append(self._preemption.check_every)
        if not any(self._num_calls % period == 0 for period in periods):
            return Call()
        first = self._agree(comm, "save: when", self._in_flight_needs_s)
        if first.notice is None or self._preempted:
            return Call(is_time=first.is_time)
        self._preempted = True
        self._end_in_flight(comm, background, first)
        second = self._agree(comm, "save: preempted", self._save_needs_s)
        assert second.notice is not None  # noqa: S101 - a signal that was noted stays noted
        if comm.is_coordinator:
            self._tell_of_preemption(second.notice, may_start=second.has_room)
        return Call(may_start=second.has_room)

    def is_due(
        self, call: Call, comm: Comm, background: BackgroundSaver | None, step: int, name: str, *, force: bool
    ) -> bool:
        """Decide about a call of `save`.

        Args:
            call: what the ranks agreed on about it.
            comm: the ranks.
            background: what saves behind the training, if something does.
            step: the step that was finished, at least 0.
            name: the checkpoint's name, for the listener.
            force: save whatever the policies say.

        Returns:
            Whether to save now. Where a save was due and could not be started, the step does not count as seen: the
            policy wants the next one.

        Collective:
            All ranks, with the same arguments: one round where a save is due and busy ranks skip it, else none.
        """
        if call.may_start is False and not force:
            return False
        due = force or call.is_time or bool(call.may_start) or save_is_due(self._policies, step, self._previous_step)
        if due and self._is_to_skip(comm, background, name):
            return False
        self._previous_step = step
        if due:
            self._last_began = self._clock()
        return due

    def _is_to_skip(self, comm: Comm, background: BackgroundSaver | None, name: str) -> bool:
        """Tell whether too many saves are under way, on any rank, for another."""
        if background is None or self._when_busy == "wait":
            return False
        limit = self._max_in_flight
        skipped = agree(
            comm, "save: room", lambda: background.num_in_flight, int, lambda ballots: max(ballots) >= limit, bool
        )
        if skipped and comm.is_coordinator:
            text = f"{name} is not saved: {limit} saves are under way"
            self._listener(Event("save_skipped", text, name, logging.WARNING))
        return skipped

    # Preemption.

    def _agree(self, comm: Comm, topic: str, needed_s: Callable[[], float | None]) -> _Verdict:
        def judge(ballots: Sequence[_Ballot]) -> _Verdict:
            ballot = _merge(ballots)
            elapsed_s = self._clock() - self._last_began
            return _Verdict(
                any(policy.due_after(elapsed_s) for policy in self._timed),
                ballot.notice,
                ballot.notice is None or fits(ballot.needed_s, ballot.notice.left_s),
            )

        return agree(
            comm, topic, lambda: _Ballot(self._notice(comm.rank), needed_s()), _Ballot, judge, _Verdict, _merge
        )

    def _notice(self, rank: int) -> _Notice | None:
        if self._watch is None or self._preemption is None or self._watch.first is None:
            return None
        number, came_at = self._watch.first
        return _Notice(self._preemption.grace_s - (self._clock() - came_at), rank, number)

    def _end_in_flight(self, comm: Comm, background: BackgroundSaver | None, verdict: _Verdict) -> None:
        """Finish what is in flight if it fits, else give it up; return once nothing is."""
        if background is None or verdict.notice is None:
            return
        if not verdict.has_room:
            for pending in self._in_flight():
                pending.give_up()
                if comm.is_coordinator:
                    text = f"the save of {pending.name} is given up: it would not end in time ({verdict.notice.text})"
                    self._listener(Event("preempted", text, pending.name, logging.WARNING))
        background.wait()

    def _tell_of_preemption(self, notice: _Notice, *, may_start: bool) -> None:
        if may_start:
            outcome = "this call saves, then the loop should leave"
        else:
            stands = f"{self._standing} is what stands" if self._standing else "this run has committed nothing"
            outcome = f"a save takes {self._save_needs_s() or 0:.1f} s, so none is started: {stands}"
        text = f"the run is preempted ({notice.text}): {outcome}"
        self._listener(Event("preempted", text, "" if may_start else self._standing, logging.WARNING))

    # How long saves take.

    def _in_flight(self) -> list[PendingSave]:
        return [pending for pending in self._unmeasured if not pending.done()]

    def _measure(self) -> None:
        """Learn from the saves that have ended: how long each took by itself, and which checkpoint was the last."""
        while self._unmeasured and self._unmeasured[0].done():
            pending = self._unmeasured.popleft()
            began, ended = pending.span_s
            if pending.failure is None and ended is not None:
                # Time that it waited for the one before is not its own.
                self._durations.append(ended - max(began, self._busy_until))
                self._standing = pending.name
            self._busy_until = max(self._busy_until, ended if ended is not None else began)

    def _save_needs_s(self) -> float | None:
        self._measure()
        return max(self._durations, default=None)

    def _in_flight_needs_s(self) -> float | None:
        each = self._save_needs_s()
        waiting = self._in_flight()
        if not waiting:
            return 0.0
        if each is None:
            return None
        spent = self._clock() - max(waiting[0].span_s[0], self._busy_until)
        return max(0.0, each - spent) + (len(waiting) - 1) * each


def _merge(ballots: Sequence[_Ballot]) -> _Ballot:
    """Make one ballot: the most urgent signal, and the longest time; a time that one rank does not know, none does."""
    notices = [ballot.notice for ballot in ballots if ballot.notice is not None]
    needed = [ballot.needed_s for ballot in ballots]
    known = [seconds for seconds in needed if seconds is not None]
    return _Ballot(min(notices, default=None), max(known) if len(known) == len(needed) else None)
