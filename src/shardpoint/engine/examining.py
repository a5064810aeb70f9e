"""What a rank finds out about its own tensors while they are saved: digests of what others hold too, and NaN.

Values are looked at where they are staged, by the rank that owns them, so each once. Replicas are compared from the
live tensors, at the moment that the save holds: all that a rank does not write is read for this alone.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from shardpoint.adapters.collect import Held
from shardpoint.adapters.staging import Copier
from shardpoint.adapters.tensors import stored_bytes
from shardpoint.checksum import crc64
from shardpoint.dtypes import stored_form
from shardpoint.engine.evidence import Details, Evidence, NotFinite, Versions
from shardpoint.engine.finite import not_finite_bytes
from shardpoint.engine.opening import AgreedSave, ReplicaCheck
from shardpoint.manifest import Holders
from shardpoint.planning import MIN_WINDOW_BYTES, ReplicaGroup, compared_window, turn_of

_BLOCK_BYTES = 16 * 2**20
_ROW = struct.Struct("<IQ")


def _everything(_: str) -> bool:
    return True


class Examination:
    """One rank's part in looking at one save. Threads may share it.

    Buffers are left out: those of BatchNorm differ between replicas by design, and a mask holds infinities.

    Args:
        agreed: the structure.
        rank: this rank.
        name: the checkpoint's name; all ranks compare the bytes that follow from it.
        replicas: how much of each replica is compared.
    """

    def __init__(self, agreed: AgreedSave, rank: int, name: str, replicas: ReplicaCheck) -> None:
        self._agreed = agreed
        self._rank = rank
        self._replicas = replicas
        self._turn = turn_of(name)
        self._digests: dict[int, tuple[int, int]] = {}
        self._entries: dict[int, list[int]] = {}
        self._not_finite: Counter[int] = Counter()
        self._mutex = threading.Lock()

    def look(self, entry: int, data: memoryview) -> None:
        """Look for NaN and infinities in bytes that this rank owns.

        Args:
            entry: index of the tensor.
            data: whole values of it; no byte is shown twice, to any rank.
        """
        tensor = self._agreed.table.entries[entry]
        held = self._agreed.own.held.get((tensor.part, tensor.key))
        if held is None or not held.is_stable:
            return
        num_bytes = not_finite_bytes(data, stored_form(tensor.dtype, tensor.shape)[0])
        if num_bytes:
            with self._mutex:
                self._not_finite[entry] += num_bytes

    def forget(self, entries: Iterable[int]) -> None:
        """Forget what was found in tensors that will be looked at again."""
        with self._mutex:
            for entry in entries:
                self._not_finite.pop(entry, None)

    def compare(
        self,
        copier: Copier,
        wanted: Callable[[str], bool] = _everything,
        progress: Callable[[int], None] = lambda _num_bytes: None,
    ) -> bool:
        """Take the digests of what other ranks hold too.

        Args:
            copier: what is read is as it is for this copier.
            wanted: tells of a part whether its tensors are meant.
            progress: told of the bytes that were read.

        Returns:
            Whether there was anything to read.
        """
        entries, held = self._agreed.table.entries, self._agreed.own.held
        found = False
        with torch.no_grad(), copier.streams():
            for group in self._groups():
                for index in self._compared(group):
                    entry = entries[index]
                    if wanted(entry.part):
                        self._digests[index] = self._digest(held[entry.part, entry.key], progress)
                        found = True
        return found

    def _digest(self, held: Held, progress: Callable[[int], None]) -> tuple[int, int]:
        """Return the digest of what is compared of a tensor, and how many bytes that is."""
        data = stored_bytes(held.local)
        if self._replicas == "sampled" and len(data) > MIN_WINDOW_BYTES:
            start, stop = compared_window(len(data), self._turn)
            data = data[start:stop]
        if len(data) <= _BLOCK_BYTES:
            crc = crc64(data.cpu().numpy().data)
        else:
            crc = 0
            for block in data.split(_BLOCK_BYTES):
                crc = crc64(block.cpu().numpy().data, crc)
                progress(len(block))
        return crc, len(data)

    def evidence(self) -> Evidence:
        """Return what this rank votes, once everything was compared and looked at."""
        replicas: dict[int, tuple[int, int]] = {}
        for group in self._groups():
            rows = [_ROW.pack(index, self._digests[index][0]) for index in self._compared(group)]
            if rows:
                digest = crc64(b"".join(rows))
                replicas[group.key] = digest, digest
        alone = Holders([self._rank], 1)
        return Evidence(replicas, {entry: NotFinite(num, alone) for entry, num in self._not_finite.items()})

    def details(self, keys: Iterable[int]) -> Details:
        """Return this rank's digest of each tensor of some groups, as far as it belongs to them."""
        wanted, alone = frozenset(keys), Holders([self._rank], 1)
        return {
            group.key: {
                index: Versions(num_bytes, {digest: alone})
                for index in self._compared(group)
                for digest, num_bytes in [self._digests[index]]
            }
            for group in self._groups()
            if group.key in wanted
        }

    def _groups(self) -> tuple[ReplicaGroup, ...]:
        return () if self._replicas == "off" else self._agreed.plan.replicas

    def _compared(self, group: ReplicaGroup) -> list[int]:
        """Return the tensors of a group whose replicas must be equal."""
        if group.key not in self._entries:
            entries, held = self._agreed.table.entries, self._agreed.own.held
            stable = [index for index in group.entries if held[entries[index].part, entries[index].key].is_stable]
            self._entries[group.key] = stable
        return self._entries[group.key]
