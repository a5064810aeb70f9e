"""How a save works where writers on different hosts cannot share a file: each file has one writer, and bytes go to it.

Two NFS clients that write into one page overwrite each other's bytes. There, tensor files are assigned to ranks, and
every rank sends what it owns of a file to the file's writer, one staged chunk at a time. What is on disk in the end,
checksums included, is the same as when every rank writes for itself.

Order: all ranks go through the files in the same order, and a file's writer through the ranks in theirs, so that no two
ranks ever wait for each other. A rank that fails goes on taking its part in the exchange, without data, until all files
are done: nobody is left waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardpoint.engine.writing import OpenFiles, PieceSums, StagedChunk
from shardpoint.errors import DistributedError
from shardpoint.planning import Chunk
from shardpoint.storage import Buffer


class ByteExchange(Protocol):
    """How bytes go from one rank to another, each message in the order in which it was sent."""

    def send(self, data: memoryview | None, to_rank: int) -> None:
        """Send a chunk; None says that this rank failed and that no further chunk of this file comes."""
        ...

    def receive(self, room: memoryview, from_rank: int) -> int | None:
        """Receive a chunk into `room` and return its length, or None where the sender failed."""
        ...


def writer_of(file: int, world_size: int) -> int:
    """Return the rank that writes a file."""
    return file % world_size


def write_gathered(
    files: OpenFiles,
    staged: Iterable[StagedChunk],
    sums: PieceSums,
    room_bytes: int,
    progress: Callable[[int], None],
    *,
    chunks_of: Sequence[Sequence[Chunk]],
    num_files: int,
    rank: int,
    exchange: ByteExchange,
) -> None:
    """Bring what this rank owns to the files' writers, and write this rank's files.

    Args:
        files: the attempt's files.
        staged: this rank's chunks, in the order of the files.
        sums: given every piece's checksum.
        room_bytes: the greatest chunk.
        progress: told of each chunk's bytes.
        chunks_of: what each rank writes, by rank.
        num_files: the number of tensor files.
        rank: this rank.
        exchange: the way between ranks.

    Raises:
        StorageError: a write, an fsync or a close failed on this rank.
        DistributedError: a rank that was to send failed.

    Collective:
        All ranks.

    Durability:
        On return every byte that was written survives power loss, once its file has a durable name.

    Memory:
        One buffer more than what stages.
    """
    by_file = _ByFile(staged)
    run = _Gathering(files, sums, room_bytes, progress, exchange, by_file.of_file)
    try:
        for file in range(num_files):
            writer = writer_of(file, len(chunks_of))
            if writer != rank:
                run.send(file, writer, is_due=any(chunk.file == file for chunk in chunks_of[rank]))
                continue
            for sender, chunks in enumerate(chunks_of):
                if sender == rank:
                    run.write_own(file)
                else:
                    run.receive([chunk for chunk in chunks if chunk.file == file], sender)
    finally:
        by_file.close()
        if run.room is not None:
            run.room.close()
    if run.failure is not None:
        raise run.failure
    files.sync(progress)


class _ByFile:
    """Gives the staged chunks of one file after another; holds the first one of the next file."""

    def __init__(self, staged: Iterable[StagedChunk]) -> None:
        self._source = iter(staged)
        self._next: StagedChunk | None = None

    def of_file(self, file: int) -> Iterator[StagedChunk]:
        """Yield the chunks of a file; files are asked for in order."""
        while True:
            if self._next is None:
                self._next = next(self._source, None)
            if self._next is None or self._next.chunk.file != file:
                return
            item, self._next = self._next, None
            yield item

    def close(self) -> None:
        """Give back what it holds."""
        if self._next is not None:
            self._next.release()
            self._next = None


@dataclass
class _Gathering:
    """One rank's part: after a failure it goes on taking part in the exchange, without data."""

    files: OpenFiles
    sums: PieceSums
    room_bytes: int
    progress: Callable[[int], None]
    exchange: ByteExchange
    of_file: Callable[[int], Iterator[StagedChunk]]
    failure: Exception | None = None
    room: Buffer | None = None

    def write_own(self, file: int) -> None:
        """Write what this rank owns of a file that it writes."""
        for chunk, data in self._staged(file):
            self._write(chunk, data)

    def send(self, file: int, writer: int, *, is_due: bool) -> None:
        """Send what this rank owns of a file to its writer."""
        if not is_due:
            return
        unreachable = False
        for chunk, data in self._staged(file):
            for extent in chunk.extents:
                if self.failure is None:
                    try:
                        self.exchange.send(data[extent.buffer_offset : extent.buffer_offset + extent.num_bytes], writer)
                    except DistributedError as error:
                        self.failure, unreachable = error, True
            self.progress(chunk.num_bytes)
        if self.failure is not None and not unreachable:
            self.exchange.send(None, writer)

    def receive(self, chunks: Sequence[Chunk], sender: int) -> None:
        """Take what a rank owns of a file and write it; after a failure of this rank what comes is dropped."""
        if not chunks:
            return
        # Order: not from the pool. All of its buffers may hold chunks that this rank sends later.
        room = self.room = self.room or Buffer(self.room_bytes)
        for chunk in chunks:
            for extent in chunk.extents:
                place = slice(extent.buffer_offset, extent.buffer_offset + extent.num_bytes)
                received = self.exchange.receive(room.array[place].data, sender)
                if received is None:
                    self._fail(DistributedError(f"rank {sender} failed while it sent its part of a file"))
                    return
                if received != extent.num_bytes:
                    self._fail(DistributedError(f"rank {sender} sent {received} bytes, {extent.num_bytes} were due"))
            self._write(chunk, room.array.data)
            self.progress(chunk.num_bytes)

    def _staged(self, file: int) -> Iterator[tuple[Chunk, memoryview]]:
        """Yield what this rank staged of a file, with its checksums taken; nothing after staging failed."""
        try:
            for item in self.of_file(file):
                try:
                    item.landing.wait()
                    if self.failure is None:
                        self.sums.take(item)
                    yield item.chunk, item.buffer.array.data
                finally:
                    item.release()
        except Exception as error:  # noqa: BLE001 - raised at the end, when no rank waits for this one any more
            self._fail(error)

    def _write(self, chunk: Chunk, data: memoryview) -> None:
        if self.failure is not None:
            return
        try:
            for extent in chunk.extents:
                place = slice(extent.buffer_offset, extent.buffer_offset + extent.num_bytes)
                self.files.write(chunk.file, data[place], extent.byte_offset)
        except Exception as error:  # noqa: BLE001 - as in `_staged`
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
