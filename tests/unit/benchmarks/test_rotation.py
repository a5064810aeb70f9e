from __future__ import annotations

import pytest

from benchmarks.rotation import WARM_UP, rotate, rounds


def test_every_round_has_every_contender_once_and_begins_with_another() -> None:
    orders = [order for number, order in rounds(["a", "b", "c"], 6) if number != WARM_UP]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert [order[0] for order in orders] == ["a", "b", "c", "a", "b", "c"]


def test_the_warm_up_round_comes_first_and_can_be_left_out() -> None:
    assert [number for number, _ in rounds(["a"], 2)] == [WARM_UP, 0, 1]
    assert [number for number, _ in rounds(["a"], 2, warm_up=False)] == [0, 1]


def test_measurements_are_interleaved_and_the_warm_up_does_not_count() -> None:
    seen: list[tuple[str, int]] = []

    def measure(name: str, number: int) -> int:
        seen.append((name, number))
        return number

    result = rotate(["a", "b"], 2, measure, failure=RuntimeError, recover=lambda _: None)
    assert seen == [("a", WARM_UP), ("b", WARM_UP), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert result.measurements == {"a": [0, 1], "b": [0, 1]}
    assert result.failures == {}


@pytest.mark.parametrize("bad_round", [WARM_UP, 0, 1])
def test_a_contender_that_fails_is_left_out_with_the_reason(bad_round: int) -> None:
    recovered: list[str] = []

    def measure(name: str, number: int) -> float:
        if (name, number) == ("b", bad_round):
            raise RuntimeError("cannot")
        return 1.0

    result = rotate(["a", "b", "c"], 2, measure, failure=RuntimeError, recover=recovered.append)
    assert result.measurements == {"a": [1.0, 1.0], "c": [1.0, 1.0]}
    assert result.failures == {"b": "cannot"}
    assert recovered == ["b"]


def test_another_error_ends_everything() -> None:
    def measure(name: str, number: int) -> float:
        raise KeyError(name, number)

    with pytest.raises(KeyError):
        rotate(["a"], 1, measure, failure=RuntimeError, recover=lambda _: None)
