"""How small tensors that many ranks hold parts of reach the coordinator: in one round, and then as whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from shardpoint.adapters.collect import Held
from shardpoint.checksum import crc64
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.opening import AgreedSave, OpenSave
from shardpoint.errors import DistributedError
from shardpoint.geometry import Region
from shardpoint.planning import RUN_FIELDS, MergedTable

_BATCH_BYTES = 2**20  # scattered at a time: each byte takes 8 more for its index


class _Parts(msgspec.Struct, frozen=True):
    """A rank's parts.

    Attributes:
        runs: a table of `RUN_FIELDS`.
        data: their bytes, one after another.
        crc: of `data`, taken where it was staged.
    """

    runs: bytes
    data: bytes
    crc: int


def gather_small(
    comm: Comm, agreed: AgreedSave, opened: OpenSave, look: Callable[[int, memoryview], None]
) -> dict[tuple[str, str], Held]:
    """Bring the parts of small tensors to the coordinator.

    Args:
        comm: the ranks.
        agreed: the structure.
        opened: the attempt.
        look: called with the tensor and the bytes of each part, where it is sent.

    Returns:
        On the coordinator the whole tensors, by (part, key); elsewhere nothing.

    Raises:
        DistributedError: the ranks together did not send every byte exactly once, or bytes changed on their way.
        PeerError: a rank failed.

    Collective:
        All ranks: one round, if anything is gathered.

    Memory:
        64 MiB on the coordinator, and what it sends on each rank.
    """
    if not opened.gathers_small:
        return {}
    found: dict[tuple[str, str], Held] = {}

    def decide(ballots: Sequence[_Parts]) -> bool:
        found.update(_assemble(agreed.table, agreed.plan.gathered, ballots))
        return True

    agree(comm, "save: small tensors", lambda: _own_parts(comm, agreed, opened, look), _Parts, decide, bool)
    return found


def _own_parts(comm: Comm, agreed: AgreedSave, opened: OpenSave, look: Callable[[int, memoryview], None]) -> _Parts:
    opened.check(agreed, comm.rank)
    table, plan, held = agreed.table, agreed.plan, agreed.own.held
    data = bytearray()
    entry = -1
    view: npt.NDArray[np.uint8] | None = None
    for index, local_offset, num_bytes in plan.sent_local:
        if view is None or index != entry:
            entry = index
            view = held[table.entries[index].part, table.entries[index].key].open().read_view()
        part = view[local_offset : local_offset + num_bytes].data
        look(index, part)
        data += part
    return _Parts(plan.sent_runs.tobytes(), bytes(data), crc64(data))


def _assemble(table: MergedTable, gathered: Sequence[int], ballots: Sequence[_Parts]) -> dict[tuple[str, str], Held]:
    """Return the whole tensors; refuse what is not there exactly once."""
    sizes = np.array([table.entries[index].num_bytes for index in gathered], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    block = np.empty(int(starts[-1]), dtype=np.uint8)
    is_there = np.zeros(len(block), dtype=np.bool_)
    places = np.zeros(len(table.entries), dtype=np.int64)
    places[list(gathered)] = starts[:-1]
    num_sent = 0
    for rank, ballot in enumerate(ballots):
        if crc64(ballot.data) != ballot.crc:
            raise DistributedError(f"the small tensors that rank {rank} sent changed on their way: save again")
        runs: Any = np.frombuffer(ballot.runs, dtype=RUN_FIELDS)
        data = np.frombuffer(ballot.data, dtype=np.uint8)
        lengths = runs["num_bytes"].astype(np.int64)
        targets = places[runs["entry"]] + runs["byte_offset"]
        ends = np.cumsum(lengths)
        if int(lengths.sum()) != len(data):
            raise DistributedError(
                f"rank {rank} sent {len(data)} bytes of small tensors, and lists {int(lengths.sum())}"
            )
        num_sent += len(data)
        first = 0
        while first < len(runs):
            base = int(ends[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(ends, base + _BATCH_BYTES, side="right")))
            chosen = slice(first, last)
            position = np.arange(base, int(ends[last - 1]))
            into = np.repeat(targets[chosen] - (ends[chosen] - lengths[chosen]), lengths[chosen]) + position
            block[into] = data[position[0] : position[-1] + 1] if len(position) else data[:0]
            is_there[into] = True
            first = last
    if num_sent != len(block) or not is_there.all():
        text = f"the ranks together sent {num_sent} of {len(block)} bytes of small tensors; nothing was committed"
        raise DistributedError(text)
    whole: dict[tuple[str, str], Held] = {}
    for index, start, size in zip(gathered, starts[:-1].tolist(), sizes.tolist(), strict=True):
        entry = table.entries[index]
        tensor = torch.from_numpy(block[start : start + size])
        whole[entry.part, entry.key] = Held(tensor, Region.whole(entry.shape))
    return whole
