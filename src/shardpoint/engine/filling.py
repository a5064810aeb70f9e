"""How planned reads are carried out: by a few threads, each piece checksummed while it is in the cache."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from shardpoint.adapters.destinations import Destination, InPlace
from shardpoint.checksum import Partial, crc64
from shardpoint.engine.source import Source
from shardpoint.errors import NotFoundError, TruncatedError
from shardpoint.manifest import FileEntry
from shardpoint.planning import Read, ReadPlan
from shardpoint.planning.reads import MAX_GAP_BYTES
from shardpoint.storage import Reader

MAX_THREADS = 4


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


class _Filling:
    """One plan being carried out by several threads."""

    def __init__(
        self,
        readers: Readers,
        plan: ReadPlan,
        destinations: Sequence[Destination],
        progress: Callable[[int], None],
        before_each: Callable[[], None],
    ) -> None:
        self._plan = plan
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
        scrap = memoryview(bytearray(MAX_GAP_BYTES))
        index = -1
        try:
            # `next` of a range's iterator is one step under the interpreter's lock: each index goes to one thread.
            for index in self._next:
                if self._failed:
                    return
                self._before_each()
                self._read(self._plan.reads[index], scrap)
        except Exception as error:  # noqa: BLE001 - raised again by `run`, in the caller's thread
            self._failed[index] = error

    def _read(self, read: Read, scrap: memoryview) -> None:
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
        targets = views
        if read.vectors != len(views):
            targets, end = [], read.byte_offset
            for view, offset, length in zip(views, plan.file_offsets[span], lengths, strict=True):
                if offset != end:
                    targets.append(scrap[: offset - end])
                targets.append(view)
                end = offset + length
        self._readers.take(read.file).read_vectors(targets, read.byte_offset)
        self.crcs[span] = [
            crc64(view) if counted else 0 for view, counted in zip(views, plan.counted[span], strict=True)
        ]
        for tensor, start, view in zip(tensors, starts, views, strict=True):
            if memory[tensor] is None:
                self._destinations[tensor].close(start, start + len(view), view)
        self._readers.give_back(read.file)
        self._progress(read.num_bytes)


def fill(
    readers: Readers,
    plan: ReadPlan,
    destinations: Sequence[Destination],
    totals: Sequence[int],
    progress: Callable[[int], None],
    before_each: Callable[[], None] = lambda: None,
) -> list[Partial]:
    """Read what a plan says.

    Args:
        readers: of the checkpoint.
        plan: the reads.
        destinations: where each wanted tensor goes.
        totals: bytes of each whole tensor.
        progress: told of each read's bytes, from any thread.
        before_each: called before each read, from any thread; what it raises ends the work.

    Returns:
        For each wanted tensor, the partial checksum of what was counted.

    Raises:
        TruncatedError: a file is missing or short.
        NotFoundError: the checkpoint was pruned or replaced meanwhile.
        StorageError: a read failed.

    Memory:
        Nothing beside the destinations, but for tensors that are filled through a copy: that of at most as many such
        tensors at once as there are threads, and those beside them.
    """
    filling = _Filling(readers, plan, destinations, progress, before_each)
    filling.run(max(1, min(MAX_THREADS, len(plan.reads), len(os.sched_getaffinity(0)))))
    partials = [Partial() for _ in totals]
    rows = zip(plan.tensors, filling.crcs, plan.tensor_offsets, plan.num_bytes, plan.counted, strict=True)
    for tensor, crc, offset, length, counted in rows:
        if counted:
            partials[tensor].add(crc, offset, length, totals[tensor])
    return partials
