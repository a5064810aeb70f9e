"""How an optimizer's state comes in behind: weights first, then its tensors on a thread, whole before the first step.

Order: nobody sees a part of the state. It is read into new tensors, verified by all ranks in a round of a comm of its
own, and assigned by whoever waits for it: an optimizer step, a save, or the user.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from shardpoint.adapters.optimizer import is_incomplete, mark_incomplete
from shardpoint.comm import Comm
from shardpoint.engine.load import Fitting, Target, fill_target, fit_target, install, result_of
from shardpoint.engine.results import LoadResult
from shardpoint.engine.source import Source
from shardpoint.engine.structure import StructureCache
from shardpoint.errors import CheckpointError, DistributedError, revive, to_fields
from shardpoint.storage import BufferPool

# The trainer has the interpreter's lock most of the time: a thread gets it about every 5 ms, so its calls are large.
PIECE_BYTES = 16 * 2**20


class Arrival:
    """The optimizers' states of one load, coming in; made and waited for on any thread.

    Args:
        comm: of this load's own; closed when everything is there or has failed.
        fitting: the checkpoint and the target, of which everything else is in place.

    Collective:
        All ranks construct it. Its thread takes part in one round.
    """

    def __init__(self, comm: Comm, fitting: Fitting) -> None:
        self._comm = comm
        self._fitting: Fitting | None = fitting
        self._optimizers = [weakref.ref(target.optimizer) for target in fitting.target.collected.optimizers]
        self._result: LoadResult | None = None
        self._error: BaseException | None = None
        self._told = False
        self._given_up = threading.Event()
        self._finished = threading.Event()
        self._mutex = threading.Lock()
        for target in fitting.target.collected.optimizers:
            mark_incomplete(target.optimizer, coming=True)
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        # Not a daemon: a thread in a native call when the interpreter ends would abort the process.
        self._thread = threading.Thread(target=self._work, args=(fitting,), name="shardpoint-optimizer")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> LoadResult | None:
        """Wait for the states and put them in place, once.

        Args:
            timeout_s: how long, in seconds; None waits as long as it takes.

        Returns:
            The evidence, or None when time ran out.

        Raises:
            CheckpointError: what failed, the same on every rank and at every call.
        """
        if not self._finished.wait(timeout_s):
            return None
        with self._mutex:
            if self._error is not None:
                self._told = True
                raise _again(self._error)
            if self._fitting is not None:
                self._fitting.target.install_behind()
                self._fitting = None
        return self._result

    def give_up(self) -> None:
        """Stop reading; the other ranks hear of it."""
        self._given_up.set()

    def end(self) -> BaseException | None:
        """Wait until the thread has ended, and the other ranks have heard of it; return an error that nobody was told.

        A state that is whole is in place afterwards. The hook stays where it failed: such an optimizer never steps.
        """
        self._thread.join()
        if self._error is None:
            self.wait()
            self._hook.remove()
            return None
        return None if self._told else _again(self._error)

    def forget(self) -> None:
        """Take the hook away: another load replaces what this one was to bring."""
        self._hook.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Order: the hook is not taken away here, since torch walks through its table of hooks at this moment.
        del args, kwargs
        if is_incomplete(optimizer) and any(known() is optimizer for known in self._optimizers):
            self.wait()

    def _work(self, fitting: Fitting) -> None:
        began = time.monotonic()
        try:
            filled = fill_target(
                self._comm,
                fitting,
                fitting.target.behind,
                topic="load: optimizer behind",
                piece_bytes=PIECE_BYTES,
                before_each=self._go_on,
            )
            self._result = result_of(fitting, filled, time.monotonic() - began)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            self._fail(error, fitting)
            del fitting
        finally:
            self._finished.set()
            self._comm.close()

    def _fail(self, error: BaseException, fitting: Fitting) -> None:
        text = (
            f"the weights of {fitting.source.manifest.name} are restored, its optimizer state is not: resume again "
            "without `lazy_optimizer`, which falls back to an earlier checkpoint"
        )
        error.add_note(text)
        for target in fitting.target.collected.optimizers:
            mark_incomplete(target.optimizer, coming=False)
        # The hook keeps the error: without its frames, which would keep the tensors that were to be filled.
        self._error, self._fitting = _again(error).with_traceback(None), None

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise DistributedError("the restoring of the optimizer's state was given up")


def _again(error: BaseException) -> BaseException:
    """Return a new error that says the same, so that no frame that one of them came through stays with the other."""
    if not isinstance(error, CheckpointError):
        return error
    again = revive(to_fields(error))
    for note in error.__notes__:
        again.add_note(note)
    return again


def load_weights_first(
    comm: Comm,
    own_comm: Callable[[], Comm],
    open_source: Callable[[], Source],
    prepare: Callable[[Source], Target],
    cache: StructureCache,
    pool: BufferPool | None = None,
) -> tuple[LoadResult, Arrival]:
    """Load everything but what a target allows to come in behind, and start to bring that.

    Args:
        comm: the ranks.
        own_comm: opens a second comm of the same ranks, for the thread.
        open_source: opens the checkpoint, on every rank; all must find the same one.
        prepare: makes the target for a checkpoint; must not change anything.
        cache: this process's, kept between loads.
        pool: lends memory for reads past the page cache, until this returns.

    Returns:
        The evidence of what is in place, and what is still coming.

    Raises:
        CheckpointError: as `load`; then nothing is coming.

    Collective:
        All ranks: five rounds, and one in the background.
    """
    began = time.monotonic()
    fitting = fit_target(comm, open_source, prepare, cache)
    filled = fill_target(comm, fitting, fitting.target.parts - fitting.target.behind, pool=pool)
    install(comm, fitting.target.install)
    result = result_of(fitting, filled, time.monotonic() - began)
    return result, Arrival(own_comm(), fitting)
