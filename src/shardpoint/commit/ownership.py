"""Who may change a root: the living incarnation, and how a new one takes over from a dead one.

Every visible mutation (commit, exchange, prune, sweep) has one end inside `.shardpoint/inc-<n>/`, by path. A new
incarnation fences its predecessor by renaming that directory away and then each child in it, so that a rename of the
predecessor that was already under way finds nothing. It may do so at once when the predecessor is dead: its lock is
free. On another machine the lock may not tell, so there the owner renews a counter, which a contender watches with
its own clock.

Source: docs/spec/FORMAT.md, "Ownership"; docs/adr/0003.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

from shardpoint.commit.recovery import FENCED, FENCED_SUFFIX, discard_fresh, recover, sweep
from shardpoint.commit.visible import CONTROL_DIRECTORY, committed_checkpoints
from shardpoint.errors import AlreadyExistsError, FencedError, NotFoundError, RootBusyError, StorageError
from shardpoint.events import Listener, log_event
from shardpoint.storage import Lock, Store, SyncPoint, kernel_id

HEARTBEAT_S = 10.0
WATCH_S = 60.0
POLL_S = 0.5

_INCARNATION = re.compile(r"inc-(\d{6})\Z")


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
    _heartbeat_error: Exception | None = None

    @property
    def key(self) -> str:
        """The incarnation's directory."""
        return f"{CONTROL_DIRECTORY}/inc-{self.incarnation:06d}"

    def take_sequence(self) -> int:
        """Return the next commit sequence number; taken when a save starts."""
        with _owners_mutex:
            sequence = self._next_sequence
            self._next_sequence += 1
            return sequence

    def fenced_error(self) -> FencedError:
        """Return the error that says the root was lost."""
        text = (
            f"another run took over {self.location}: incarnation {self.incarnation} is fenced and can commit nothing "
            "more. Stop this run, or give it a root of its own"
        )
        return FencedError(text)

    def check_alive(self, store: Store) -> None:
        """Raise `FencedError` when the incarnation's directory is no longer there."""
        if not store.exists(self.key):
            raise self.fenced_error()

    def check_heartbeat(self) -> None:
        """Raise `StorageError` when the counter could not be renewed the last time.

        Nothing is unsafe then, but the filesystem is in trouble, and a run on another machine may take this one for
        dead.
        """
        error = self._heartbeat_error
        if error is not None:
            text = (
                f"the counter that shows other machines that this run owns {self.location} could not be renewed "
                f"({error}): check the filesystem. The next renewal that succeeds clears this"
            )
            number = error.errno if isinstance(error, StorageError) else None
            raise StorageError(
                text, key=f"{self.key}/heartbeat", op="heartbeat", retryable=True, errno=number
            ) from error

    def release(self) -> None:
        """Give one hold up; the last one frees the lock, so that another run may take the root over at once."""
        with _owners_mutex:
            self._holders -= 1
            if self._holders > 0:
                return
            if _owners.get((os.getpid(), self.location)) is self:
                del _owners[os.getpid(), self.location]
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

    Makes the root where it is not there, fences a dead predecessor, finishes or undoes what it left half done, and
    sweeps its torn attempts. Call `release` once for each call. One root has one path here: a second spelling of it
    (through a symbolic link) counts as another run.

    Args:
        store: the root.
        listener: told of what was recovered and swept.
        watch_s: how long to watch the counter of an owner on another machine before it counts as dead, in seconds.

    Raises:
        RootBusyError: another living run owns the root, or this process owns it under another path.
        FencedError: this process owned it and lost it to another run; it may own it again once every hold is released.
        AlreadyExistsError: `.shardpoint` is there and is not a directory.
        StorageError: the root cannot be made, read, or recovered.

    Durability:
        On return the ownership is durable; nothing of a fenced incarnation can become visible any more.
    """
    with _owners_mutex:
        held = _owners.get((os.getpid(), store.location))
        if held is not None:
            # A run that slept through its fencing must not come back by itself: two timelines would mix.
            held.check_alive(store)
            held._holders += 1  # noqa: SLF001 - the registry of this module
            return held
        owner = _take_over(store, listener, watch_s)
        _owners[os.getpid(), store.location] = owner
        return owner


def _numbers(store: Store, pattern: re.Pattern[str]) -> list[int]:
    found = {int(match.group(1)) for entry in store.entries(CONTROL_DIRECTORY) if (match := pattern.match(entry.name))}
    return sorted(found)


def _take_over(store: Store, listener: Listener, watch_s: float) -> RootOwner:
    store.make_root()
    try:
        store.make_directory(CONTROL_DIRECTORY)
        store.sync_directory("", SyncPoint.ROOT)
    except AlreadyExistsError:
        if not any(entry.name == CONTROL_DIRECTORY and entry.is_directory for entry in store.entries("")):
            text = f"{CONTROL_DIRECTORY} in {store.location} is a file: Shardpoint keeps a directory of that name"
            raise AlreadyExistsError(text) from None
    while True:
        taken = _succeed(store, watch_s)
        if taken is not None:
            break
    number, lock = taken
    owner = RootOwner(store.location, number, lock, 0)
    try:
        # Order: the counter moves before the sweep, which may take longer than a contender watches.
        _start_heartbeat(store, owner)
        recover(store, owner.key, listener)
        sweep(store, owner.key, listener)
        found = [item.manifest.commit_sequence for item in committed_checkpoints(store) if item.manifest]
        owner._next_sequence = max(found, default=0) + 1  # noqa: SLF001 - the only maker
    except BaseException as error:
        owner._stop.set()  # noqa: SLF001 - the only maker
        lock.release()
        if isinstance(error, NotFoundError):
            owner.check_alive(store)
        raise
    return owner


def _succeed(store: Store, watch_s: float) -> tuple[int, Lock] | None:
    """Fence every dead incarnation and make a new one; None where a rival changed something meanwhile: look again."""
    dead: list[Lock] = []
    try:
        living = _numbers(store, _INCARNATION)
        for number in living:
            dead.append(_lock_dead(store, f"{CONTROL_DIRECTORY}/inc-{number:06d}", watch_s))  # noqa: PERF401 - each is held at once
        for number in living:
            fence(store, number)
        _finish_fences(store)
        # The numbers that are in use: nothing between here and the new incarnation may be taken from an older listing.
        fenced = _numbers(store, FENCED)
        if _numbers(store, _INCARNATION):
            return None
        number = max(fenced, default=0) + 1
        lock = _new_incarnation(store, number)
    except NotFoundError:
        return None  # fenced or swept by somebody else in this moment
    finally:
        for old in dead:
            old.release()
    if lock is None or _is_newest(store, number):
        return None if lock is None else (number, lock)
    # Race: while this process was between the listing and the rename, a rival came and went, or is there.
    try:
        with suppress(NotFoundError):
            key = f"{CONTROL_DIRECTORY}/new-{uuid.uuid4().hex}"
            store.rename(f"{CONTROL_DIRECTORY}/inc-{number:06d}", key)
            discard_fresh(store, key)
    finally:
        lock.release()
    return None


def _is_newest(store: Store, number: int) -> bool:
    # Race: a directory listing may miss what changes during it; a second one sees it.
    for _ in range(2):
        if _numbers(store, _INCARNATION) != [number] or any(other >= number for other in _numbers(store, FENCED)):
            return False
    return True


def _lock_dead(store: Store, key: str, watch_s: float) -> Lock:
    """Return the lock of a dead incarnation, or raise `RootBusyError` where it lives."""
    lock = store.lock(f"{key}/lock")
    if lock is None:
        raise RootBusyError(_busy_text(store, key))
    try:
        lives = _owner_fields(store, key).get("kernel") != kernel_id() and _counter_moves(store, key, watch_s)
    except BaseException:
        lock.release()
        raise
    if lives:
        lock.release()
        raise RootBusyError(_busy_text(store, key))
    return lock


def _read_inside(store: Store, key: str, name: str) -> bytes:
    """Return a file of an incarnation; empty where only the file is gone (nobody alive took it away)."""
    try:
        return store.read_bytes(f"{key}/{name}")
    except NotFoundError:
        if not store.exists(key):
            raise
        return b""


def _owner_fields(store: Store, key: str) -> dict[str, str]:
    """Return who made an incarnation, for messages and to compare kernels; unreadable counts as another kernel."""
    try:
        fields = json.loads(_read_inside(store, key, "owner.json"))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _busy_text(store: Store, key: str) -> str:
    try:
        fields = _owner_fields(store, key)
    except NotFoundError:
        fields = {}
    if fields.get("pid") == str(os.getpid()) and fields.get("kernel") == kernel_id():
        return f"this process itself owns {store.location}, under another path: use one spelling of it"
    return (
        f"another living run owns {store.location} (process {fields.get('pid', 'unknown')} on "
        f"{fields.get('host', 'an unknown host')}, or one that is taking over from it): stop it, or give this run "
        "a root of its own"
    )


def _counter_moves(store: Store, key: str, watch_s: float) -> bool:
    """Watch an owner's counter, by this process's monotonic clock only."""
    first = _read_inside(store, key, "heartbeat")
    deadline = time.monotonic() + watch_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(min(POLL_S, watch_s))
        if _read_inside(store, key, "heartbeat") != first:
            return True
    return False


def fence(store: Store, number: int) -> None:
    """Take everything away from an incarnation, whether it is dead or asleep.

    Renaming the directory alone let 60 late commits through: a rename in flight had already resolved its parent.
    Renaming each child too let none through (0 of 2,000).

    Raises:
        NotFoundError: it is already fenced.
    """
    living, fenced = f"{CONTROL_DIRECTORY}/inc-{number:06d}", f"{CONTROL_DIRECTORY}/fenced-{number:06d}"
    try:
        store.rename(living, fenced)
    except AlreadyExistsError:
        # A contender was late, made a number that had come and gone, and died before it noticed.
        fenced = f"{fenced}-{uuid.uuid4().hex}"
        store.rename(living, fenced)
    _fence_children(store, fenced)


def _fence_children(store: Store, fenced: str) -> None:
    for entry in store.entries(fenced):
        if not entry.name.endswith(FENCED_SUFFIX):
            # Race: what the fenced run is just committing may be gone: its rename came first.
            with suppress(NotFoundError):
                store.rename(f"{fenced}/{entry.name}", f"{fenced}/{entry.name}{FENCED_SUFFIX}")
    store.sync_directory(fenced, SyncPoint.OWNERSHIP)
    store.sync_directory(CONTROL_DIRECTORY, SyncPoint.OWNERSHIP)


def _finish_fences(store: Store) -> None:
    """Do what a contender left undone that died in the middle of a fence."""
    for entry in store.entries(CONTROL_DIRECTORY):
        if FENCED.match(entry.name):
            with suppress(NotFoundError):
                _fence_children(store, f"{CONTROL_DIRECTORY}/{entry.name}")


def _new_incarnation(store: Store, number: int) -> Lock | None:
    """Make `inc-<number>` with its lock held from its first moment, or return None where a rival was first."""
    fresh = f"{CONTROL_DIRECTORY}/new-{uuid.uuid4().hex}"
    store.make_directory(fresh)
    lock: Lock | None = None
    try:
        lock = store.lock(f"{fresh}/lock")
        if lock is None:
            return None  # a sweeper took it for a dead one; the loop tries again under another name
        fields = {"host": socket.gethostname(), "pid": str(os.getpid()), "kernel": kernel_id()}
        store.write_document(f"{fresh}/owner.json", json.dumps(fields, indent=1).encode(), SyncPoint.OWNERSHIP)
        store.write_document(f"{fresh}/heartbeat", (0).to_bytes(8, "little"), SyncPoint.OWNERSHIP)
        store.sync_directory(fresh, SyncPoint.OWNERSHIP)
        store.rename(fresh, f"{CONTROL_DIRECTORY}/inc-{number:06d}")
        store.sync_directory(CONTROL_DIRECTORY, SyncPoint.OWNERSHIP)
    except (AlreadyExistsError, NotFoundError):
        discard_fresh(store, fresh)
        if lock is not None:
            lock.release()
        return None
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _start_heartbeat(store: Store, owner: RootOwner) -> None:
    """Renew the counter that contenders on other machines watch, in a thread that only sleeps and writes 8 bytes.

    The file is opened by its path for each beat: closing it is what makes NFS show the number to others, and a fenced
    run's path is gone. An error is kept for the next save to raise, and forgotten when a later beat succeeds.
    """
    stop, key, seconds = owner._stop, f"{owner.key}/heartbeat", HEARTBEAT_S  # noqa: SLF001 - the only maker

    def beat() -> None:
        count = 0
        while not stop.wait(seconds):
            count += 1
            try:
                writer = store.open_writer(key)
                try:
                    writer.write_at(count.to_bytes(8, "little"), 0)
                finally:
                    writer.close()
            except NotFoundError:
                return  # fenced: the next save finds the incarnation gone
            except Exception as error:  # noqa: BLE001 - whatever it is, the next save raises it
                owner._heartbeat_error = error  # noqa: SLF001 - as above
            else:
                owner._heartbeat_error = None  # noqa: SLF001 - as above

    threading.Thread(target=beat, name="shardpoint-root-heartbeat", daemon=True).start()
