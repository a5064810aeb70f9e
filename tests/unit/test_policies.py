from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest

from shardpoint.errors import UsageError
from shardpoint.policies import Committed, Every, KeepPolicy, Latest, SavePolicy, names_to_keep, save_is_due


@dataclass(frozen=True)
class Info:
    name: str
    sequence: int
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


def asked_at(policy: SavePolicy, steps: Sequence[int], *, resumed_from: int | None = None) -> list[int]:
    saved, previous = [], resumed_from
    for step in steps:
        if policy.due(step, previous):
            saved.append(step)
        previous = step
    return saved


def test_every_saves_at_positive_multiples_only() -> None:
    assert asked_at(Every(steps=4), range(13)) == [4, 8, 12]
    assert asked_at(Every(steps=1), range(4)) == [1, 2, 3]


def test_every_counts_from_zero_after_an_off_multiple_resume() -> None:
    assert asked_at(Every(steps=4), range(8, 14), resumed_from=7) == [8, 12]
    assert asked_at(Every(steps=4), range(10, 14), resumed_from=9) == [12]


def test_every_does_not_save_again_just_after_resuming_at_a_multiple() -> None:
    assert asked_at(Every(steps=4), range(9, 13), resumed_from=8) == [12]


def test_every_catches_a_multiple_that_a_stride_passed() -> None:
    assert asked_at(Every(steps=4), range(3, 25, 3)) == [6, 9, 12, 18, 21, 24]
    assert asked_at(Every(steps=500), [7, 498, 505, 512, 1004]) == [505, 1004]


def test_every_works_for_loops_that_count_steps_anew_in_each_epoch() -> None:
    assert asked_at(Every(steps=4), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]) == [4, 4]
    assert asked_at(Every(steps=4), [4, 4, 4]) == [4, 4, 4]
    assert asked_at(Every(steps=4), [3, 6, 9, 3, 6]) == [6, 9, 6]


def test_every_asked_twice_about_one_step_that_is_no_multiple_stays_quiet() -> None:
    assert asked_at(Every(steps=4), [5, 5, 5], resumed_from=4) == []


def test_latest_keeps_the_last_commits_whatever_their_steps_and_names() -> None:
    infos = [Info("epoch-0_step-90", 1, 90), Info("epoch-0_step-8", 2, 8), Info("epoch-0_step-100", 3, 100)]
    assert Latest(1).keep(infos) == {"epoch-0_step-100"}
    assert Latest(2).keep(infos) == {"epoch-0_step-8", "epoch-0_step-100"}
    assert Latest(9).keep(infos) == {info.name for info in infos}
    assert Latest(2).keep([]) == frozenset()


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_counts_are_checked(value: object) -> None:
    with pytest.raises(UsageError, match=r"at least 1, not "):
        Every(steps=value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Latest\(\.\.\.\)"):
        Latest(value)  # type: ignore[arg-type]


def test_policies_are_frozen_values() -> None:
    assert Every(steps=4) == Every(steps=4)
    assert hash(Latest(3)) == hash(Latest(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Every(steps=4).steps = 5  # type: ignore[misc]


@dataclass(frozen=True)
class Named:
    names: frozenset[str]

    def keep(self, committed: Sequence[Committed]) -> frozenset[str]:
        assert [info.sequence for info in committed] == sorted(info.sequence for info in committed)
        return self.names


def test_keep_policies_are_joined_by_union_and_the_last_commit_always_stays() -> None:
    infos = [Info("d", 4), Info("a", 1), Info("c", 3), Info("b", 2)]
    policies: list[KeepPolicy] = [Latest(2), Named(frozenset({"a", "gone"}))]
    assert names_to_keep(policies, infos) == {"a", "c", "d"}
    assert names_to_keep([Named(frozenset())], infos) == {"d"}
    assert names_to_keep([Named(frozenset())], []) == frozenset()


def test_no_keep_policy_keeps_everything() -> None:
    assert names_to_keep([], [Info("a", 1), Info("b", 2)]) == {"a", "b"}


def test_no_save_policy_saves_at_every_call_and_several_are_joined_by_or() -> None:
    assert save_is_due([], 0, None)
    assert save_is_due([Every(steps=4), Every(steps=3)], 6, 5)
    assert not save_is_due([Every(steps=4), Every(steps=3)], 7, 6)
