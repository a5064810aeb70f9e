"""How a training loop writes its journal: what it says of a step, and what can be seen of the run beside that."""

from __future__ import annotations

import platform
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardpoint import __version__
from shardpoint.adapters.names import name_tensors
from shardpoint.adapters.optimizer import is_incomplete
from shardpoint.adapters.rng import rng_digest
from shardpoint.adapters.state import TrainState
from shardpoint.comm import Comm
from shardpoint.commit import RootOwner
from shardpoint.errors import CheckpointError, UsageError
from shardpoint.journal import (
    JOURNAL_VERSION,
    JournalWriter,
    Life,
    OptimizerMark,
    Origin,
    PassedOver,
    Step,
    number,
    samples_of,
)
from shardpoint.manifest import Manifest
from shardpoint.storage import Store


class RunJournal:
    """The journal of a run: evidence of each step, beside the checkpoints; `Checkpointer.journal` is one.

    `shardpoint audit ROOT` compares what it says of steps that the run did more than once. A resume never reads it.

    Args:
        comm: the ranks.
        owned: returns the root and this process's hold on it; called on the coordinator only.
    """

    def __init__(self, comm: Comm, owned: Callable[[], tuple[Store, RootOwner]]) -> None:
        self._comm = comm
        self._owned = owned
        self._writer: JournalWriter | None = None
        self._life: Life | None = None
        self._last: tuple[int, int] | None = None
        self._optimizers: dict[str, weakref.ref[Optimizer]] = {}
        self._layout = ""
        self._num_samples: int | None = None
        self._origin: Origin | None = None
        self._passed_over: list[PassedOver] = []

    def record(
        self,
        *,
        epoch: int,
        step: int,
        loss: Any,
        grad_norm: Any = None,
        samples: Iterable[Any] | None = None,
    ) -> None:
        """Append one step, after the optimizer's step and before the save.

        The learning rates, the optimizer's own count of steps and a checksum of the random state are added: those of
        the state that was last given to `resume` or `save`.

        Args:
            epoch: the epoch, as given to `save`.
            step: steps done, this one included, as given to `save`.
            loss: the loss of the step over all ranks; a number, or a tensor of one element.
            grad_norm: the norm of its gradient, likewise.
            samples: the indices of the samples that the step consumed, over all ranks, in order.

        Raises:
            UsageError: an argument is wrong, or the step was recorded already since the last resume.
            FencedError: another run took the root over.
            StorageError: the system refused to write.

        Collective:
            None: any rank may call it, and only the coordinator writes; the others' arguments are not looked at beyond
            `epoch` and `step`.

        Durability:
            On return the line survives the death of the process. There is no fsync for each step: a power loss may take
            the last lines. `Checkpointer.close` makes all of them durable.
        """
        position: tuple[tuple[str, object], ...] = (("epoch", epoch), ("step", step))
        for name, value in position:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} must be an integer that is not negative, got {value!r}")
        if self._last is not None and (epoch, step) <= self._last:
            text = (
                f"epoch {epoch} step {step} comes after epoch {self._last[0]} step {self._last[1]} in this journal: "
                "record each step once, in order"
            )
            raise UsageError(text)
        self._last = epoch, step
        if not self._comm.is_coordinator:
            return
        store, owner = self._owned()
        owner.check_alive(store)
        life = self._begun(store, owner)
        entry = Step(
            life=life.life,
            epoch=epoch,
            step=step,
            loss=number(loss, "loss"),
            grad_norm=None if grad_norm is None else number(grad_norm, "grad_norm"),
            optimizers=self._marks(),
            samples=None if samples is None else samples_of(samples),
            rng=rng_digest(),
        )
        assert self._writer is not None  # noqa: S101 - `_begun` opened it
        self._writer.write(entry)

    def begin(
        self,
        roles: Mapping[str, TrainState],
        manifest: Manifest | None = None,
        passed_over: Mapping[str, CheckpointError] | None = None,
    ) -> None:
        """Begin another life; it is written with its first step.

        Args:
            roles: role -> state.
            manifest: what was resumed from, or None for a fresh start.
            passed_over: name -> why a candidate was not taken.
        """
        self._life, self._last, self._origin, self._layout = None, None, None, ""
        if manifest is not None:
            assert manifest.epoch is not None  # noqa: S101 - a training checkpoint has a position
            assert manifest.step is not None  # noqa: S101 - as above
            self._origin = Origin(manifest.name, manifest.checkpoint_id, manifest.epoch, manifest.step)
        self._passed_over = [PassedOver(name, str(error)) for name, error in (passed_over or {}).items()]
        self.look_at(roles)

    def look_at(self, roles: Mapping[str, TrainState]) -> None:
        """Remember whose learning rates to tell, without keeping anything alive; a second look costs nothing."""
        if not self._comm.is_coordinator:
            return
        self._optimizers = {
            role: weakref.ref(state.optimizer) for role, state in roles.items() if state.optimizer is not None
        }
        if not self._layout:
            self._layout = ", ".join(sorted({kind for state in roles.values() for kind in _layouts(state)}))
            totals = [getattr(state.sampler, "num_samples", None) for state in roles.values()]
            known = [total for total in totals if isinstance(total, int)]
            self._num_samples = known[0] if len(known) == 1 else None

    def close(self) -> None:
        """Make what was written durable; a second call does nothing.

        Raises:
            StorageError: an fsync failed.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _begun(self, store: Store, owner: RootOwner) -> Life:
        """Return this life, its first line written."""
        if self._writer is None:
            self._writer = JournalWriter(store)
        if self._life is None:
            life = Life(
                version=JOURNAL_VERSION,
                life=f"{owner.incarnation:06d}-{uuid.uuid4().hex[:8]}",
                incarnation=owner.incarnation,
                library=f"shardpoint {__version__}",
                started_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                host=platform.node(),
                world_size=self._comm.world_size,
                layout=self._layout,
                versions=_versions(),
                num_samples=self._num_samples,
                resumed_from=self._origin,
                passed_over=self._passed_over,
            )
            self._writer.write(life)
            self._life = life
        return self._life

    def _marks(self) -> dict[str, OptimizerMark]:
        optimizers = {role: reference() for role, reference in self._optimizers.items()}
        return {role: _mark(optimizer) for role, optimizer in optimizers.items() if optimizer is not None}


def _mark(optimizer: Optimizer) -> OptimizerMark:
    rates = [number(group.get("lr", 0.0), "the learning rate") for group in optimizer.param_groups]
    return OptimizerMark(rates, None if is_incomplete(optimizer) else _counted_steps(optimizer))


def _counted_steps(optimizer: Optimizer) -> float | None:
    """Return the steps that an optimizer has counted for the first parameter that has a state, if that is free.

    On a device it would mean to wait for it.
    """
    for state in optimizer.state.values():
        steps = state.get("step") if isinstance(state, dict) else None
        if isinstance(steps, torch.Tensor):
            return float(steps) if steps.device.type == "cpu" and not isinstance(steps, DTensor) else None
        if isinstance(steps, int | float):
            return float(steps)
    return None


def _layouts(state: TrainState) -> Iterable[str]:
    """Yield how a model's trained parameters lie on the ranks: in which order sums are taken follows from it."""
    for named in name_tensors(state.model).tensors:
        tensor = named.tensor
        if not tensor.requires_grad:
            continue
        if isinstance(tensor, DTensor):
            placements = ", ".join(str(placement) for placement in tensor.placements)
            yield f"{placements} over {'x'.join(map(str, tensor.device_mesh.shape))} {tensor.device.type}"
        elif named.mesh is not None:
            yield f"replicated, {tensor.device.type}"
        else:
            yield f"whole, {tensor.device.type}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name()
    return found
