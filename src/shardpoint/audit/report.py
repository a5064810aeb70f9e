"""What an audit says: values that a command line prints, and how steps are spelled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shardpoint.journal import LifeSteps

Cause = Literal["data", "rng", "optimizer", "loss", "topology"]
Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in which two lives differ.

    Attributes:
        cause: what kind of thing.
        epoch: where.
        step: where.
        field: what it is called in the journal.
        then: what the earlier life has.
        now: what the later one has.
        message: one sentence.
    """

    cause: Cause
    epoch: int
    step: int
    field: str
    then: object
    now: object
    message: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Steps that two lives did.

    Attributes:
        now: the later life.
        then: the earlier one.
        first: epoch and step of the first of them.
        last: of the last.
        num_steps: how many.
        difference: the first thing that differs, or None: bit-exact.
        largest_relative: the largest relative difference of two losses.
        message: one sentence.
    """

    now: str
    then: str
    first: Position
    last: Position
    num_steps: int
    difference: Difference | None
    largest_relative: float
    message: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something else that is wrong.

    Attributes:
        kind: `"gap"`, `"twice"`, `"repeated"`, `"skipped"`, `"next_samples"` or `"damaged"`.
        message: one sentence.
    """

    kind: Literal["gap", "twice", "repeated", "skipped", "next_samples", "damaged"]
    message: str


@dataclass
class AuditReport:
    """What an audit found.

    Attributes:
        lives: the lives of the root's journal.
        comparisons: of the steps that were done more than once, in the order of the later lives.
        findings: what else is wrong.
        notes: what is no fault, and good to know.
    """

    lives: list[LifeSteps]
    comparisons: list[Comparison] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_compared(self) -> int:
        """How many steps were compared."""
        return sum(comparison.num_steps for comparison in self.comparisons)

    @property
    def ok(self) -> bool:
        """Whether everything that was done twice is bit-exact, and nothing else is wrong."""
        return not self.findings and all(comparison.difference is None for comparison in self.comparisons)

    def lines(self) -> Iterator[str]:
        """Yield what a person reads; the last line is the verdict."""
        spell = Speller(step.epoch for life in self.lives for step in life.steps)
        for life in self.lives:
            steps = spell.some(life.steps[0].position, life.steps[-1].position) if life.steps else "no steps"
            yield f"life {life.number}: {_origin_of(life)}, {steps}{_ranks_of(life)}"
        for compared in self.comparisons:
            yield f"{compared.now} against {compared.then}: {compared.message}"
        for finding in self.findings:
            yield f"{finding.kind}: {finding.message}"
        for note in self.notes:
            yield f"note: {note}"
        num_wrong = len(self.findings) + sum(compared.difference is not None for compared in self.comparisons)
        if num_wrong:
            yield f"NOT PROVEN: {num_wrong} thing{'' if num_wrong == 1 else 's'} to explain"
        elif self.num_compared:
            yield f"ok: every step that was done twice ({self.num_compared}) is bit-exact; nothing else is wrong"
        else:
            yield "ok: no step was done twice, so nothing was compared; nothing else is wrong"

    def as_json(self) -> dict[str, Any]:
        """Return the fields that `shardpoint audit --json` prints."""
        return {
            "ok": self.ok,
            "num_compared": self.num_compared,
            "lives": [
                {
                    "number": life.number,
                    "num_steps": len(life.steps),
                    "first": list(life.steps[0].position) if life.steps else None,
                    "last": list(life.steps[-1].position) if life.steps else None,
                    "resumed_from": life.life.resumed_from.name if life.life and life.life.resumed_from else None,
                    "world_size": life.life.world_size if life.life else None,
                    "layout": life.life.layout if life.life else None,
                }
                for life in self.lives
            ],
            "comparisons": [_plain(asdict(compared)) for compared in self.comparisons],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with every float that JSON has no form for as text."""
    return {
        name: _plain(value)
        if isinstance(value, dict)
        else (str(value) if isinstance(value, float) and not math.isfinite(value) else value)
        for name, value in fields.items()
    }


def _origin_of(life: LifeSteps) -> str:
    if life.life is None:
        return "its beginning is lost"
    return f"resumed from {life.life.resumed_from.name}" if life.life.resumed_from else "started afresh"


def _ranks_of(life: LifeSteps) -> str:
    if life.life is None:
        return ""
    ranks = f"{life.life.world_size} rank{'' if life.life.world_size == 1 else 's'}"
    return f", {ranks} ({life.life.layout})" if life.life.layout else f", {ranks}"


@dataclass
class Speller:
    """Says which step is meant; the epoch only where there are several."""

    epochs: Iterable[int]

    def __post_init__(self) -> None:
        self._several = len(set(self.epochs)) > 1

    def one(self, position: Position) -> str:
        """Spell a step."""
        epoch, step = position
        return f"epoch {epoch} step {step}" if self._several else f"step {step}"

    def some(self, first: Position, last: Position) -> str:
        """Spell a range of steps."""
        if first == last:
            return self.one(first)
        if first[0] == last[0]:
            steps = f"steps {first[1]}-{last[1]}"
            return f"epoch {first[0]} {steps}" if self._several else steps
        return f"{self.one(first)} to {self.one(last)}"


def some_of(indices: Sequence[int]) -> str:
    """Return the beginning of a list of samples, for a message."""
    shown = ", ".join(map(str, indices[:8]))
    return f"[{shown}, ... {len(indices)} in all]" if len(indices) > 8 else f"[{shown}]"  # noqa: PLR2004 - a line's worth
