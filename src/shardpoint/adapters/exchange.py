"""How bytes go from rank to rank: over a gloo group of Shardpoint's own, never one that the trainer uses.

Two threads on one gloo group gave silently wrong sums in 206 of 400 rounds, so the group is new, and it is made by all
ranks on the thread that saves.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from shardpoint.errors import DistributedError

_FAILED = -1
TIMEOUT_S = 600.0


class GlooExchange:
    """Point-to-point messages of bytes between the ranks of the default group.

    Args:
        timeout_s: how long a message may take.

    Collective:
        All ranks construct it together, and in the same order as other groups.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def send(self, data: memoryview | None, to_rank: int) -> None:
        """Send a chunk, or None: this rank failed.

        Raises:
            DistributedError: the other rank is gone.
        """
        length = _FAILED if data is None else len(data)
        try:
            dist.send(torch.tensor([length], dtype=torch.int64), to_rank, group=self._group)
            if data is not None:
                dist.send(torch.frombuffer(data, dtype=torch.uint8), to_rank, group=self._group)
        except RuntimeError as error:
            raise DistributedError(f"sending to rank {to_rank} failed: {error}") from error

    def receive(self, room: memoryview, from_rank: int) -> int | None:
        """Receive a chunk, or None: the other rank failed.

        Raises:
            DistributedError: the other rank is gone, or sent more than there is room for.
        """
        length = torch.empty(1, dtype=torch.int64)
        try:
            dist.recv(length, from_rank, group=self._group)
            num_bytes = int(length.item())
            if num_bytes == _FAILED:
                return None
            if not 0 < num_bytes <= len(room):
                raise DistributedError(f"rank {from_rank} announced {num_bytes} bytes, there is room for {len(room)}")
            dist.recv(torch.frombuffer(room[:num_bytes], dtype=torch.uint8), from_rank, group=self._group)
        except RuntimeError as error:
            raise DistributedError(f"receiving from rank {from_rank} failed: {error}") from error
        return num_bytes


_exchanges: dict[int, GlooExchange] = {}


def open_exchange() -> GlooExchange:
    """Return this process's exchange; the first call of each default group makes it.

    Collective:
        All ranks.
    """
    world = dist.group.WORLD
    key = id(world)
    if key not in _exchanges:
        _exchanges.clear()
        _exchanges[key] = GlooExchange()
    return _exchanges[key]
