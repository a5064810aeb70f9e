"""When to save, and which committed checkpoints to keep?

Policies are small frozen values that decide from plain facts; they read no file and know no rank. A training loop lists
them: `Checkpointer(root, save=[Every(steps=500)], keep=[Latest(3)])`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardpoint.errors import UsageError


class Committed(Protocol):
    """What a keep policy is told about one committed checkpoint."""

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


class KeepPolicy(Protocol):
    """Decides which committed checkpoints stay. Several in a list keep the union of what each keeps."""

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Choose what stays.

        Args:
            committed: every committed checkpoint of the root, in the order of their commits (the oldest first).

        Returns:
            The names to keep. What no policy of the list names is pruned, but for the last committed one, which stays.
        """


@dataclass(frozen=True, slots=True)
class Every:
    """Save at each positive multiple of `steps`.

    Multiples count from step 0, not from where a run resumed: after a forced save at step 7, `Every(steps=4)` saves at
    8. A loop that asks in strides saves at the first step at or after each multiple.

    Args:
        steps: at least 1.

    Raises:
        UsageError: `steps` is no whole number of at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_count("Every(steps=...)", self.steps)

    def due(self, step: int, previous_step: int | None) -> bool:
        """Return True when `step` is a positive multiple, or when a multiple was passed since the previous call."""
        if step <= 0:
            return False
        if step % self.steps == 0:
            return True
        if previous_step is None or previous_step == step:
            return False
        # Steps that went down were counted anew (a new epoch): nothing has been passed yet but what lies below `step`.
        passed = previous_step if previous_step < step else 0
        return step // self.steps > passed // self.steps


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
        _check_count("Latest(...)", self.count)

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        """Return the names of the last `count`."""
        return frozenset(info.name for info in committed[-self.count :])


def save_is_due(policies: Iterable[SavePolicy], step: int, previous_step: int | None) -> bool:
    """Join save policies: True when any is due, and when there is none at all.

    Args:
        policies: the list that the training loop gave.
        step: as in `SavePolicy.due`.
        previous_step: as in `SavePolicy.due`.

    Returns:
        Whether to save now.
    """
    listed = list(policies)
    return not listed or any(policy.due(step, previous_step) for policy in listed)


def names_to_keep(policies: Iterable[KeepPolicy], committed: Iterable[Committed]) -> frozenset[str]:
    """Join keep policies: the union of what each keeps, and always the last committed one.

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
    kept = {ordered[-1].name}.union(*(policy.keep(ordered) for policy in listed))
    return everything & kept


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        message = f"{what} takes a whole number of at least 1, not {value!r}"
        raise UsageError(message)
