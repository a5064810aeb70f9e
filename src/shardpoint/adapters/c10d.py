"""How do the ranks of a torch process group agree, without touching NCCL, gloo or the trainer's own store client?

Votes travel through the group's c10d store, over a connection of their own. One daemon thread per comm owns that
connection: it makes every store call, and between calls it renews the rank's beat. So

- a store whose host is frozen cannot hang a trainer: TCPStore's `check`, `get` and even `wait` with a timeout block for
  ever, deaf to signals, while the host is stopped (measured); the caller here waits in slices of 0.5 s, and gives up
  after `silence_s`;
- nothing waits inside the store: a `wait` blocks every other call of its client, FileStore's counts in whole seconds,
  and TCPStore's prints two warnings each time that it ends in vain. Waiting is asking again, at growing intervals.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import msgspec
import torch.distributed as dist

from shardpoint.adapters.store_line import Line, StoreClient
from shardpoint.comm import Comm, SoloComm
from shardpoint.comm.liveness import Beat
from shardpoint.comm.rounds import RoundComm
from shardpoint.comm.tally import Merge
from shardpoint.comm.tree import FANOUT
from shardpoint.comm.votes import decode, encode
from shardpoint.errors import DistributedError, UsageError

CHUNK_BYTES = 1 << 20  # a TCPStore's server drops the connection of a client that sends more than 8 MiB
_HEAD_BYTES = 64  # what a value's head takes of its first chunk, at most
_POLL_MIN_S = 0.0002
_POLL_MAX_S = 0.1
_POLL_SHARE = 0.05  # asking costs at most this share of the time waited
_LINGER_S = 5.0

_opened: list[tuple[weakref.ref[dist.ProcessGroup], C10dComm]] = []  # weak: a group that is gone must free its store
_opened_lock = threading.Lock()


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """The value under a key: how many chunks there are, and the first; the others are under `key/1`, `key/2`, ..."""

    num_chunks: int
    first: bytes


class C10dComm(RoundComm):
    """Agree with the ranks of a torch process group; see `Comm` for what a round is.

    The keys stand in the group's store under `shardpoint/<n>/`, where `<n>` counts the comms that this rank has made
    over that store: construction is collective, so the ranks count alike. The store itself keeps the count, not the
    process: a default group that is destroyed and made again with other members has the same name, and members that
    have made more comms before than the others. A round's keys are deleted once every rank has read them.

    Args:
        group: a process group that this process belongs to; None is the default group. `rank` and `world_size` are the
            group's.
        silence_s: seconds without a beat after which a rank counts as dead, and a store that does not answer as gone.
        stall_s: seconds without progress after which a rank counts as stalled. It also bounds the wait for a rank that
            was never heard of.
        heartbeat_s: seconds between two beats, and between two looks at the others' beats.
        fanout: of how many ranks, at most, one rank takes the votes; the same on all ranks.

    Raises:
        UsageError: torch.distributed is not initialised, this process is not in the group, or the times or `fanout` do
            not fit.
        DistributedError: the group's store is gone, or does not answer.

    Collective:
        All ranks of the group construct it, in the same order among the comms of that group; nobody waits for others.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        silence_s: float = 60.0,
        stall_s: float = 600.0,
        heartbeat_s: float = 5.0,
        fanout: int = FANOUT,
    ) -> None:
        if not 0 < heartbeat_s <= silence_s / 2 or stall_s <= 0:
            text = (
                f"heartbeat_s={heartbeat_s}, silence_s={silence_s}, stall_s={stall_s}: all must be positive, and "
                "silence_s at least twice heartbeat_s"
            )
            raise UsageError(text)
        group = _member_group(group)
        super().__init__(
            dist.get_rank(group),
            dist.get_world_size(group),
            silence_s=silence_s,
            stall_s=stall_s,
            look_s=heartbeat_s,
            fanout=fanout,
        )
        name = group.group_name
        self._closed = False
        self._has_left = False
        self._process_id = os.getpid()
        self._num_beats = 0
        self._heard_of: set[int] = set()
        self._verdict_keys: list[str] = []
        self._vote_keys: dict[str, list[str]] = {}
        self._line: Line | None = None
        if self.world_size > 1:
            store = group.get_group_store()
            self._line = Line(
                lambda: _connect(store, self.rank, silence_s),
                self._send_beat,
                heartbeat_s=heartbeat_s,
                silence_s=silence_s,
                name=f"shardpoint-comm-{name}",
            )
            # A daemon thread inside a native call when the interpreter ends would abort the process.
            atexit.register(self.close)

    @property
    def is_open(self) -> bool:
        """Say whether rounds can still run: the comm is neither broken nor closed, and this process made it."""
        return self._broken is None and os.getpid() == self._process_id

    def agree(
        self,
        topic: str,
        work: Callable[[], bytes],
        decide: Callable[[Sequence[bytes]], bytes],
        merge: Merge | None = None,
    ) -> bytes:
        """Run one collective round (see `Comm.agree`)."""
        if os.getpid() != self._process_id:
            text = f"{topic}: this comm belongs to process {self._process_id}; a forked child cannot use it"
            raise UsageError(text)
        return super().agree(topic, work, decide, merge)

    def close(self) -> None:
        """Leave the group (see `Comm.close`).

        The last rank to close removes all keys that the comm still has in the store; the ranks' counts of comms stay.
        """
        if self._closed or os.getpid() != self._process_id:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._line is None:
            self._break("it was closed")
            return
        try:
            self._linger()
            self._break("it was closed")
            self._wire.call(self._send_beat)
            self._has_left = True
            if self._wire.call(lambda client: client.add("closed", 1)) == self.world_size:
                self._remove_all()
        except DistributedError:
            # The store is gone: with it the keys, and whoever might have waited for a word from this rank.
            self._break("it was closed")
        finally:
            self._wire.stop()

    def _linger(self) -> None:
        """Give the others time to read the last verdict: the store may live in this process, and end with it."""
        if not self.is_coordinator or self._posted_verdict < 0:
            return
        waiting = [rank for rank in self._peers() if rank not in self._lost_ranks]
        give_up_at = time.monotonic() + min(_LINGER_S, self._silence_s)
        while True:
            beats = self._beats(waiting)
            waiting = [
                rank
                for rank in waiting
                if rank not in beats or (beats[rank].heard < self._posted_verdict and beats[rank].left is None)
            ]
            if not waiting or time.monotonic() >= give_up_at:
                break
            time.sleep(_POLL_MIN_S * 10)
        if not waiting:
            self._delete_verdicts()

    def _remove_all(self) -> None:
        for rank in range(self.world_size):
            self._delete(_beat_key(rank))
        if self._next_round > 0:
            _verdict, keys = self._get(_verdict_key(self._next_round - 1))
            for key in keys:
                self._delete(key)
        self._delete("closed")

    # The transport.

    @property
    def _wire(self) -> Line:
        if self._line is None:
            text = "a group of one rank has nobody to send to"
            raise DistributedError(text)
        return self._line

    def _post_vote(self, number: int, vote: bytes) -> None:
        self._put(_vote_key(number, self.rank), vote)

    def _fetch_vote(self, number: int, rank: int) -> bytes | None:
        key = _vote_key(number, rank)
        vote, keys = self._get(key)
        if keys:
            self._vote_keys[key] = keys
        return vote

    def _remove_vote(self, number: int, rank: int) -> None:
        key = _vote_key(number, rank)
        for used in self._vote_keys.pop(key, None) or self._get(key)[1]:
            self._delete(used)

    def _post_verdict(self, number: int, verdict: bytes) -> None:
        self._verdict_keys += self._put(_verdict_key(number), verdict)

    def _fetch_verdict(self, number: int) -> bytes | None:
        verdict, _keys = self._get(_verdict_key(number))
        return verdict

    def _retire(self, number: int) -> None:
        del number
        self._delete_verdicts()

    def _delete_verdicts(self) -> None:
        for key in self._verdict_keys:
            self._delete(key)
        self._verdict_keys = []

    def _delete(self, key: str) -> None:
        self._wire.post(lambda client: client.delete_key(key))

    def _has(self, key: str) -> bool:
        return self._wire.call(lambda client: client.check([key]))

    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        for rank in ranks:
            if rank not in self._heard_of and self._has(_beat_key(rank)):
                self._heard_of.add(rank)
        known = [rank for rank in ranks if rank in self._heard_of]
        if not known:
            return {}
        values = self._wire.call(lambda client: client.multi_get([_beat_key(rank) for rank in known]))
        return {rank: decode(value, Beat) for rank, value in zip(known, values, strict=True)}

    def _pause(self, waited_s: float) -> None:
        time.sleep(min(_POLL_MAX_S, max(_POLL_MIN_S, waited_s * _POLL_SHARE)))

    def _announce(self) -> None:
        if self._line is not None:
            self._line.post(self._send_beat)

    def _send_beat(self, client: StoreClient) -> None:
        if self._has_left:
            return
        self._num_beats += 1
        client.set(_beat_key(self.rank), encode(self._beat(self._num_beats)))

    def _put(self, key: str, value: bytes) -> list[str]:
        """Store a value in chunks, and return the keys that it took."""
        room = CHUNK_BYTES - _HEAD_BYTES
        rest = range(room, len(value), CHUNK_BYTES)
        parts = [f"{key}/{index}" for index in range(1, 1 + len(rest))]
        for part, begin in zip(parts, rest, strict=True):
            self._set(part, value[begin : begin + CHUNK_BYTES])
        # Order: the head last; whoever sees it finds all chunks.
        self._set(key, encode(_Head(num_chunks=1 + len(rest), first=value[:room])))
        return [*parts, key]

    def _get(self, key: str) -> tuple[bytes | None, list[str]]:
        """Return the value under a key, or None, and the keys that it takes."""
        data = self._wire.call(lambda client: client.get(key) if client.check([key]) else None)
        if data is None:
            return None, []
        head: _Head = decode(data, _Head)
        parts = [f"{key}/{index}" for index in range(1, head.num_chunks)]
        return b"".join([head.first, *map(self._get_part, parts)]), [*parts, key]

    def _set(self, key: str, value: bytes) -> None:
        self._wire.call(lambda client: client.set(key, value))

    def _get_part(self, key: str) -> bytes:
        return self._wire.call(lambda client: client.get(key))


def open_comm(group: dist.ProcessGroup | None = None) -> Comm:
    """Return the comm of a process group, the same one each time.

    It lives as long as the process, and closes at its end; a comm that broke, was closed, or whose group was destroyed
    is replaced by a new one. Who opens a comm does not close it: others may hold it too.

    Args:
        group: a process group that this process belongs to; None is the default group.

    Returns:
        A `SoloComm` where torch.distributed is not initialised or the group has one rank, else a `C10dComm`.

    Raises:
        UsageError: this process is not in `group`.
        DistributedError: the group's store is gone, or does not answer.

    Collective:
        All ranks of the group, in the same order among the groups' comms; nobody waits for the others.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return SoloComm()
    group = _member_group(group)
    if dist.get_world_size(group) == 1:
        return SoloComm()
    with _opened_lock:
        for entry in list(_opened):
            known, comm = entry[0](), entry[1]
            if known is None or not comm.is_open or not _is_alive(known):
                _opened.remove(entry)
                comm.close()
        for reference, comm in _opened:
            if reference() is group:
                return comm
        opened = C10dComm(group)
        _opened.append((weakref.ref(group), opened))
        return opened


def own_comm(group: dist.ProcessGroup | None = None) -> Comm:
    """Return a comm of one's own for a process group, for a thread of one's own; who asks for it closes it.

    Args:
        group: a process group that this process belongs to; None is the default group.

    Raises:
        UsageError: this process is not in `group`.
        DistributedError: the group's store is gone, or does not answer.

    Collective:
        All ranks of the group, in the same order among the groups' comms; nobody waits for the others.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return SoloComm()
    group = _member_group(group)
    return SoloComm() if dist.get_world_size(group) == 1 else C10dComm(group)


def _member_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        text = "torch.distributed is not initialised; call torch.distributed.init_process_group first"
        raise UsageError(text)
    if group is None:
        group = dist.group.WORLD
    if group is None or dist.get_rank(group) < 0:
        text = f"global rank {dist.get_rank()} is not in the process group; only its members may use its comm"
        raise UsageError(text)
    return group


def _is_alive(group: dist.ProcessGroup) -> bool:
    """Say whether torch still knows the group: it was not destroyed."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def _connect(store: Any, rank: int, timeout_s: float) -> StoreClient:
    line = store.clone()
    line.set_timeout(timedelta(seconds=timeout_s))
    number = line.add(f"shardpoint/opened/{rank}", 1)
    client = dist.PrefixStore(f"shardpoint/{number}", line)  # type: ignore[attr-defined]  # torch exports it, but not in words
    client.set_timeout(timedelta(seconds=timeout_s))
    return cast("StoreClient", client)


def _vote_key(number: int, rank: int) -> str:
    return f"{number}/vote/{rank}"


def _verdict_key(number: int) -> str:
    return f"{number}/verdict"


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
