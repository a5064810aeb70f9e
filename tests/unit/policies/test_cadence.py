from __future__ import annotations

import dataclasses
import math
import pickle
import signal
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.errors import UsageError
from shardpoint.policies import At, Every, OnPreemption, SavePolicy, fits, preemption_of, save_is_due


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


def test_every_so_many_seconds_asks_for_no_step() -> None:
    policy = Every(seconds=2.5, check_every=3)
    assert asked_at(policy, range(100)) == []
    assert [policy.due_after(seconds) for seconds in (0.0, 2.4, 2.5, 1e9)] == [False, False, True, True]
    assert not Every(steps=1).due_after(1e9)


@pytest.mark.parametrize(
    "wanted,asked,resumed_from,saved",
    [
        ([5, 9], range(1, 12), None, [5, 9]),
        ([9, 5, 5], range(1, 12), None, [5, 9]),  # any order
        ([5], [2, 4, 6, 8], None, [6]),  # passed
        ([5, 6, 7], [4, 8, 12], None, [8]),  # several at once
        ([5], [3, 5, 5, 6], None, [5]),  # asked twice
        ([0], [0, 1, 2], None, [0]),
        ([2], [3, 6], None, [3]),  # passed before the first call of a fresh run
        ([5], [6, 7], 5, []),  # resumed from it
        ([5], [6, 7], 5 + 1, []),
        ([5], [5, 6], 4, [5]),
        ([5], [6, 8], 4, [6]),
        ([2, 5], [1, 2, 3, 1, 2, 3], None, [2, 2]),  # counted anew in each epoch
        ([2], [3, 6, 3, 6], None, [3, 3]),
        ([5], range(1, 4), None, []),
    ],
)
def test_at(wanted: list[int], asked: Sequence[int], resumed_from: int | None, saved: list[int]) -> None:
    assert asked_at(At(wanted), asked, resumed_from=resumed_from) == saved


@given(
    wanted=st.sets(st.integers(0, 60), min_size=1, max_size=6),
    strides=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    ends=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4),
)
def test_at_over_lives_that_end_and_resume(wanted: set[int], strides: list[int], ends: list[tuple[int, int]]) -> None:
    """Each life asks up to some call, and the next resumes from one of the calls before it, or starts afresh."""
    calls = [sum(strides[: count + 1]) for count in range(len(strides))]
    first = 0  # the index of the life's first call
    for last, back in [*ends, (len(calls), 0)]:
        life = calls[first : max(last, first)]
        resumed_from = calls[first - 1] if first else None
        # Naively: of the steps that the state does not have behind it, each has one first call that is not before it.
        behind = -1 if resumed_from is None else resumed_from
        expected = {min(step for step in life if step >= w) for w in wanted if w > behind and max([*life, -1]) >= w}
        assert asked_at(At(sorted(wanted)), life, resumed_from=resumed_from) == sorted(expected)
        first = max(0, min(max(last, first), len(calls)) - back)


@given(steps=st.integers(1, 12), strides=st.lists(st.integers(1, 30), max_size=20), resumed_from=st.integers(0, 40))
def test_every_against_counting_one_by_one(steps: int, strides: list[int], resumed_from: int) -> None:
    step, saved, expected = resumed_from, [], []
    for stride in strides:
        if any(passed % steps == 0 for passed in range(step + 1, step + stride + 1)):
            expected.append(step + stride)
        if Every(steps=steps).due(step + stride, step):
            saved.append(step + stride)
        step += stride
    assert saved == expected


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3"])
def test_counts_are_checked(value: object) -> None:
    with pytest.raises(UsageError, match=r"Every\(steps=...\) takes a whole number of at least 1, not "):
        Every(steps=value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Every\(check_every=...\)"):
        Every(seconds=1, check_every=value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"OnPreemption\(check_every=...\)"):
        OnPreemption(check_every=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, True, "3", math.nan, math.inf])
def test_seconds_are_checked(value: object) -> None:
    with pytest.raises(UsageError, match=r"Every\(seconds=...\) takes a finite number greater than 0, not "):
        Every(seconds=value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"OnPreemption\(grace_s=...\)"):
        OnPreemption(grace_s=value)  # type: ignore[arg-type]


def test_every_takes_one_of_the_two() -> None:
    with pytest.raises(UsageError, match="either steps or seconds"):
        Every()
    with pytest.raises(UsageError, match="either steps or seconds"):
        Every(steps=4, seconds=4)
    with pytest.raises(UsageError, match="belongs to seconds"):
        Every(steps=4, check_every=2)


@pytest.mark.parametrize("value", [[], [1, -1], [True], [1.0], "12", 5, None, ["5"]])
def test_what_at_takes(value: object) -> None:
    with pytest.raises(UsageError, match="a list of whole numbers"):
        At(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [[], signal.SIGTERM, [signal.SIGKILL], [signal.SIGSTOP, signal.SIGTERM], [0], ["USR1"]]
)
def test_which_signals_can_tell_of_a_preemption(value: object) -> None:
    with pytest.raises(UsageError, match=r"OnPreemption\(signals=...\)"):
        OnPreemption(signals=value)  # type: ignore[arg-type]


def test_a_preemption_asks_for_no_step_and_is_one() -> None:
    policy = OnPreemption(grace_s=9, signals=(signal.SIGUSR2, signal.SIGUSR2))
    assert policy.signals == (signal.SIGUSR2,)
    assert OnPreemption().signals == (signal.SIGTERM, signal.SIGUSR1)
    assert asked_at(policy, range(100)) == []
    assert preemption_of([Every(steps=4), policy]) is policy
    assert preemption_of([Every(steps=4)]) is None
    with pytest.raises(UsageError, match="several OnPreemption"):
        preemption_of([policy, OnPreemption()])


def test_what_fits() -> None:
    assert fits(None, -5.0)  # nothing is known: try
    assert fits(3.0, 3.0)
    assert not fits(3.1, 3.0)
    assert not fits(0.0, -0.1)


@pytest.mark.parametrize("policy", [Every(steps=4), Every(seconds=0.5), At([3, 4]), OnPreemption()], ids=repr)
def test_policies_are_frozen_values(policy: SavePolicy) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(pickle.loads(pickle.dumps(policy))) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, dataclasses.fields(policy)[0].name, 5)  # type: ignore[arg-type]  # a dataclass


def test_no_save_policy_saves_at_every_call_and_several_are_joined_by_or() -> None:
    assert save_is_due([], 0, None)
    assert save_is_due([Every(steps=4), Every(steps=3)], 6, 5)
    assert not save_is_due([Every(steps=4), Every(steps=3)], 7, 6)
    assert not save_is_due([OnPreemption()], 7, 6)
