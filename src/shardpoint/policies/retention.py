"""Which committed checkpoints to keep: the last, the best, one for every so many steps, the recent, the pinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from shardpoint.errors import UsageError
from shardpoint.policies.numbers import check_count, check_positive

_DAY_S = 86_400.0


class Committed(Protocol):
    """What a keep policy is told about one committed checkpoint.

    It may have two attributes more: `is_healthy`, False for one that is suspected to be of no use, and `is_pinned`,
    True for one that a person wants to stay.
    """

    @property
    def name(self) -> str:
        """The checkpoint's directory in the root: `"epoch-1_step-500"`."""

    @property
    def sequence(self) -> int:
        """The commit's number; a later commit has a greater one."""

    @property
    def step(self) -> int:
        """The step that was saved."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the training loop said about it; empty when it said nothing."""

    @property
    def created_utc(self) -> str:
        """The coordinator's wall clock when it was committed: `"2026-11-24T12:00:00Z"`."""


class KeepPolicy(Protocol):
    """Decides which committed checkpoints stay. Several in a list keep the union of what each keeps."""

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Choose what stays.

        Args:
            committed: every committed checkpoint of the root, in the order of their commits (the oldest first).

        Returns:
            The names to keep. What no policy of the list names is pruned, but for the last committed one, the last
            healthy one, and those that are pinned, which stay.
        """


@dataclass(frozen=True, slots=True)
class Latest:
    """Keep the last `count` committed checkpoints, by the order of their commits (never by step, name or file time).

    Args:
        count: at least 1.

    Raises:
        UsageError: `count` is no whole number of at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        check_count("Latest(...)", self.count)

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return the names of the last `count`."""
        return frozenset(info.name for info in committed[-self.count :])


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `count` checkpoints with the best value of a metric.

    The metric is one of those given to `Checkpointer.save(metrics=...)`. A checkpoint without it does not count, nor
    does one where it is NaN. Of equal values the one that was committed first is the better: a metric that stands
    still replaces nothing.

    Args:
        count: at least 1.
        metric: the metric's name.
        mode: `"min"` where less is better (a loss), `"max"` where more is (a reward).

    Raises:
        UsageError: an argument is something else.
    """

    count: int
    metric: str = field(kw_only=True)
    mode: Literal["min", "max"] = field(kw_only=True)

    def __post_init__(self) -> None:
        check_count("Best(...)", self.count)
        metric: object = self.metric
        if not isinstance(metric, str) or not metric or self.mode not in ("min", "max"):
            text = f"Best takes a metric's name and a mode, 'min' or 'max', not {self.metric!r} and {self.mode!r}"
            raise UsageError(text)

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return the names of the best `count`."""
        scored = [info for info in committed if not math.isnan(info.metrics.get(self.metric, math.nan))]
        # Sorting is stable, reversed too: among equals the order of the commits stays.
        ranked = sorted(scored, key=lambda info: info.metrics[self.metric], reverse=self.mode == "max")
        return frozenset(info.name for info in ranked[: self.count])


@dataclass(frozen=True, slots=True)
class EveryNth:
    """Keep one checkpoint for each positive multiple of `steps`: the first at or after it.

    For each multiple `m`, of the checkpoints with `m <= step < m + steps`, those with the lowest step stay (several
    where a loop counts steps anew in each epoch). So it fits saves that are due by the clock or in strides, too.
    What lies below the first multiple is not kept.

    Args:
        steps: at least 1.

    Raises:
        UsageError: `steps` is no whole number of at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count("EveryNth(...)", self.steps)

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return the names of the first at or after each multiple."""
        lowest: dict[int, int] = {}
        for info in committed:
            multiple = info.step // self.steps
            lowest[multiple] = min(info.step, lowest.get(multiple, info.step))
        return frozenset(
            info.name
            for info in committed
            if (multiple := info.step // self.steps) > 0 and info.step == lowest[multiple]
        )


@dataclass(frozen=True, slots=True)
class NewerThan:
    """Keep what was committed less than so many days before the last commit.

    Both times are the ones that the manifests tell, from the coordinators' wall clocks, so a pause between two runs
    makes nothing old before the next commit. Clocks that jump: one that is set back makes earlier checkpoints look
    newer, and they stay longer; one that leaps into the future makes all earlier ones look old, and they go. Name
    `Latest` beside it where clocks cannot be trusted. A time that cannot be read is no reason to prune.

    Args:
        days: greater than 0; may be a fraction.

    Raises:
        UsageError: `days` is no finite number greater than 0.
    """

    days: float

    def __post_init__(self) -> None:
        check_positive("NewerThan(days=...)", self.days)

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return the names of those that are not older."""
        times = {info.name: _time_of(info.created_utc) for info in committed}
        now = next((time for info in reversed(committed) if (time := times[info.name]) is not None), None)
        return frozenset(
            name
            for name, time in times.items()
            if now is None or time is None or (now - time).total_seconds() < self.days * _DAY_S
        )


@dataclass(frozen=True, slots=True)
class Pinned:
    """Keep the checkpoints of these names, for as long as the training loop says so.

    `shardpoint pin` pins a checkpoint from outside, and for every run.

    Args:
        names: the checkpoints' names; they need not be there yet.

    Raises:
        UsageError: `names` is no list of names.
    """

    names: frozenset[str]

    def __init__(self, names: Iterable[str]) -> None:
        text = f"Pinned(...) takes a list of checkpoints' names, such as ['epoch-0_step-500'], not {names!r}"
        try:
            listed = list(names)
        except TypeError as error:
            raise UsageError(text) from error
        # A text would be a list of its letters.
        if isinstance(names, str) or {type(name) for name in listed} - {str}:
            raise UsageError(text)
        object.__setattr__(self, "names", frozenset(listed))

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return those of the names that are there."""
        return self.names & {info.name for info in committed}


def names_to_keep(policies: Iterable[KeepPolicy], committed: Iterable[Committed]) -> frozenset[str]:
    """Join keep policies: the union of what each keeps, with what stays in any case.

    That is the last committed checkpoint, the last healthy one, and those that are pinned.

    Args:
        policies: the list that the training loop gave; when it is empty, everything is kept.
        committed: every committed checkpoint of the root, in any order.

    Returns:
        The names to keep; every other one may be pruned.
    """
    listed = list(policies)
    ordered = sorted(committed, key=lambda info: info.sequence)
    everything = frozenset(info.name for info in ordered)
    if not listed or not ordered:
        return everything
    stays = {ordered[-1].name} | {info.name for info in ordered if _flag(info, "is_pinned", default=False)}
    healthy = [info for info in ordered if _flag(info, "is_healthy", default=True)]
    stays |= {info.name for info in healthy[-1:]}
    return everything & stays.union(*(policy.keep(ordered) for policy in listed))


def _flag(info: Committed, name: str, *, default: bool) -> bool:
    return bool(getattr(info, name, default))


def _time_of(created_utc: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(created_utc)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
