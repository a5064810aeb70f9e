"""How a rotation's measurements become a table with the contenders' names and promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders import ENTRIES
from benchmarks.report import Table


def table_of(
    name: str,
    title: str,
    measurements: Mapping[str, Sequence[float]],
    failures: Mapping[str, str],
    *,
    durable: bool = True,
    **options: Any,
) -> Table:
    """Make a table of a rotation's outcome.

    Args:
        name: of the table.
        title: above it.
        measurements: by contender.
        failures: by contender.
        durable: the case writes, so that the table says what is durable.
        **options: `Table`'s other fields.
    """
    names = [*measurements, *failures]
    entries = {name: ENTRIES[name] for name in names if name in ENTRIES}
    return Table(
        name=name,
        title=title,
        unit=options.pop("unit", "s"),
        measurements={name: list(numbers) for name, numbers in measurements.items()},
        labels={name: entries[name].label if name in entries else name for name in names},
        notes={name: entry.durability for name, entry in entries.items()} if durable else {},
        settings={name: entry.settings for name, entry in entries.items()},
        failures=dict(failures),
        **options,
    )
