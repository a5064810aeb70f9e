"""Which ranks are lost? Judged by counters that stand still, never by a wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import msgspec


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """One sign of life.

    Attributes:
        count: grows with every beat.
        moved: grows when the rank makes progress.
        heard: the number of the last round whose verdict the rank needs no more.
        left: why the rank takes part no longer, or None.
    """

    count: int
    moved: int
    heard: int
    left: str | None = None


class Watch:
    """Judge who is lost, by the change of counters against this process's own monotonic clock.

    A rank is lost when it left; when its beats stood still for `silence_s`; or when it moved nothing for `stall_s`. One
    that was never heard of may be starting up, so it has `stall_s` too.

    Args:
        ranks: who is watched; their time starts now.
        silence_s: seconds without a new beat.
        stall_s: seconds without progress.
        look_s: seconds between two looks.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        *,
        silence_s: float,
        stall_s: float,
        look_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._look_s = look_s
        self._clock = clock
        self._look_at = now = clock()
        self._last: dict[int, Beat] = {}
        self._beat_at = dict.fromkeys(ranks, now)
        self._moved_at = dict(self._beat_at)

    def is_due(self) -> bool:
        """Say whether it is time for a look: at once, and then every `look_s` seconds."""
        return self._clock() >= self._look_at

    def look(self, beats: Mapping[int, Beat]) -> tuple[dict[int, str], bool]:
        """Take in the newest beats of the ranks that are still waited for.

        Args:
            beats: rank -> its newest beat, for those that were ever heard of.

        Returns:
            Which of the watched ranks are lost, each with the reason; and whether any of them made
            progress since the last look.
        """
        now = self._clock()
        self._look_at = now + self._look_s
        moved = False
        for rank, beat in beats.items():
            last = self._last.get(rank)
            if last is None or beat.count != last.count:
                self._beat_at[rank] = now
            if last is None or beat.moved != last.moved:
                self._moved_at[rank] = now
                moved = True
            self._last[rank] = beat
        lost: dict[int, str] = {}
        for rank in self._beat_at:
            reason = self._verdict_on(rank, now)
            if reason is not None:
                lost[rank] = reason
        return lost, moved

    def add(self, rank: int) -> None:
        """Watch one more rank; its time starts now."""
        self._beat_at[rank] = self._moved_at[rank] = self._clock()

    def forget(self, rank: int) -> None:
        """Stop watching a rank: it is waited for no longer."""
        self._beat_at.pop(rank, None)
        self._moved_at.pop(rank, None)
        self._last.pop(rank, None)

    def _verdict_on(self, rank: int, now: float) -> str | None:
        beat = self._last.get(rank)
        still_s = now - self._moved_at[rank]
        if beat is None:
            return f"not heard of in {still_s:.0f} s" if still_s >= self._stall_s else None
        if beat.left is not None:
            return f"left: {beat.left}"
        silent_s = now - self._beat_at[rank]
        if silent_s >= self._silence_s:
            return f"silent for {silent_s:.0f} s"
        return f"no progress for {still_s:.0f} s" if still_s >= self._stall_s else None
