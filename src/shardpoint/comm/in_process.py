"""How do ranks that are threads of one process agree, or a process that is alone?"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

from shardpoint.comm.liveness import Beat
from shardpoint.comm.protocol import Comm
from shardpoint.comm.rounds import RoundComm, agree_alone
from shardpoint.comm.tally import Merge
from shardpoint.comm.tree import FANOUT
from shardpoint.errors import DistributedError, UsageError

_SLICE_S = 0.5


class SoloComm:
    """Agree with nobody: the `Comm` of a process that is alone, which raises the errors of its rounds as they are."""

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self._closed = False

    @property
    def is_coordinator(self) -> bool:
        """Say whether this rank decides: it does."""
        return True

    def agree(
        self,
        topic: str,
        work: Callable[[], bytes],
        decide: Callable[[Sequence[bytes]], bytes],
        merge: Merge | None = None,
    ) -> bytes:
        """Run `work`, then `decide` (see `Comm.agree`)."""
        del merge  # there is nothing to merge with
        if self._closed:
            text = f"{topic}: this comm can be used no more: it was closed"
            raise DistributedError(text)
        return agree_alone(work, decide)

    def progress(self, num_bytes: int) -> None:
        """Do nothing: nobody waits for this rank."""

    def close(self) -> None:
        """Refuse further rounds."""
        self._closed = True


class _Room:
    """What the ranks of one process share; every field is read and written under `news`."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.version = 0
        self.votes: dict[tuple[int, int], bytes] = {}
        self.verdicts: dict[int, bytes] = {}
        self.members: list[InProcessComm] = []
        self.beat_counts = itertools.count()

    def publish(self) -> None:
        self.version += 1
        self.news.notify_all()


class InProcessComm(RoundComm):
    """Agree with the other ranks of one process, each of which is a thread. Made by `in_process_comms`."""

    def __init__(
        self, rank: int, world_size: int, room: _Room, *, stall_s: float, look_s: float, fanout: int = FANOUT
    ) -> None:
        super().__init__(rank, world_size, silence_s=float("inf"), stall_s=stall_s, look_s=look_s, fanout=fanout)
        self._room = room
        self._seen_version = 0

    def close(self) -> None:
        """Leave the group (see `Comm.close`)."""
        self._break("it was closed")

    def _post_vote(self, number: int, vote: bytes) -> None:
        with self._room.news:
            self._room.votes[number, self.rank] = vote
            self._room.publish()

    def _fetch_vote(self, number: int, rank: int) -> bytes | None:
        with self._room.news:
            return self._room.votes.get((number, rank))

    def _remove_vote(self, number: int, rank: int) -> None:
        with self._room.news:
            self._room.votes.pop((number, rank), None)

    def _post_verdict(self, number: int, verdict: bytes) -> None:
        with self._room.news:
            self._room.verdicts[number] = verdict
            self._room.publish()

    def _fetch_verdict(self, number: int) -> bytes | None:
        with self._room.news:
            return self._room.verdicts.get(number)

    def _retire(self, number: int) -> None:
        with self._room.news:
            for old in [old for old in self._room.verdicts if old < number]:
                del self._room.verdicts[old]

    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        # A thread of a living process beats by definition; what it can do is leave, or stall.
        return {rank: self._room.members[rank]._beat(next(self._room.beat_counts)) for rank in ranks}  # noqa: SLF001

    def _pause(self, waited_s: float) -> None:
        del waited_s
        with self._room.news:
            self._room.news.wait_for(
                lambda: self._room.version != self._seen_version, timeout=min(_SLICE_S, self._look_s)
            )
            # Race: what comes from here on, while this rank looks here and there, ends the next pause at once.
            self._seen_version = self._room.version

    def _announce(self) -> None:
        with self._room.news:
            self._room.publish()


def in_process_comms(
    world_size: int, *, stall_s: float = 600.0, look_s: float = 0.5, fanout: int = FANOUT
) -> list[Comm]:
    """Make the comms of ranks that are threads of this process.

    Args:
        world_size: how many ranks there are, at least 1.
        stall_s: seconds without progress after which a rank that is waited for is given up.
        look_s: seconds between two looks at whether a rank left or stalled.
        fanout: of how many ranks, at most, one rank takes the votes.

    Returns:
        One comm for each rank, in the order of the ranks; each is used by one thread.

    Raises:
        UsageError: `world_size` or `fanout` is less than 1.
    """
    if world_size < 1:
        text = f"a group has at least 1 rank, not {world_size}"
        raise UsageError(text)
    room = _Room()
    room.members = [
        InProcessComm(rank, world_size, room, stall_s=stall_s, look_s=look_s, fanout=fanout)
        for rank in range(world_size)
    ]
    return list(room.members)
