from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.errors import UsageError
from shardpoint.policies import (
    Best,
    Committed,
    EveryNth,
    KeepPolicy,
    Latest,
    NewerThan,
    Pinned,
    names_to_keep,
)

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Info:
    name: str
    sequence: int
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    created_utc: str = "2026-11-24T12:00:00Z"


@dataclass(frozen=True)
class Judged(Info):
    is_healthy: bool = True
    is_pinned: bool = False


def at_steps(*steps: int) -> list[Info]:
    return [Info(f"step-{step}", number, step) for number, step in enumerate(steps)]


def with_metric(*values: float | None) -> list[Info]:
    return [
        Info(f"n{number}", number, metrics={} if value is None else {"loss": value, "other": -value})
        for number, value in enumerate(values)
    ]


def ago(*days: float) -> list[Info]:
    times = [(NOON - timedelta(days=number)).strftime("%Y-%m-%dT%H:%M:%SZ") for number in days]
    return [Info(f"n{number}", number, created_utc=time) for number, time in enumerate(times)]


def numbers(kept: frozenset[str]) -> list[int]:
    return sorted(int(name.strip("n").removeprefix("step-")) for name in kept)


def test_latest_keeps_the_last_commits_whatever_their_steps_and_names() -> None:
    infos = [Info("epoch-0_step-90", 1, 90), Info("epoch-0_step-8", 2, 8), Info("epoch-0_step-100", 3, 100)]
    assert Latest(1).keep(infos) == {"epoch-0_step-100"}
    assert Latest(2).keep(infos) == {"epoch-0_step-8", "epoch-0_step-100"}
    assert Latest(9).keep(infos) == {info.name for info in infos}
    assert Latest(2).keep([]) == frozenset()


@pytest.mark.parametrize(
    "count,mode,values,kept",
    [
        (1, "min", [3.0, 1.0, 2.0], [1]),
        (1, "max", [3.0, 1.0, 2.0], [0]),
        (2, "min", [3.0, 1.0, 2.0], [1, 2]),
        (9, "max", [3.0, None, 2.0], [0, 2]),
        (1, "min", [None, math.nan, 5.0], [2]),
        (1, "max", [math.nan, -5.0], [1]),
        (2, "max", [math.nan, None, math.nan], []),
        (1, "max", [1.0, 1.0, 1.0], [0]),  # a metric that stands still replaces nothing
        (1, "min", [1.0, 1.0, 1.0], [0]),
        (2, "max", [0.5, 1.0, 1.0, 1.0], [1, 2]),
        (1, "max", [1.0, math.inf], [1]),
        (1, "min", [math.inf, 1.0, -math.inf], [2]),
        (1, "min", [], []),
    ],
)
def test_best(count: int, mode: str, values: list[float | None], kept: list[int]) -> None:
    assert numbers(Best(count, metric="loss", mode=mode).keep(with_metric(*values))) == kept  # type: ignore[arg-type]


@given(st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(-4, 4).map(float)), max_size=9), st.integers(1, 4))
def test_best_against_a_tournament(values: list[float | None], count: int) -> None:
    rest = [number for number, value in enumerate(values) if value is not None and value == value]  # noqa: PLR0124 - not NaN
    expected: list[int] = []
    while rest and len(expected) < count:
        winner = rest[0]
        for number in rest:
            if values[number] > values[winner]:  # type: ignore[operator]  # not None
                winner = number
        rest.remove(winner)
        expected.append(winner)
    assert numbers(Best(count, metric="loss", mode="max").keep(with_metric(*values))) == sorted(expected)
    assert numbers(Best(count, metric="other", mode="min").keep(with_metric(*values))) == sorted(expected)


@pytest.mark.parametrize(
    "steps,kept",
    [
        ([100, 200, 300, 400], [200, 400]),
        ([0, 100], []),  # below the first multiple
        ([150, 250, 350, 450], [250, 450]),  # in strides that miss the multiples
        ([205, 210, 390], [205]),
        ([210, 205], [205]),  # by step, not by commit
        ([199, 1000], [1000]),
        ([], []),
    ],
)
def test_every_nth(steps: list[int], kept: list[int]) -> None:
    assert numbers(EveryNth(200).keep(at_steps(*steps))) == kept


def test_every_nth_keeps_the_same_step_of_each_epoch() -> None:
    infos = [Info("epoch-0_step-200", 1, 200), Info("epoch-0_step-300", 2, 300), Info("epoch-1_step-200", 3, 200)]
    assert EveryNth(200).keep(infos) == {"epoch-0_step-200", "epoch-1_step-200"}


@given(st.lists(st.integers(0, 60), unique=True, max_size=12), st.integers(1, 15))
def test_every_nth_against_a_walk_over_the_multiples_and_stays_when_pruned(steps: list[int], nth: int) -> None:
    expected = set()
    for multiple in range(nth, 61, nth):
        candidates = [step for step in range(multiple, multiple + nth) if step in steps]
        expected |= set(candidates[:1])
    kept = numbers(EveryNth(nth).keep(at_steps(*steps)))
    assert kept == sorted(expected)
    assert numbers(EveryNth(nth).keep(at_steps(*kept))) == kept


@pytest.mark.parametrize(
    "days,kept",
    [
        ([3, 2, 1, 0], [2, 3]),
        ([10], [0]),  # measured from the last commit, not from today
        ([12, 11, 10], [0, 1, 2][1:]),
        ([0, 5], [0, 1]),  # the clock was set back: what looks newer than the last stays
        ([1, 0, -400], [2]),  # it leapt into the future: what was before looks old
        ([1, 0, -400, 0], [0, 1, 2, 3]),  # and was put right again
        ([], []),
    ],
)
def test_newer_than(days: list[float], kept: list[int]) -> None:
    assert numbers(NewerThan(days=1.5).keep(ago(*days))) == kept


def test_a_time_that_cannot_be_read_is_no_reason_to_prune() -> None:
    infos = [dataclasses.replace(info, created_utc="?") if info.name == "n0" else info for info in ago(9, 8, 0)]
    assert numbers(NewerThan(days=1).keep(infos)) == [0, 2]
    unreadable = [dataclasses.replace(info, created_utc="") for info in infos]
    assert numbers(NewerThan(days=1).keep(unreadable)) == [0, 1, 2]
    last = [*ago(9, 0), Info("n2", 2, created_utc="once upon a time")]
    assert numbers(NewerThan(days=1).keep(last)) == [1, 2]
    naive = [*ago(9, 0), Info("n2", 2, created_utc="2026-11-24T13:00:00")]
    assert numbers(NewerThan(days=1).keep(naive)) == [1, 2]


@given(st.lists(st.integers(-400, 400), max_size=9), st.integers(1, 200))
def test_newer_than_against_whole_hours(hours: list[int], limit: int) -> None:
    infos = ago(*(number / 24 for number in hours))
    expected = [number for number, age in enumerate(hours) if age - hours[-1] < limit]
    assert numbers(NewerThan(days=limit / 24).keep(infos)) == expected


def test_pinned_keeps_names_that_are_there() -> None:
    assert Pinned(["step-2", "step-7"]).keep(at_steps(1, 2, 3)) == {"step-2"}
    assert Pinned([]).keep(at_steps(1)) == frozenset()


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_counts_are_checked(value: object) -> None:
    makers: list[Callable[[Any], KeepPolicy]] = [Latest, EveryNth, lambda n: Best(n, metric="loss", mode="min")]
    for make in makers:
        with pytest.raises(UsageError, match=r"\(\.\.\.\) takes a whole number of at least 1, not "):
            make(value)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="'min' or 'max'"):
        Best(1, metric="loss", mode="least")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a metric's name"):
        Best(1, metric="", mode="min")
    for days in (0, -1, math.nan, math.inf, "7", True):
        with pytest.raises(UsageError, match=r"NewerThan\(days=...\)"):
            NewerThan(days=days)  # type: ignore[arg-type]
    for names in ("epoch-0_step-5", 5, None, [5], b"ab"):
        with pytest.raises(UsageError, match="a list of checkpoints' names"):
            Pinned(names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [Latest(3), Best(1, metric="loss", mode="min"), EveryNth(9), NewerThan(days=1), Pinned(["a"])],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_are_frozen_values(policy: KeepPolicy) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(pickle.loads(pickle.dumps(policy))) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, dataclasses.fields(policy)[0].name, 5)  # type: ignore[arg-type]  # a dataclass


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


def test_the_last_healthy_one_and_what_is_pinned_stay() -> None:
    infos = [
        Judged("a", 1, is_pinned=True),
        Judged("b", 2),
        Judged("c", 3),
        Judged("d", 4, is_healthy=False),
        Judged("e", 5, is_healthy=False),
    ]
    assert names_to_keep([Latest(1)], infos) == {"a", "c", "e"}
    assert names_to_keep([Latest(1)], infos[3:]) == {"e"}
    assert names_to_keep([Latest(1)], [*infos, Judged("f", 6)]) == {"a", "f"}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.booleans(), st.floats(allow_nan=True)), max_size=10),
    st.lists(
        st.one_of(
            st.integers(1, 4).map(Latest),
            st.integers(1, 9).map(EveryNth),
            st.builds(Best, st.integers(1, 3), metric=st.just("loss"), mode=st.sampled_from(["min", "max"])),
            st.integers(1, 9).map(lambda days: NewerThan(days=days)),
            st.sets(st.integers(0, 9).map(lambda number: f"n{number}")).map(Pinned),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_more_policies_never_keep_less_and_something_good_always_stays(
    drawn: list[tuple[int, bool, bool, float]], policies: list[KeepPolicy]
) -> None:
    infos = [
        Judged(f"n{number}", number, step, {"loss": loss}, is_healthy=healthy, is_pinned=pinned)
        for number, (step, healthy, pinned, loss) in enumerate(drawn)
    ]
    kept = names_to_keep(policies, reversed(infos))
    assert kept <= {info.name for info in infos}
    assert all(policy.keep(infos) <= kept for policy in policies)
    assert {info.name for info in infos if info.is_pinned} <= kept
    assert not infos or infos[-1].name in kept
    assert not any(info.is_healthy for info in infos) or any(info.is_healthy and info.name in kept for info in infos)
    # And nothing else does.
    why = {info.name for info in infos if info.is_pinned or info is infos[-1]}
    why |= {info.name for info in [info for info in infos if info.is_healthy][-1:]}
    assert kept == why.union(*(policy.keep(infos) for policy in policies))
