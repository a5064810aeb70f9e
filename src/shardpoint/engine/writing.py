"""How a rank's bytes flow: staged into buffers, checksummed and put in place by I/O threads, then made durable.

One thread stages while others take the checksums of what was staged and write it. Checksums are taken over the staged
bytes, so a fault anywhere after staging is caught. The memory is the buffers': a buffer is used again once its bytes
are written. An error in an I/O thread stops the flow and is raised by the thread that waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shardpoint.adapters.collect import Held
from shardpoint.adapters.staging import Copier, Landing
from shardpoint.checksum import Partial, crc64
from shardpoint.planning import Chunk, Layout, MergedTable
from shardpoint.storage import Buffer, BufferPool, Store, SyncPoint, Writer

NUM_IO_THREADS = 2


@dataclass(frozen=True, slots=True)
class StagedChunk:
    """A chunk and the buffer that holds it.

    Attributes:
        chunk: the plan.
        buffer: its bytes, once `landing` is over.
        landing: when they are there.
        pool: where the buffer goes when they are written.
    """

    chunk: Chunk
    buffer: Buffer
    landing: Landing
    pool: BufferPool

    def release(self) -> None:
        """Give the buffer back."""
        self.pool.release(self.buffer)

    def view(self, buffer_offset: int, num_bytes: int) -> memoryview:
        """Return staged bytes."""
        return self.buffer.array[buffer_offset : buffer_offset + num_bytes].data


class PieceSums:
    """The checksums of pieces, taken in any order by any thread, and merged into one partial for each tensor.

    Args:
        look: called with each piece's tensor and bytes, by the thread that takes its checksum.
    """

    def __init__(self, look: Callable[[int, memoryview], None] = lambda _entry, _data: None) -> None:
        self._look = look
        self._mutex = threading.Lock()
        self._pieces: list[tuple[int, int, int, int]] = []

    def take(self, staged: StagedChunk) -> None:
        """Take the checksums of a chunk."""
        pieces: list[tuple[int, int, int, int]] = []
        for piece in staged.chunk.pieces:
            data = staged.view(piece.buffer_offset, piece.num_bytes)
            pieces.append((piece.entry, piece.byte_offset, piece.num_bytes, crc64(data)))
            self._look(piece.entry, data)
        with self._mutex:
            self._pieces += pieces

    def partials(self, table: MergedTable) -> list[tuple[int, Partial]]:
        """Return (entry, its partial checksum) for each tensor, ascending."""
        partials: dict[int, Partial] = {}
        for entry, byte_offset, num_bytes, crc in self._pieces:
            partials.setdefault(entry, Partial()).add(crc, byte_offset, num_bytes, table.entries[entry].num_bytes)
        return sorted(partials.items())


def stage_chunks(
    table: MergedTable,
    chunks: Iterable[Chunk],
    held: Mapping[tuple[str, str], Held],
    pool: BufferPool,
    *,
    beyond_budget: bool = False,
) -> Iterator[StagedChunk]:
    """Stage chunk after chunk, as buffers become free, on the calling thread.

    Args:
        table: the merged table.
        chunks: what this rank writes.
        held: the live tensors.
        pool: where buffers come from; whoever takes a staged chunk gives its buffer back.
        beyond_budget: do not wait for buffers.
    """
    copier = Copier(held)
    try:
        for chunk in chunks:
            buffer = pool.acquire(beyond_budget=beyond_budget)
            if buffer is None:
                return
            yield stage_chunk(table, chunk, copier, buffer, pool)
    finally:
        copier.close()


def stage_chunk(table: MergedTable, chunk: Chunk, copier: Copier, buffer: Buffer, pool: BufferPool) -> StagedChunk:
    """Copy a chunk's bytes into a buffer, or queue their copies; on an error the buffer goes back to its pool."""
    try:
        for piece in chunk.pieces:
            entry = table.entries[piece.entry]
            copier.copy((entry.part, entry.key), buffer, piece.buffer_offset, piece.local_byte_offset, piece.num_bytes)
        return StagedChunk(chunk, buffer, copier.landing(), pool)
    except BaseException:
        pool.release(buffer)
        raise


def in_file_order(first: Iterable[StagedChunk], second: Iterable[StagedChunk]) -> Generator[StagedChunk, None, None]:
    """Merge two flows that are each in the order of files; of one file, the first's chunks come first.

    Closing it gives back what it holds.
    """
    sources = iter(first), iter(second)
    heads = [next(source, None) for source in sources]
    try:
        while True:
            ready = [index for index, head in enumerate(heads) if head is not None]
            if not ready:
                return
            chosen = min(ready, key=lambda index: heads[index].chunk.file)  # type: ignore[union-attr]  # not None
            item, heads[chosen] = heads[chosen], None
            assert item is not None  # noqa: S101 - chosen among those that are not
            yield item
            heads[chosen] = next(sources[chosen], None)
    finally:
        for head in heads:
            if head is not None:
                head.release()


def write_staged(
    files: OpenFiles, staged: Iterable[StagedChunk], sums: PieceSums, progress: Callable[[int], None]
) -> None:
    """Checksum and write staged chunks at their final place with several threads, and make them durable.

    Args:
        files: the attempt's files.
        staged: chunk after chunk, on the calling thread.
        sums: given every piece's checksum.
        progress: told of each chunk's bytes.

    Raises:
        StorageError: a write or an fsync failed; nothing was voted.

    Durability:
        On return every byte that was written survives power loss, once its file has a durable name.
    """
    failed = threading.Event()

    def put(item: StagedChunk) -> None:
        try:
            if failed.is_set():
                return
            item.landing.wait()
            sums.take(item)
            for extent in item.chunk.extents:
                files.write(item.chunk.file, item.view(extent.buffer_offset, extent.num_bytes), extent.byte_offset)
            progress(item.chunk.num_bytes)
        except BaseException:
            failed.set()
            raise
        finally:
            item.release()

    with ThreadPoolExecutor(NUM_IO_THREADS, thread_name_prefix="shardpoint-write") as executor:
        pending: list[Future[None]] = []
        for item in staged:
            pending.append(executor.submit(put, item))
            if failed.is_set():
                break
        _raise_first(pending)
        files.sync(progress, executor)


def _raise_first(pending: Sequence[Future[None]]) -> None:
    """Wait for all, and raise the first one's error."""
    wait(pending)
    for future in pending:
        future.result()


class OpenFiles:
    """The files of an attempt that this rank writes, each opened once; any thread may write.

    Leaving the `with` block closes them; an error on closing is an error, unless another one is on its way up already.
    """

    def __init__(self, store: Store, key: str, layout: Layout) -> None:
        self._store = store
        self._key = key
        self._layout = layout
        self._mutex = threading.Lock()
        self._writers: dict[int, Writer] = {}

    @property
    def notes(self) -> list[str]:
        """What a person should know of how the files were written."""
        return list(dict.fromkeys(writer.note for writer in self._writers.values() if writer.note is not None))

    def write(self, file: int, data: memoryview, byte_offset: int) -> None:
        """Write some bytes of a file."""
        self._writer(file).write_at(data, byte_offset)

    def _writer(self, file: int) -> Writer:
        with self._mutex:
            if file not in self._writers:
                self._writers[file] = self._store.open_writer(f"{self._key}/{self._layout.files[file].path}")
            return self._writers[file]

    def sync(self, progress: Callable[[int], None], executor: ThreadPoolExecutor | None = None) -> None:
        """Make durable, by the descriptors that wrote, everything that was written."""

        def sync_one(writer: Writer) -> None:
            writer.sync(SyncPoint.TENSOR_FILE)
            progress(1)

        if executor is None:
            for writer in self._writers.values():
                sync_one(writer)
        else:
            _raise_first([executor.submit(sync_one, writer) for writer in self._writers.values()])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed: Exception | None = None
        for writer in self._writers.values():
            try:
                writer.close()
            except Exception as second:  # noqa: BLE001 - every file is closed before the first error goes up
                failed = failed or second
        if failed is None:
            return
        if error is None:
            raise failed
        error.add_note(f"closing a file after that failed too: {failed}")
