"""Who may change a root: the living incarnation, and how a new one takes over from a dead one.

Every visible mutation (commit, exchange, prune, sweep) has one end inside `.shardpoint/inc-<n>/`, by path. A new
incarnation fences its predecessor by renaming that directory away and then each child in it, so that a rename of the
predecessor that was already under way finds nothing. It may do so at once when the predecessor is dead: its lock is free.
On another machine the lock may not tell, so there the owner renews a counter, which a contender watches with its own clock.

Source: DESIGN section 4, "Who owns a root"; docs/spec/FORMAT.md, "Ownership".
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from shardpoint.commit.recovery import recover, sweep
from shardpoint.commit.visible import CONTROL_DIRECTORY, committed_checkpoints
from shardpoint.errors import AlreadyExistsError, FencedError, NotFoundError, RootBusyError
from shardpoint.events import Listener, log_event
from shardpoint.storage import Lock, Store, SyncPoint

HEARTBEAT_S = 10.0
WATCH_S = 60.0
POLL_S = 0.5

_INCARNATION = re.compile(r"inc-(\d{6})\Z")
_FENCED = re.compile(r"fenced-(\d{6})\Z")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _kernel_id() -> str:
    """Return what identifies the running kernel: two processes with the same one share their locks."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"node-{uuid.getnode():x}"


@dataclass
class RootOwner:
    """This process's hold on a root; made by `acquire_root`, shared by everything in the process that saves there.

    Attributes:
        location: the root.
        incarnation: its number, greater than that of every owner before.
    """

    location: str
    incarnation: int
    _lock: Lock
    _next_sequence: int
    _holders: int = 1
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> str:
        """The incarnation's directory."""
        return f"{CONTROL_DIRECTORY}/inc-{self.incarnation:06d}"

    def take_sequence(self) -> int:
        """Return the next commit sequence number; taken when a save starts."""
        sequence = self._next_sequence
        self._next_sequence += 1
        return sequence

    def fenced_error(self) -> FencedError:
        """Return the error that says the root was lost."""
        text = (
            f"another run took over {self.location}: incarnation {self.incarnation} is fenced and can commit nothing more. "
            "Stop this run, or give it a root of its own"
        )
        return FencedError(text)

    def check_alive(self, store: Store) -> None:
        """Raise `FencedError` when the incarnation's directory is no longer there."""
        if not store.exists(self.key):
            raise self.fenced_error()

    def release(self) -> None:
        """Give one hold up; the last one frees the lock, so that another run may take the root over at once."""
        with _owners_mutex:
            self._holders -= 1
            if self._holders > 0:
                return
            _owners.pop((os.getpid(), self.location), None)
            self._stop.set()
            self._lock.release()


_owners: dict[tuple[int, str], RootOwner] = {}
_owners_mutex = threading.RLock()


def owned_root(store: Store) -> RootOwner | None:
    """Return this process's hold on a root, if it has one."""
    with _owners_mutex:
        return _owners.get((os.getpid(), store.location))


def acquire_root(store: Store, *, listener: Listener = log_event, watch_s: float = WATCH_S) -> RootOwner:
    """Become the owner of a root, or share the hold that this process already has.

    Makes the root where it is not there, fences a dead predecessor, finishes or undoes what it left half done, and sweeps
    its torn attempts. Call `release` once for each call.

    Args:
        store: the root.
        listener: told of what was recovered and swept.
        watch_s: how long to watch the counter of an owner on another machine before it counts as dead, in seconds.

    Raises:
        RootBusyError: another living run owns the root.

    Durability:
        On return the ownership is durable; nothing of a fenced incarnation can become visible any more.
    """
    with _owners_mutex:
        held = _owners.get((os.getpid(), store.location))
        if held is not None and store.exists(held.key):
            held._holders += 1  # noqa: SLF001 - the registry of this module
            return held
        if held is not None:
            # Fenced while it slept: what it held is worthless, and its holders find out by FencedError.
            _owners.pop((os.getpid(), store.location), None)
            held._stop.set()  # noqa: SLF001 - the registry of this module
        owner = _take_over(store, listener, watch_s)
        _owners[os.getpid(), store.location] = owner
        return owner


def _numbers(store: Store, pattern: re.Pattern[str]) -> list[int]:
    return [int(match.group(1)) for entry in store.entries(CONTROL_DIRECTORY) if (match := pattern.match(entry.name))]


def _take_over(store: Store, listener: Listener, watch_s: float) -> RootOwner:
    store.make_root()
    try:
        store.make_directory(CONTROL_DIRECTORY)
        store.sync_directory("", SyncPoint.ROOT)
    except AlreadyExistsError:
        pass
    while True:
        living = max(_numbers(store, _INCARNATION), default=None)
        old_lock: Lock | None = None
        if living is not None:
            try:
                old_lock = _lock_dead(store, f"{CONTROL_DIRECTORY}/inc-{living:06d}", watch_s)
                fence(store, living)
            except NotFoundError:
                if old_lock is not None:
                    old_lock.release()
                continue  # fenced by somebody else in this moment
        try:
            number = max(_numbers(store, _INCARNATION) + _numbers(store, _FENCED), default=0) + 1
            lock = _new_incarnation(store, number)
        finally:
            if old_lock is not None:
                old_lock.release()
        if lock is None:
            continue  # a rival won the number
        owner = RootOwner(store.location, number, lock, 0)
        try:
            recover(store, owner.key, listener)
            sweep(store, owner.key, listener)
            found = [item.manifest.commit_sequence for item in committed_checkpoints(store) if item.manifest]
            owner._next_sequence = max(found, default=0) + 1  # noqa: SLF001 - the only maker
            _start_heartbeat(store, owner)
        except BaseException:
            lock.release()
            raise
        return owner


def _lock_dead(store: Store, key: str, watch_s: float) -> Lock:
    """Return the lock of a dead incarnation, or raise `RootBusyError` where it lives."""
    lock = store.lock(f"{key}/lock")
    if lock is None:
        raise RootBusyError(_busy_text(store, key))
    try:
        if _owner_fields(store, key).get("kernel") != _kernel_id() and _counter_moves(store, key, watch_s):
            raise RootBusyError(_busy_text(store, key))
    except BaseException:
        lock.release()
        raise
    return lock


def _owner_fields(store: Store, key: str) -> dict[str, str]:
    """Return who made an incarnation, for messages and to compare kernels; unreadable counts as another kernel."""
    try:
        fields = json.loads(store.read_bytes(f"{key}/owner.json"))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _busy_text(store: Store, key: str) -> str:
    try:
        fields = _owner_fields(store, key)
    except NotFoundError:
        fields = {}
    return (
        f"another living run owns {store.location} (process {fields.get('pid', 'unknown')} on "
        f"{fields.get('host', 'an unknown host')}): stop it, or give this run a root of its own"
    )


def _counter_moves(store: Store, key: str, watch_s: float) -> bool:
    """Watch an owner's counter, by this process's monotonic clock only."""
    first = store.read_bytes(f"{key}/heartbeat")
    deadline = time.monotonic() + watch_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(min(POLL_S, watch_s))
        if store.read_bytes(f"{key}/heartbeat") != first:
            return True
    return False


def fence(store: Store, number: int) -> None:
    """Take everything away from an incarnation, whether it is dead or asleep.

    Renaming the directory alone let 60 late commits through: a rename in flight had already resolved its parent. Renaming
    each child too let none through (0 of 2,000).

    Raises:
        NotFoundError: it is already fenced.
    """
    fenced = f"{CONTROL_DIRECTORY}/fenced-{number:06d}"
    store.rename(f"{CONTROL_DIRECTORY}/inc-{number:06d}", fenced)
    for entry in store.entries(fenced):
        store.rename(f"{fenced}/{entry.name}", f"{fenced}/{entry.name}.fenced")
    store.sync_directory(fenced, SyncPoint.OWNERSHIP)
    store.sync_directory(CONTROL_DIRECTORY, SyncPoint.OWNERSHIP)


def _new_incarnation(store: Store, number: int) -> Lock | None:
    """Make `inc-<number>` with its lock held from its first moment, or return None where a rival was first."""
    fresh = f"{CONTROL_DIRECTORY}/new-{uuid.uuid4().hex}"
    store.make_directory(fresh)
    lock = store.lock(f"{fresh}/lock")
    if lock is None:
        return None  # a sweeper took it for a dead one; the loop tries again under another name
    fields = {"host": socket.gethostname(), "pid": str(os.getpid()), "kernel": _kernel_id()}
    try:
        store.write_document(f"{fresh}/owner.json", json.dumps(fields, indent=1).encode(), SyncPoint.OWNERSHIP)
        store.write_document(f"{fresh}/heartbeat", (0).to_bytes(8, "little"), SyncPoint.OWNERSHIP)
        store.sync_directory(fresh, SyncPoint.OWNERSHIP)
        store.rename(fresh, f"{CONTROL_DIRECTORY}/inc-{number:06d}")
    except (AlreadyExistsError, NotFoundError):
        lock.release()
        return None
    except BaseException:
        lock.release()
        raise
    store.sync_directory(CONTROL_DIRECTORY, SyncPoint.OWNERSHIP)
    return lock


def _start_heartbeat(store: Store, owner: RootOwner) -> None:
    """Renew the counter that contenders on other machines watch, in a thread that only sleeps and writes 8 bytes."""
    writer = store.open_writer(f"{owner.key}/heartbeat")
    stop = owner._stop  # noqa: SLF001 - the only maker

    def beat() -> None:
        count = 0
        while not stop.wait(HEARTBEAT_S):
            count += 1
            writer.write_at(count.to_bytes(8, "little"), 0)
        writer.close()

    threading.Thread(target=beat, name="shardpoint-root-heartbeat", daemon=True).start()
