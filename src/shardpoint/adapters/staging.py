"""How bytes of live tensors get into staging memory: by memcpy on the host, by a side stream from a GPU.

GPU: written with care, and not yet run on one. Copies are queued on a stream of their own, which first waits for the
work that the trainer had queued when the save was asked for. What is staged may be read once `Landing.wait` returned;
a trainer's stream may change the weights again once it waits for the landing's events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from shardpoint.adapters.collect import Held
from shardpoint.adapters.tensors import LocalBytes
from shardpoint.storage import Buffer, OnAllocate


@dataclass(frozen=True, slots=True)
class Landing:
    """When copies that were queued have ended; copies on the host have ended already."""

    events: tuple[torch.cuda.Event, ...] = ()

    def wait(self) -> None:
        """Return once the bytes are in host memory."""
        for event in self.events:
            event.synchronize()

    def hold_back(self) -> None:
        """Have the current streams wait for the copies, without blocking the host."""
        for event in self.events:
            torch.cuda.current_stream().wait_event(event)


class Copier:
    """Copies bytes of this rank's tensors; used by one thread.

    Args:
        held: the live tensors, by (part, key).
    """

    def __init__(self, held: Mapping[tuple[str, str], Held]) -> None:
        self._held = held
        self._open: tuple[tuple[str, str], LocalBytes] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device in {item.tensor.device for item in held.values()}:
            if device.type == "cuda":
                stream = torch.cuda.Stream(device)
                # Order: what the trainer queued before the save comes first.
                stream.wait_stream(torch.cuda.current_stream(device))
                self._streams[device] = stream

    def copy(self, name: tuple[str, str], buffer: Buffer, buffer_offset: int, byte_offset: int, num_bytes: int) -> None:
        """Copy bytes of one tensor, or queue their copy.

        Args:
            name: (part, key). A tensor that is not contiguous is copied whole while it is the last one named.
            buffer: staging memory.
            buffer_offset: where the bytes go in it.
            byte_offset: where they start in this rank's part.
            num_bytes: how many.
        """
        if self._open is None or self._open[0] != name:
            self._close()
            self._open = (name, self._held[name].open())
        source = self._open[1]
        if not self._streams:
            source.copy_to(buffer, buffer_offset, byte_offset, num_bytes)
            return
        with self._on_stream(source.device):
            source.copy_to(buffer, buffer_offset, byte_offset, num_bytes)

    def landing(self) -> Landing:
        """Return when everything that was copied so far will be in host memory."""
        events: list[torch.cuda.Event] = []
        for stream in self._streams.values():
            event = torch.cuda.Event()
            event.record(stream)
            events.append(event)
        return Landing(tuple(events))

    def close(self) -> None:
        """Drop what was copied for reading."""
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].release()
            self._open = None

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Have what is done inside queued behind the copies so far."""
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def _on_stream(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[device]) if device in self._streams else nullcontext()


def pinning() -> OnAllocate | None:
    """Return what pins staging memory, where this process uses a GPU; None where it does not."""
    return pin if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def pin(address: int, num_bytes: int) -> Callable[[], None] | None:
    """Pin memory, so that copies from a GPU run beside everything else; memory that cannot be pinned works, slower."""
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, num_bytes, 0)) != 0:
        return None

    def unpin() -> None:
        runtime.cudaHostUnregister(address)

    return unpin
