"""Where the bytes that are read for a tensor go: straight into its memory, or through a copy where that cannot be.

Every destination is filled in pieces by several threads, in any order. A contiguous CPU tensor is its own memory. A
contiguous CUDA tensor takes each piece through a page-locked buffer (a piece at a time for each thread, on a stream of
its own). Anything else (strides, a lazy conjugate, another device) is filled as a whole copy, which is put into the
tensor after its last byte.
"""

from __future__ import annotations

import threading

import torch

from shardpoint.adapters.tensors import LocalBytes, flat_bytes, local_tensor, torch_dtype
from shardpoint.storage import is_fresh, populate

# For smaller tensors the allocator mostly hands out memory that was touched before.
LARGE_BYTES = 2**20


class InPlace:
    """A contiguous CPU tensor.

    Attributes:
        memory: its bytes.
        is_fresh: whether it is large and was never touched, as far as can be told: then its first touch costs several
            times as much as the read, unless it is prepared for.
    """

    def __init__(self, flat: torch.Tensor) -> None:
        self.memory: memoryview = flat.numpy().data
        self.is_fresh = len(self.memory) >= LARGE_BYTES and is_fresh(flat.data_ptr(), len(self.memory))
        if self.is_fresh:
            self._address = flat.data_ptr()

    def prepare(self, start: int, stop: int) -> None:
        """Have the pages of fresh memory made, in the thread that is about to fill it."""
        if self.is_fresh and stop - start >= LARGE_BYTES:
            populate(self._address + start, stop - start)

    def open(self, start: int, stop: int) -> memoryview:
        """Return the memory that bytes `start` to `stop` are to be read into."""
        return self.memory[start:stop]

    def close(self, start: int, stop: int, filled: memoryview) -> None:
        """Take over what `open` returned, filled: it is there already."""


class Copied:
    """Any other tensor: a whole copy is filled, and put into the tensor once all of it is there.

    Args:
        tensor: the live tensor.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._local = LocalBytes(tensor)
        self._missing_bytes = self._local.num_bytes
        self._memory: memoryview | None = None
        self._mutex = threading.Lock()

    def open(self, start: int, stop: int) -> memoryview:
        """Return memory for bytes `start` to `stop`; the first call makes the copy."""
        with self._mutex:
            if self._memory is None:
                self._memory = self._local.write_view()
            return self._memory[start:stop]

    def close(self, start: int, stop: int, filled: memoryview) -> None:
        """Count bytes as filled; the last ones put the copy into the tensor and free it."""
        del filled
        with self._mutex:
            self._missing_bytes -= stop - start
            if self._missing_bytes == 0:
                self._local.finish()
                self._memory = None


class Converted:
    """A tensor of another dtype than the stored one: the stored bytes are filled in whole, then converted into it.

    Args:
        local: this rank's part.
        stored: the dtype of the bytes.
    """

    def __init__(self, local: torch.Tensor, stored: torch.dtype) -> None:
        self._local = local
        self._stored = stored
        self._staged: torch.Tensor | None = None
        self._missing_bytes = local.numel() * stored.itemsize
        self._mutex = threading.Lock()

    def open(self, start: int, stop: int) -> memoryview:
        """Return memory for bytes `start` to `stop`; the first call makes the copy."""
        with self._mutex:
            if self._staged is None:
                self._staged = torch.empty(self._local.shape, dtype=self._stored)
            view: memoryview = flat_bytes(self._staged).numpy()[start:stop].data
            return view

    def close(self, start: int, stop: int, filled: memoryview) -> None:
        """Count bytes as filled; the last ones convert the copy into the tensor and free it."""
        del filled
        with self._mutex, torch.no_grad():
            self._missing_bytes -= stop - start
            if self._missing_bytes == 0 and self._staged is not None:
                self._local.copy_(self._staged)
                self._staged = None


class CudaPieces:
    """A contiguous CUDA tensor, filled piece by piece through page-locked memory.

    Written with care and not yet run on a GPU: the machines that it was developed on have none.

    Args:
        flat: the tensor's bytes, uint8 `[num_bytes]`, on its device.
        stream: what copies; it waits for what the current stream was given before.
    """

    def __init__(self, flat: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self._flat = flat
        self._stream = stream

    def open(self, start: int, stop: int) -> memoryview:
        """Return page-locked memory for bytes `start` to `stop`; freed, torch keeps it for the next piece."""
        view: memoryview = torch.empty(stop - start, dtype=torch.uint8, pin_memory=True).numpy().data
        return view

    def close(self, start: int, stop: int, filled: memoryview) -> None:
        """Copy a piece to the device.

        Order: the copy has ended on return, so the page-locked memory may be used again, and whatever the caller
        enqueues afterwards, on any stream, sees the bytes.
        """
        with torch.cuda.stream(self._stream):
            self._flat[start:stop].copy_(torch.frombuffer(filled, dtype=torch.uint8), non_blocking=True)
        self._stream.synchronize()


Destination = InPlace | Copied | Converted | CudaPieces


class Destinations:
    """Make destinations; keeps one copying stream for each CUDA device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, tensor: torch.Tensor, stored_dtype: str | None = None) -> Destination:
        """Return where a live tensor's bytes go.

        Args:
            tensor: plain or DTensor; of a DTensor, this rank's part is meant.
            stored_dtype: what the bytes are, where that may be another dtype than the tensor's.
        """
        local = local_tensor(tensor)
        if stored_dtype is not None and torch_dtype(stored_dtype) is not local.dtype:
            return Converted(local, torch_dtype(stored_dtype))
        if not local.is_contiguous() or local.is_conj() or local.is_neg():
            return Copied(tensor)
        if local.device.type == "cpu":
            return InPlace(flat_bytes(local))
        if local.device.type == "cuda":
            return CudaPieces(flat_bytes(local), self._stream(local.device))
        return Copied(tensor)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]
