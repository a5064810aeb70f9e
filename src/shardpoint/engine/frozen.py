"""How what never changes is saved: checksummed where it is, and written only where no earlier file has its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec

from shardpoint.checksum import merge_packed, pack_partials, whole_tensors
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.examining import Examination
from shardpoint.engine.linking import find_linkable, last_checkpoint
from shardpoint.engine.opening import AgreedSave, CoordinatorState, OpenSave, SaveRequest, plan_again
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.writing import PieceSums, StagedChunk, stage_chunks
from shardpoint.errors import DistributedError
from shardpoint.planning import Chunk
from shardpoint.storage import BufferPool, Store

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
        # What is known to be unchanged was checksummed before.
        chunks = [chunk for chunk in agreed.plan.frozen_chunks if chunk.file not in agreed.unchanged]
        return _checksum(comm, agreed, chunks, pool, look)

    def decide(ballots: Sequence[_Sums]) -> bool:
        files = agreed.plan.frozen_files - agreed.unchanged
        coordinator.frozen_crcs |= _whole(agreed, files, _merge(ballots).partials)
        return True

    agree(comm, "save: frozen", work, _Sums, decide, bool, _merge)


def find_unchanged(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    cache: StructureCache,
    agreed: AgreedSave,
    coordinator: CoordinatorState,
    pool: BufferPool,
    examination: Examination,
) -> AgreedSave:
    """Ask of files of still tensors whether they are what the last checkpoint has; those that are need not be staged.

    It is asked before a step may end. So whatever else changes such tensors later changes nothing of the save: a file
    that is unchanged is linked, and any other is staged like what is trained.

    Args:
        store: the root.
        comm: the ranks.
        request: what to save.
        cache: this process's.
        agreed: the structure.
        coordinator: gets the checksums of unchanged files in `frozen_crcs`, on the coordinator.
        pool: lends a buffer.
        examination: looks at what is unchanged; what is staged is looked at there.

    Raises:
        DistributedError: the ranks together do not hold every byte exactly once.
        PeerError: a rank failed.

    Collective:
        All ranks: one round, if anything is asked.
    """
    if not agreed.tries:
        return agreed
    tried: frozenset[int] = frozenset()

    def work() -> _Sums:
        nonlocal tried
        layout, frozen = agreed.plan.layout, agreed.plan.frozen_files
        still = (number for number, file in enumerate(layout.files) if file.is_still and file.path in agreed.tries)
        tried = frozenset(still) - frozen
        plan = plan_again(request, cache, agreed, frozen | tried, comm.rank, pool.buffer_bytes)
        chunks = [chunk for chunk in plan.frozen_chunks if chunk.file in tried]
        return _checksum(comm, agreed, chunks, pool, examination.look)

    def decide(ballots: Sequence[_Sums]) -> list[int]:
        crcs = _whole(agreed, tried, _merge(ballots).partials)
        layout = agreed.plan.layout
        found = find_linkable(last_checkpoint(store), agreed.table, layout, tried, crcs, request.name, lambda _: None)
        coordinator.unchanged = found
        coordinator.frozen_crcs |= {n: crc for n, crc in crcs.items() if layout.tensors[n].file in found}
        return sorted(found)

    unchanged = frozenset(agree(comm, "save: unchanged", work, _Sums, decide, list[int], _merge))
    placed = agreed.plan.layout.tensors
    examination.forget(n for n, one in enumerate(placed) if one.file in tried - unchanged)
    plan = plan_again(request, cache, agreed, agreed.plan.frozen_files | unchanged, comm.rank, pool.buffer_bytes)
    return replace(agreed, planned=(agreed.table, plan), unchanged=unchanged)


def _checksum(
    comm: Comm, agreed: AgreedSave, chunks: list[Chunk], pool: BufferPool, look: Callable[[int, memoryview], None]
) -> _Sums:
    sums = PieceSums(look)
    # Order: beyond the budget, whose buffers may all hold what waits to be written. One buffer at a time.
    for item in stage_chunks(agreed.table, chunks, agreed.own.held, pool, beyond_budget=True):
        try:
            item.landing.wait()
            sums.take(item)
        finally:
            item.release()
        comm.progress(item.chunk.num_bytes)
    return _Sums(pack_partials(sums.partials(agreed.table)))


def _whole(agreed: AgreedSave, files: frozenset[int], partials: bytes) -> dict[int, int]:
    table, plan = agreed.table, agreed.plan
    whole = whole_tensors([partials], [entry.num_bytes for entry in table.entries])
    indices = [index for index, placed in enumerate(plan.layout.tensors) if placed.file in files]
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
