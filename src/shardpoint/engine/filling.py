"""How planned reads are carried out: by a few threads, each piece checksummed while it is in the cache."""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shardpoint.adapters.destinations import Destination, InPlace
from shardpoint.checksum import Partial, crc64
from shardpoint.engine.source import Source
from shardpoint.errors import NotFoundError, TruncatedError
from shardpoint.manifest import FileEntry
from shardpoint.planning import Read, ReadPlan
from shardpoint.planning.reads import MAX_GAP_BYTES, PIECE_BYTES
from shardpoint.storage import Buffer, BufferPool, Reader

MAX_THREADS = 4
_MIN_UNCACHED_BYTES = 2**18


def check_size(source: Source, entry: FileEntry, size_bytes: int) -> None:
    """Compare a file's size with the committed one.

    Raises:
        TruncatedError: it differs.
    """
    if size_bytes != entry.size_bytes:
        text = f"{entry.path} of {source.manifest.name} has {size_bytes} bytes, {entry.size_bytes} were committed"
        raise TruncatedError(text, key=entry.path, expected=str(entry.size_bytes), actual=str(size_bytes))


class Readers:
    """The open files of a checkpoint: each is opened at its first read.

    Args:
        source: the checkpoint.
        reads: all that there will be, so that each file is closed after its last; None keeps them open until `close`.
    """

    def __init__(self, source: Source, reads: Sequence[Read] | None = None) -> None:
        self._source = source
        self._left = None if reads is None else Counter(read.file for read in reads)
        self._open: dict[int, Reader] = {}
        self._mutex = threading.Lock()

    def take(self, file: int) -> Reader:
        """Return a file's reader.

        Raises:
            TruncatedError: the file is missing, or has another size than was committed.
            NotFoundError: the checkpoint was pruned or replaced meanwhile.
        """
        with self._mutex:
            if file not in self._open:
                entry = self._source.manifest.files[file]
                try:
                    reader = self._source.store.open_reader(self._source.path(entry.path))
                except NotFoundError as error:
                    raise self._source.gone(entry.path, error) from error
                try:
                    check_size(self._source, entry, reader.size_bytes)
                except TruncatedError:
                    reader.close()
                    raise
                self._open[file] = reader
            return self._open[file]

    def give_back(self, file: int) -> None:
        """Say that a read is done."""
        if self._left is None:
            return
        with self._mutex:
            self._left[file] -= 1
            if not self._left[file]:
                self._open.pop(file).close()

    def close(self) -> None:
        """Close what is open."""
        with self._mutex:
            while self._open:
                self._open.popitem()[1].close()


class _Scratch:
    """One thread's memory for reads past the page cache: from the pool where that has some to spare, or its own."""

    def __init__(self, pool: BufferPool | None) -> None:
        self._pool = pool
        self._buffer: Buffer | None = None
        self._is_lent = False

    def read(self, reader: Reader, read: Read) -> npt.NDArray[np.uint8] | None:
        """Read past the page cache, if that has not got the bytes."""
        room = read.num_bytes + 2 * mmap.PAGESIZE
        if self._buffer is None or len(self._buffer.array) < room:
            self.close()
            if self._pool is not None and self._pool.buffer_bytes >= room:
                self._buffer = self._pool.acquire(give_up=lambda: True)
            self._is_lent = self._buffer is not None
            if self._buffer is None:
                self._buffer = Buffer(max(room, PIECE_BYTES + 2 * mmap.PAGESIZE))
        view = reader.read_uncached(self._buffer.array.data, read.byte_offset, read.num_bytes)
        return None if view is None else np.frombuffer(view, dtype=np.uint8)

    def close(self) -> None:
        """Give the memory back."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if self._is_lent and self._pool is not None:
            self._pool.release(buffer)
        else:
            buffer.close()


class _Filling:
    """One plan being carried out by several threads."""

    def __init__(
        self,
        readers: Readers,
        plan: ReadPlan,
        destinations: Sequence[Destination],
        progress: Callable[[int], None],
        before_each: Callable[[], None],
        pool: BufferPool | None,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._destinations = destinations
        # What is in place is sliced without a call: there may be a segment for each of 100,000 rows.
        self._memory = [item.memory if isinstance(item, InPlace) else None for item in destinations]
        self._fresh = [item if isinstance(item, InPlace) and item.is_fresh else None for item in destinations]
        self._progress = progress
        self._before_each = before_each
        self._readers = readers
        self._next: Iterator[int] = iter(range(len(plan.reads)))
        self._failed: dict[int, BaseException] = {}
        self.crcs: list[int] = [0] * len(plan.tensors)

    def run(self, num_threads: int) -> None:
        """Read everything; the calling thread reads too."""
        others = [
            threading.Thread(target=self._work, name=f"shardpoint-read-{number}", daemon=True)
            for number in range(1, num_threads)
        ]
        try:
            for thread in others:
                thread.start()
            self._work()
        except BaseException as error:  # an interruption: no thread goes on filling a target that nobody waits for
            self._failed[-1] = error
            raise
        finally:
            for thread in others:
                if thread.ident is not None:
                    thread.join()
        if self._failed:
            raise self._failed[min(self._failed)]

    def _work(self) -> None:
        scrap, scratch = memoryview(bytearray(MAX_GAP_BYTES)), _Scratch(self._pool)
        index = -1
        try:
            # `next` of a range's iterator is one step under the interpreter's lock: each index goes to one thread.
            for index in self._next:
                if self._failed:
                    return
                self._before_each()
                self._read(self._plan.reads[index], scrap, scratch)
        except Exception as error:  # noqa: BLE001 - raised again by `run`, in the caller's thread
            self._failed[index] = error
        finally:
            scratch.close()

    def _read(self, read: Read, scrap: memoryview, scratch: _Scratch) -> None:
        plan, memory = self._plan, self._memory
        span = slice(read.first, read.stop)
        tensors, starts, lengths = plan.tensors[span], plan.local_offsets[span], plan.num_bytes[span]
        views: list[memoryview] = []
        for tensor, start, length in zip(tensors, starts, lengths, strict=True):
            whole = memory[tensor]
            if whole is None:
                views.append(self._destinations[tensor].open(start, start + length))
            else:
                views.append(whole[start : start + length])
                fresh = self._fresh[tensor]
                if fresh is not None:
                    fresh.prepare(start, start + length)
        self._receive(read, views, scrap, scratch)
        self.crcs[span] = [
            crc64(view) if counted else 0 for view, counted in zip(views, plan.counted[span], strict=True)
        ]
        for tensor, start, view in zip(tensors, starts, views, strict=True):
            if memory[tensor] is None:
                self._destinations[tensor].close(start, start + len(view), view)
        self._readers.give_back(read.file)
        self._progress(read.num_bytes)

    def _receive(self, read: Read, views: Sequence[memoryview], scrap: memoryview, scratch: _Scratch) -> None:
        """Fill the memory of a read's segments."""
        span = slice(read.first, read.stop)
        offsets, lengths = self._plan.file_offsets[span], self._plan.num_bytes[span]
        reader = self._readers.take(read.file)
        past = scratch.read(reader, read) if read.is_alone and read.num_bytes >= _MIN_UNCACHED_BYTES else None
        if past is not None:
            for view, offset, length in zip(views, offsets, lengths, strict=True):
                start = offset - read.byte_offset
                # Not by slices of memoryviews: those hold the interpreter's lock while they copy.
                np.copyto(np.frombuffer(view, dtype=np.uint8), past[start : start + length])
            return
        targets = views
        if read.vectors != len(views):
            targets, end = [], read.byte_offset
            for view, offset, length in zip(views, offsets, lengths, strict=True):
                if offset != end:
                    targets.append(scrap[: offset - end])
                targets.append(view)
                end = offset + length
        reader.read_vectors(targets, read.byte_offset)


def fill(
    readers: Readers,
    plan: ReadPlan,
    destinations: Sequence[Destination],
    totals: Sequence[int],
    progress: Callable[[int], None],
    before_each: Callable[[], None] = lambda: None,
    pool: BufferPool | None = None,
) -> list[Partial]:
    """Read what a plan says.

    Args:
        readers: of the checkpoint.
        plan: the reads.
        destinations: where each wanted tensor goes.
        totals: bytes of each whole tensor.
        progress: told of each read's bytes, from any thread.
        before_each: called before each read, from any thread; what it raises ends the work.
        pool: lends memory for reads past the page cache.

    Returns:
        For each wanted tensor, the partial checksum of what was counted.

    Raises:
        TruncatedError: a file is missing or short.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        StorageError: a read failed.

    Memory:
        A buffer of `PIECE_BYTES` for each of at most `MAX_THREADS` threads, where bytes are read past the page cache
        and the pool has none to spare; and for tensors that are filled through a copy, that of at most as many such
        tensors at once as there are threads, and those beside them.
    """
    filling = _Filling(readers, plan, destinations, progress, before_each, pool)
    # Reads past the page cache keep a device busy, not a core.
    most = MAX_THREADS if any(read.is_alone for read in plan.reads) else len(os.sched_getaffinity(0))
    filling.run(max(1, min(MAX_THREADS, len(plan.reads), most)))
    partials = [Partial() for _ in totals]
    rows = zip(plan.tensors, filling.crcs, plan.tensor_offsets, plan.num_bytes, plan.counted, strict=True)
    for tensor, crc, offset, length, counted in rows:
        if counted:
            partials[tensor].add(crc, offset, length, totals[tensor])
    return partials
