"""In which order are the contenders measured, and what happens to one that fails?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

WARM_UP = -1
Measurement = TypeVar("Measurement")


def rounds(names: Sequence[str], num_rounds: int, *, warm_up: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield a warm-up round, if wanted, and the measured ones, each with every contender once.

    The first contender of a round is the second of the round before, so that none is always measured right after the
    same other one's deletions and write-backs.

    Examples:
        >>> list(rounds(["a", "b", "c"], 2))
        [(-1, ['a', 'b', 'c']), (0, ['a', 'b', 'c']), (1, ['b', 'c', 'a'])]
    """
    for number in range(WARM_UP if warm_up else 0, num_rounds):
        shift = max(number, 0) % len(names)
        yield number, [*names[shift:], *names[:shift]]


@dataclass
class Rotation(Generic[Measurement]):
    """The outcome of some rounds.

    Attributes:
        measurements: by contender, one per measured round.
        failures: why a contender was left out, by contender.
    """

    measurements: dict[str, list[Measurement]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def rotate(
    names: Sequence[str],
    num_rounds: int,
    measure: Callable[[str, int], Measurement],
    *,
    failure: type[Exception],
    recover: Callable[[str], None],
    warm_up: bool = True,
) -> Rotation[Measurement]:
    """Measure the contenders in turn. One that fails is left out of all further rounds, with the reason.

    Args:
        names: the contenders.
        num_rounds: how many rounds are measured.
        measure: measures one contender in one round.
        failure: what `measure` raises when a contender cannot do it.
        recover: called after a failure of a contender, so that the others can go on.
        warm_up: begin with a round that is not counted.

    Returns:
        The measurements of those that took part in every round.
    """
    result: Rotation[Measurement] = Rotation({name: [] for name in names})
    for number, order in rounds(names, num_rounds, warm_up=warm_up):
        for name in order:
            if name in result.failures:
                continue
            try:
                measurement = measure(name, number)
            except failure as error:
                result.failures[name] = str(error)
                del result.measurements[name]
                recover(name)
                continue
            if number != WARM_UP:
                result.measurements[name].append(measurement)
    return result
