"""What happened during a save or a load, as values that a listener receives.

The default listener logs through the standard library's `shardpoint` logger; nothing here decides anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

_logger = logging.getLogger("shardpoint")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: a stable word: `"committed"`, `"loaded"`, `"fell_back"`, `"pruned"`, `"swept"`, `"recovered"`,
            `"rng_derived"`, `"rng_shifted"` (a loader drew from the restored random state), `"save_failed"` (in the
            background), `"save_skipped"` (too many are under way), `"frozen_changed"` (what does not train is not
            what the last checkpoint has), `"suspect"` (committed, but what was saved looks wrong),
            `"passed_over_suspect"` (an earlier one is resumed instead), `"resumed_suspect"` (there is no other),
            `"allowed"` (what a load left or converted, as it was allowed to), `"idle_pattern"` (an allowance that no
            name matches), `"preempted"` (a signal said that the run will be stopped), `"unverified"` (what is loaded
            has no checksums) or `"inexact"` (what is loaded lacks a part of the run's state).
        message: one sentence for a person.
        key: what it happened to, relative to the root.
        level: a `logging` level.
    """

    kind: str
    message: str
    key: str = ""
    level: int = logging.INFO


Listener = Callable[[Event], None]


def log_event(event: Event) -> None:
    """Log one event (the default listener)."""
    _logger.log(event.level, "%s", event.message)
