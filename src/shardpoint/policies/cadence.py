"""When to save: at which steps, how often by the clock, and when the run is told that it will be stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from shardpoint.errors import UsageError
from shardpoint.policies.numbers import check_count, check_positive

_UNCATCHABLE = frozenset({signal.SIGKILL, signal.SIGSTOP})


class SavePolicy(Protocol):
    """Decides whether a step is worth a save. Several in a list are joined by "or"."""

    def due(self, step: int, previous_step: int | None) -> bool:
        """Say whether to save now.

        Args:
            step: the step that was just finished, at least 0.
            previous_step: the step at the previous call, whether it saved or not, or the one resumed from; None at the
                first call of a fresh run. It may be greater than `step`: some loops count steps anew in each epoch.

        Returns:
            True when a save is due. It must not depend on anything that differs between ranks.
        """


@dataclass(frozen=True, slots=True)
class Every:
    """Save at each positive multiple of `steps`, or when `seconds` have passed since the last save.

    Multiples count from step 0, not from where a run resumed: after a forced save at step 7, `Every(steps=4)` saves at
    8. A loop that asks in strides saves at the first step at or after each multiple.

    Seconds count from the beginning of the last save, whatever asked for it; before the first, from when the
    `Checkpointer` was made, or from the end of `resume`. Only the coordinator's monotonic clock counts, so the ranks
    agree in a round: at each call of `Checkpointer.save`, or at each `check_every`-th one.

    Args:
        steps: at least 1; costs no round.
        seconds: greater than 0. Give this or `steps`, not both.
        check_every: with `seconds`: at which calls of `save` the clock is looked at, at least 1.

    Raises:
        UsageError: none or both are given, or one is not such a number.
    """

    steps: int | None = None
    seconds: float | None = None
    check_every: int = 1

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            text = f"Every takes either steps or seconds, not steps={self.steps!r} and seconds={self.seconds!r}"
            raise UsageError(text)
        check_count("Every(check_every=...)", self.check_every)
        if self.seconds is not None:
            check_positive("Every(seconds=...)", self.seconds)
            return
        check_count("Every(steps=...)", self.steps)
        if self.check_every != 1:
            text = "Every(check_every=...) belongs to seconds: steps are looked at in each call, which costs nothing"
            raise UsageError(text)

    def due(self, step: int, previous_step: int | None) -> bool:
        """Return True when `step` is a positive multiple, or when a multiple was passed since the previous call.

        With `seconds` it is always False: that is `due_after`'s to say.
        """
        if self.steps is None or step <= 0:
            return False
        if step % self.steps == 0:
            return True
        if previous_step is None or previous_step == step:
            return False
        # Steps that went down were counted anew (a new epoch): nothing has been passed yet but what lies below `step`.
        passed = previous_step if previous_step < step else 0
        return step // self.steps > passed // self.steps

    def due_after(self, elapsed_s: float) -> bool:
        """Return True when so many seconds since the last save are enough; with `steps` always False."""
        return self.seconds is not None and elapsed_s >= self.seconds


@dataclass(frozen=True, slots=True)
class At:
    """Save once at each of some steps, when it is reached or passed.

    "Once" holds over resumed runs: what the step resumed from had reached or passed already is not saved again. A fresh
    run has reached nothing: its first call saves if any of the steps is not after it. A loop that counts steps anew in
    each epoch saves in each epoch.

    Args:
        steps: at least one, each at least 0, in any order.

    Raises:
        UsageError: `steps` is empty, or holds something else.
    """

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        text = f"At(steps=...) takes a list of whole numbers of at least 0, not {steps!r}"
        try:
            listed = list(steps)
        except TypeError as error:
            raise UsageError(text) from error
        if not listed or not all(type(step) is int and step >= 0 for step in listed):
            raise UsageError(text)
        object.__setattr__(self, "steps", tuple(sorted(set(listed))))

    def due(self, step: int, previous_step: int | None) -> bool:
        """Return True when one of the steps lies after the previous call's, and not after this one's."""
        # Steps that went down were counted anew: all of them lie ahead again.
        seen = -1 if previous_step is None or previous_step > step else previous_step
        return any(seen < wanted <= step for wanted in self.steps)


@dataclass(frozen=True, slots=True)
class OnPreemption:
    """Save when the run is told that it will be stopped: when a signal came to any rank.

    All ranks save at the same call of `Checkpointer.save`, whichever got the signal and when: they agree in a round, at
    each call or at each `check_every`-th one. `Checkpointer.preempted` is True from then on, so that the loop can
    leave. That happens once: later signals change nothing, later calls save as the other policies say.

    The deadline is `grace_s` after the first signal. What is in flight behind the training is finished if it is
    expected to fit into what is left, else given up; then a save of this step is started if it is expected to fit.
    What is expected is the longest of the last three saves; before there was one, everything is tried. The listener
    is told what was decided, and which checkpoint stands. `Checkpointer.save(force=True)` is started in any case.

    From when the `Checkpointer` is made until it is closed, these signals do not end the process. A handler in Python
    that was there before is called too, after the signal was noted (what it raises, it raises; Python's own for SIGINT
    is not called), and it is put back by `close`. The interpreter runs handlers in the main thread, between two
    operations: one that takes long, a collective say, delays them, and the grace period counts from there.

    Args:
        grace_s: seconds between the signal and the kill, less what the loop needs to leave. torchrun, SLURM and
            Kubernetes kill after 30 s unless told otherwise.
        signals: which; SIGTERM and SIGUSR1 unless told otherwise.
        check_every: at which calls of `save` the ranks agree, at least 1. Calls between them cost nothing, and what
            they take is lost to the grace period.

    Raises:
        UsageError: an argument is not such a number, or `signals` is empty or has one that no process can catch.
    """

    grace_s: float = 25.0
    signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGUSR1)
    check_every: int = 1

    def __post_init__(self) -> None:
        check_positive("OnPreemption(grace_s=...)", self.grace_s)
        check_count("OnPreemption(check_every=...)", self.check_every)
        try:
            signals = tuple(dict.fromkeys(signal.Signals(number) for number in self.signals))
        except (TypeError, ValueError) as error:
            text = f"OnPreemption(signals=...) takes a list of signals, such as [signal.SIGTERM], not {self.signals!r}"
            raise UsageError(text) from error
        if not signals or _UNCATCHABLE & set(signals):
            text = f"OnPreemption(signals=...) needs signals that a process can catch, not {self.signals!r}"
            raise UsageError(text)
        object.__setattr__(self, "signals", signals)

    def due(self, step: int, previous_step: int | None) -> bool:  # noqa: ARG002 - as every save policy's
        """Return False: no step is due by itself."""
        return False


def fits(needed_s: float | None, left_s: float) -> bool:
    """Say whether work is to be tried that is expected to take so long; None: nothing is known of it, so try."""
    return needed_s is None or needed_s <= left_s


def preemption_of(policies: Iterable[SavePolicy]) -> OnPreemption | None:
    """Return the one `OnPreemption` of a list.

    Raises:
        UsageError: there are several.
    """
    found = [policy for policy in policies if isinstance(policy, OnPreemption)]
    if len(found) > 1:
        raise UsageError("save=[...] has several OnPreemption: give one, with all signals")
    return found[0] if found else None


def save_is_due(policies: Iterable[SavePolicy], step: int, previous_step: int | None) -> bool:
    """Join save policies by their steps: True when any is due, and when there is none at all.

    Args:
        policies: the list that the training loop gave.
        step: as in `SavePolicy.due`.
        previous_step: as in `SavePolicy.due`.

    Returns:
        Whether to save now, as far as steps tell.
    """
    listed = list(policies)
    return not listed or any(policy.due(step, previous_step) for policy in listed)
