"""How does a program of ranks run its checks, and tell the test what came of each?"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


def run_and_report(checks: Mapping[str, Callable[[Path], None]], place: Callable[[str], Path]) -> None:
    """Run checks in order, up to the first that fails: after it the ranks may be in different places.

    The last line printed is JSON: name -> "ok in ... s", or the traceback (`RankOutcome.report` reads it).

    Args:
        checks: name -> check.
        place: the directory that a check of that name gets.
    """
    report: dict[str, str] = {}
    for name, check in checks.items():
        began = time.monotonic()
        try:
            check(place(name))
            report[name] = f"ok in {time.monotonic() - began:.1f} s"
        except Exception:  # noqa: BLE001 - told to the test, which fails with it
            report[name] = traceback.format_exc()
            print(report[name], file=sys.stderr, flush=True)  # noqa: T201 - the test reads it
            break
    print(json.dumps(report), flush=True)  # noqa: T201 - the test reads it
