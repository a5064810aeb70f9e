"""How does a test run one function on every rank of a group of threads?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from shardpoint.comm import Comm

DEADLINE_S = 30.0


def run_threads(comms: Sequence[Comm], rank_main: Callable[[Comm], Any]) -> list[Any]:
    """Run `rank_main(comm)` in one thread per rank; return what each returned, or the error that it raised."""
    outcomes: list[Any] = [None] * len(comms)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = rank_main(comms[rank])
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(comms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    assert not stuck, f"ranks {stuck} hang; the others ended with {outcomes}"
    return outcomes


def refuse_to_decide(votes: Sequence[bytes]) -> bytes:
    """Be the `decide` of a round that must not come to a decision."""
    text = f"decide ran, with {list(votes)}"
    raise AssertionError(text)
