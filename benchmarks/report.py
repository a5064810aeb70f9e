"""What was measured, as medians and ratios, in JSON and in Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Table:
    """The outcome of one case.

    Attributes:
        name: in JSON, and for the targets.
        title: above the table.
        unit: of the measurements: "s", "MB" or "x".
        measurements: by contender, one number per round; round i of one belongs to round i of the others.
        labels: what the contenders are called.
        reference: the contender that the others are divided by, if any.
        num_bytes: what was moved in a measurement, where GB/s mean something.
        columns: further numbers of the same rounds, by column and contender.
        notes: what is durable when the clock stops, by contender.
        settings: what a contender was set to.
        failures: why a contender is not in the table.
        remarks: sentences below the table.
    """

    name: str
    title: str
    unit: str
    measurements: dict[str, list[float]]
    labels: dict[str, str]
    reference: str | None = None
    num_bytes: int | None = None
    columns: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Some numbers in three."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Summary:
        """Summarise at least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"{short(self.median)}"
        return f"{short(self.median)} ({short(self.lowest)} to {short(self.highest)})"


def short(number: float) -> str:
    """Write a number with three significant digits, and no more decimals than they need.

    Examples:
        >>> [short(number) for number in (0.0123, 1.2345, 123.4, 5678.9)]
        ['0.0123', '1.23', '123', '5679']
    """
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def ratios(table: Table, above: str, below: str) -> list[float]:
    """Divide one contender's measurement by another's, round by round."""
    return [top / bottom for top, bottom in zip(table.measurements[above], table.measurements[below], strict=True)]


def best(table: Table, names: Sequence[str]) -> str | None:
    """Return which of the contenders has the lowest median; None if none was measured."""
    measured = [name for name in names if table.measurements.get(name)]
    return min(measured, key=lambda name: statistics.median(table.measurements[name])) if measured else None


def as_json(tables: Sequence[Table], facts: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that was measured, with medians and ratios."""
    cases = []
    for table in tables:
        medians = {name: statistics.median(numbers) for name, numbers in table.measurements.items() if numbers}
        case: dict[str, Any] = asdict(table) | {"medians": medians}
        if table.reference in table.measurements:
            case["ratios"] = {
                name: asdict(Summary.of(ratios(table, name, table.reference))) for name in table.measurements
            }
        cases.append(case)
    return {**facts, "cases": cases, "targets": list(targets)}


def as_markdown(tables: Sequence[Table], facts: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> str:
    """Return the report that a person reads."""
    parts = ["# Benchmarks", _facts_text(facts), "## Targets", targets_markdown(targets)]
    for table in tables:
        parts += [f"## {table.title}", table_markdown(table)]
        parts += table.remarks
        parts += [f"Left out: {table.labels[name]}: {why}" for name, why in table.failures.items()]
    settings: dict[str, str] = {}
    for table in tables:
        settings |= {table.labels[name]: text for name, text in table.settings.items() if text}
    parts += ["## Settings", _rows(["what", "set to"], [list(item) for item in settings.items()])]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_markdown(table: Table) -> str:
    """Return one case as a Markdown table, with the columns that it has."""
    reference = table.reference if table.reference in table.measurements else None
    head = ["what", {"s": "seconds", "MB": "MB", "x": "times"}[table.unit]]
    head += ["GB/s"] if table.num_bytes is not None else []
    head += [f"times {table.labels[reference]}"] if reference is not None else []
    head += list(table.columns)
    head += ["durable by"] if table.notes else []
    rows = []
    for name, numbers in table.measurements.items():
        if not numbers:
            continue
        median = statistics.median(numbers)
        row = [table.labels[name], str(Summary.of(numbers))]
        if table.num_bytes is not None:
            row.append(short(table.num_bytes / median / 1e9) if median > 0 else "")
        if reference is not None:
            row.append(str(Summary.of(ratios(table, name, reference))))
        row += [str(Summary.of(column[name])) if column.get(name) else "" for column in table.columns.values()]
        row += [table.notes.get(name, "")] if table.notes else []
        rows.append(row)
    return _rows(head, rows)


def targets_markdown(targets: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of targets."""
    rows = [[target["what"], target["target"], target["measured"], target["verdict"]] for target in targets]
    return _rows(["what", "target", "measured", ""], rows)


def _facts_text(facts: Mapping[str, Any]) -> str:
    machine, options = facts.get("machine", {}), facts.get("options", {})
    lines = [f"{facts.get('date', '')}, commit {facts.get('commit', '')}."]
    lines += [f"{key}: {value}" for key, value in {**machine, **options}.items()]
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()))
    return "\n".join([lines[0], "", *(f"- {line}" for line in lines[1:])])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *(line(row) for row in rows)])
