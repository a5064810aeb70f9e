"""How long does planning take for very many ranks? What `cases/planning.py` computes, where it is there."""

from __future__ import annotations

import importlib
import importlib.util

from benchmarks.report import Table
from benchmarks.stage import Options


def run(_: Options) -> list[Table]:
    """Run `benchmarks.cases.planning.run`, which returns seconds by description."""
    if importlib.util.find_spec("benchmarks.cases.planning") is None:
        return []
    planning = importlib.import_module("benchmarks.cases.planning")
    seconds: dict[str, float] = planning.run()
    measurements = {name: [value] for name, value in seconds.items()}
    return [Table("planning", "Planning", "s", measurements, labels={name: name for name in seconds})]
