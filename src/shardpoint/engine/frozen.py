"""How what never changes is saved: checksummed where it is, and written only where no earlier file has its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from shardpoint.checksum import merge_packed, pack_partials, whole_tensors
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.opening import AgreedSave, CoordinatorState, OpenSave
from shardpoint.engine.writing import PieceSums, StagedChunk, stage_chunks
from shardpoint.errors import DistributedError
from shardpoint.storage import BufferPool

_NUM_BUFFERS = 4


class _Sums(msgspec.Struct, frozen=True):
    """The partial checksums of frozen tensors, packed."""

    partials: bytes


def _merge(ballots: Sequence[_Sums]) -> _Sums:
    return _Sums(merge_packed([ballot.partials for ballot in ballots]))


def checksum_frozen(
    comm: Comm,
    agreed: AgreedSave,
    coordinator: CoordinatorState,
    pool: BufferPool,
    look: Callable[[int, memoryview], None],
) -> None:
    """Have the coordinator know the checksum of every tensor of the frozen files, as it is now.

    Args:
        comm: the ranks.
        agreed: the structure.
        coordinator: gets `frozen_crcs`, on the coordinator.
        pool: lends a buffer.
        look: called with each piece's tensor and bytes.

    Raises:
        DistributedError: the ranks together do not hold every byte exactly once.
        PeerError: a rank failed.

    Collective:
        All ranks: one round, if anything may be frozen.
    """
    if not agreed.checks_frozen:
        return

    def work() -> _Sums:
        sums = PieceSums(look)
        # Order: beyond the budget, whose buffers may all hold what waits to be written. One buffer at a time.
        staged = stage_chunks(agreed.table, agreed.plan.frozen_chunks, agreed.own.held, pool, beyond_budget=True)
        for item in staged:
            try:
                item.landing.wait()
                sums.take(item)
            finally:
                item.release()
            comm.progress(item.chunk.num_bytes)
        return _Sums(pack_partials(sums.partials(agreed.table)))

    def decide(ballots: Sequence[_Sums]) -> bool:
        coordinator.frozen_crcs = _whole(agreed, _merge(ballots).partials)
        return True

    agree(comm, "save: frozen", work, _Sums, decide, bool, _merge)


def _whole(agreed: AgreedSave, partials: bytes) -> dict[int, int]:
    table, plan = agreed.table, agreed.plan
    whole = whole_tensors([partials], [entry.num_bytes for entry in table.entries])
    indices = [index for index, placed in enumerate(plan.layout.tensors) if placed.file in plan.frozen_files]
    holes = [table.entries[index].label for index in indices if not whole.covered[index]]
    if holes:
        text = f"the ranks together do not hold every byte exactly once of {holes[:3]} ({len(holes)} tensors in all)"
        raise DistributedError(text)
    return {index: whole.crcs[index] for index in indices}


def stage_frozen(agreed: AgreedSave, opened: OpenSave, buffer_bytes: int) -> Iterator[StagedChunk]:
    """Stage what this rank writes of frozen files that could not be linked.

    It is read from the live tensors, whenever its turn comes: nothing changes them.

    Memory:
        Four buffers beside the budget, all of which may hold what waits to be written after this; only where a file is
        written.
    """
    chunks = agreed.plan.unlinked_chunks(opened.linked)
    if not chunks:
        return
    pool = BufferPool(_NUM_BUFFERS * buffer_bytes, buffer_bytes)
    try:
        yield from stage_chunks(agreed.table, chunks, agreed.own.held, pool)
    finally:
        pool.close()
