"""Is a policy's argument the number that it must be?"""

from __future__ import annotations

import math

from shardpoint.errors import UsageError


def check_count(what: str, value: object) -> None:
    """Raise `UsageError` unless a value is a whole number of at least 1.

    Args:
        what: the argument, as the user wrote it: `"Latest(...)"`.
        value: what was given.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        message = f"{what} takes a whole number of at least 1, not {value!r}"
        raise UsageError(message)


def check_positive(what: str, value: object) -> None:
    """Raise `UsageError` unless a value is a finite number greater than 0.

    Args:
        what: the argument, as the user wrote it: `"Every(seconds=...)"`.
        value: what was given.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        message = f"{what} takes a finite number greater than 0, not {value!r}"
        raise UsageError(message)
