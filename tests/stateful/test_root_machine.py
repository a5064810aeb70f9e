from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardpoint.catalog import verify
from shardpoint.commit import (
    Attempt,
    RootOwner,
    acquire_root,
    committed_checkpoints,
    owned_root,
    ownership,
    prune,
    publish,
)
from shardpoint.errors import CommitUnknownError, FencedError, NotFoundError, StorageError
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.crash import tiny

NAMES = ("a", "b", "c")


class _Death(BaseException):
    """The process is gone: nothing after this line runs in it."""


class _Renaming(LocalStore):
    """A root on a filesystem that can exchange two names, or cannot."""

    exchanges = True

    def exchange(self, first: str, second: str) -> bool:
        return super().exchange(first, second) if self.exchanges else False


class RootMachine(RuleBasedStateMachine):
    """Runs come, save, prune, fail, die and are fenced; the model is a dict of what was committed."""

    zombies = Bundle("zombies")

    @initialize(exchanges=st.booleans())
    def start(self, exchanges: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="shardpoint-machine-"))
        self.store = _Renaming(self.directory / "root")
        self.store.exchanges = exchanges
        self.model: dict[str, int] = {}
        self.order: list[str] = []
        self.fill = 0
        self.owner: RootOwner = acquire_root(self.store)

    def teardown(self) -> None:
        self.owner.release()
        shutil.rmtree(self.directory)

    def _die(self) -> None:
        """Do what the kernel does: free the lock. The objects of the dead run are never used again."""
        ownership._owners.clear()
        self.owner._stop.set()
        self.owner._lock.release()

    def _seen(self) -> dict[str, int]:
        found = {}
        for item in committed_checkpoints(self.store):
            assert verify(self.store, item).ok
            found[item.name] = tiny.fill_of(self.directory / "root" / item.key)
        return found

    def _committed(self, name: str, fill: int) -> None:
        self.model[name] = fill
        self.order = [other for other in self.order if other != name] + [name]

    @rule(name=st.sampled_from(NAMES))
    def save(self, name: str) -> None:
        self.fill += 1
        tiny.save(self.store, self.owner, name, self.fill)
        self._committed(name, self.fill)

    @rule(name=st.sampled_from(NAMES), nth=st.integers(1, 30), dies=st.booleans())
    def save_fails_or_dies(self, name: str, nth: int, dies: bool) -> None:
        self.fill += 1

        def die() -> None:
            raise _Death

        fault = Fault("*", nth=nth, action="call", then=die) if dies else Fault("*", nth=nth)
        faulty, attempt = FaultyStore(self.store, [fault]), None
        try:
            attempt = tiny.open_attempt(faulty, self.owner, name)
            tiny.write_tensors(attempt, self.fill)
            publish(attempt, tiny.documents(self.fill), tiny.manifest(attempt, self.fill))
        except CommitUnknownError:
            self._settle(name)
        except StorageError as error:
            if attempt is not None:
                attempt.abandon(error)
        except _Death:
            self._die()
            before = self._seen()
            assert before in (self.model, {**self.model, name: self.fill})
            self.owner = acquire_root(self.store)
            self._settle(name)
        else:
            self._committed(name, self.fill)

    def _settle(self, name: str) -> None:
        """Take over from the disk which of the two it was; anything else is what the invariant reports."""
        if self._seen().get(name) == self.fill:
            self._committed(name, self.fill)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        prune(self.store, self.owner, name)
        del self.model[name]
        self.order.remove(name)

    @rule(name=st.sampled_from(NAMES))
    def prune_what_is_absent(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(NotFoundError):
                prune(self.store, self.owner, name)

    @rule()
    def end_and_start_again(self) -> None:
        self.owner.release()
        assert owned_root(self.store) is None
        self.owner = acquire_root(self.store)

    @rule(target=zombies, name=st.sampled_from(NAMES))
    def fall_asleep_in_a_save(self, name: str) -> tuple[RootOwner, Attempt, int]:
        """Be taken over, by a run on a machine that our lock does not reach, between the votes and the commit."""
        self.fill += 1
        owner, attempt = self.owner, tiny.open_attempt(self.store, self.owner, name)
        tiny.write_tensors(attempt, self.fill)
        self._die()
        self.owner = acquire_root(self.store)
        return owner, attempt, self.fill

    @rule(zombie=zombies, name=st.sampled_from(NAMES))
    def wake_up(self, zombie: tuple[RootOwner, Attempt, int], name: str) -> None:
        owner, attempt, fill = zombie
        with pytest.raises(FencedError):
            publish(attempt, tiny.documents(fill), tiny.manifest(attempt, fill))
        with pytest.raises(FencedError):
            tiny.save(self.store, owner, name, fill)
        if name in self.model:
            with pytest.raises(FencedError):
                prune(self.store, owner, name)

    @invariant()
    def readers_see_the_model(self) -> None:
        if hasattr(self, "store"):
            assert self._seen() == self.model
            assert [item.name for item in committed_checkpoints(self.store)] == self.order

    @invariant()
    def nothing_else_is_in_the_root(self) -> None:
        if hasattr(self, "store"):
            names = {entry.name for entry in self.store.entries("")}
            assert names <= {".shardpoint", *self.model}
            assert [entry.name for entry in self.store.entries(".shardpoint")] == [self.owner.key.rpartition("/")[2]]


TestRootMachine = RootMachine.TestCase
TestRootMachine.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
