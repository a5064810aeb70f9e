"""What a save that runs behind the training takes before it returns, and how it notices that weights changed too early.

Between steps of an optimizer nothing changes parameters and optimizer states, so their bytes are staged while the next
forward and backward run, and a step waits only for what is not staged yet (copy before write). What a forward may
change (buffers), what is small, and what is not contiguous is copied at once.

A torn snapshot, weights of one step with states of another, must never be committed. Tensors' version counters do not
tell (fused and foreach steps do not move them), so every tensor that is staged later is sampled: 4 KiB spread over it,
once before the save returns and once more when its role is staged. A step counter that moved tells too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from shardpoint.adapters.collect import SMALL_BYTES, Collected, Held
from shardpoint.adapters.state import TrainState
from shardpoint.adapters.tensors import flat_bytes
from shardpoint.errors import TornSnapshotError

NUM_SAMPLES = 16
SAMPLE_BYTES = 256
_MAX_PROBES = 8

Name = tuple[str, str]


class Arena:
    """Host memory for what is copied at once; used again by later saves, since fresh memory is slow to fill."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def rooms(self, sizes: Iterable[int]) -> list[torch.Tensor]:
        """Return uint8 tensors of these sizes, side by side, each aligned to 64 bytes."""
        sizes = list(sizes)
        starts: list[int] = []
        total = 0
        for size in sizes:
            starts.append(total)
            total += -(-size // 64) * 64
        if self._memory.numel() < total:
            self._memory = torch.empty(total, dtype=torch.uint8)
        return [self._memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]


@dataclass
class _Samples:
    """A few bytes of each tensor of one role that are staged later, on one device."""

    names: list[Name]
    views: list[torch.Tensor]
    before: torch.Tensor
    after: torch.Tensor

    def changed(self) -> list[Name]:
        """Return the tensors whose sampled bytes are not what they were."""
        torch._foreach_copy_(list(self.after.unbind()), self.views)
        if torch.equal(self.before, self.after):
            return []
        differ = (self.before != self.after).flatten(1).any(1).tolist()
        return [name for name, is_changed in zip(self.names, differ, strict=True) if is_changed]


@dataclass
class Snapshot:
    """What was taken before the save returned, and what is to be compared before a step may run.

    Attributes:
        held: (part, key) -> what is to be staged: copies, and live tensors.
        stepped: role -> ids of the tensors that a step of its optimizer changes.
        samples: role -> a few bytes of what is staged later.
        probes: role -> step counters on the host, with their values.
        versions: of what is staged later, as torch counts changes in place; not all of them move it.
    """

    held: dict[Name, Held]
    stepped: Mapping[str, Mapping[int, str]]
    samples: dict[str, list[_Samples]] = field(default_factory=dict)
    probes: dict[str, list[tuple[torch.Tensor, float]]] = field(default_factory=dict)
    versions: dict[Name, int] = field(default_factory=dict)

    def thaws(self, names: Collection[Name]) -> bool:
        """Tell whether one of some tensors, which are read late since no step changed them, is trained by now."""
        late = (self.held[name].tensor for name in names if name in self.held)
        # An optimizer steps whatever has a gradient, be it left from when it was trained.
        return any(tensor.requires_grad or tensor.grad is not None for tensor in late)

    def roles_of(self, optimizer: Optimizer) -> list[str]:
        """Return the roles that a step of this optimizer changes."""
        return [
            role
            for role, ids in self.stepped.items()
            if any(id(parameter) in ids for group in optimizer.param_groups for parameter in group["params"])
        ]

    def check(self, role: str) -> None:
        """Compare a role's tensors with what they were when the save was asked for; they are all staged now.

        Raises:
            TornSnapshotError: something changed meanwhile.
        """
        moved = any(float(step.item()) != value for step, value in self.probes.get(role, ()))
        with torch.no_grad():
            changed = [name for samples in self.samples.get(role, ()) for name in samples.changed()]
        if not moved and not changed:
            return
        what = "the optimizer's step counter moved on" if moved else f"{len(changed)} tensors changed"
        first = f" (first {changed[0][0]}: {changed[0][1]})" if changed else ""
        text = (
            f"{what} before {role or 'the model'} was staged{first}: the snapshot is torn, nothing was committed. "
            "Steps of a torch.optim.Optimizer wait by themselves; before anything else changes weights (an average of "
            "weights, merging an adapter, syncing a model), call `pending.staged()`"
        )
        raise TornSnapshotError(text)

    def check_late(self, names: Collection[Name]) -> None:
        """Compare what is not trained with what it was when the save was asked for; it has all been read now.

        Args:
            names: what was read late; of them, what was copied at once cannot have changed.

        Raises:
            TornSnapshotError: something changed meanwhile.
        """
        if not names:
            return
        every = [samples for of_role in self.samples.values() for samples in of_role]
        with torch.no_grad():
            changed = [name for samples in every for name in samples.changed() if name in names]
            changed += [
                name
                for name, version in self.versions.items()
                if name in names and _version(self.held[name].local) != version
            ]
        if changed:
            text = (
                f"{len(changed)} weights that are not trained changed before they were saved (first {changed[0][0]}: "
                f"{changed[0][1]}): the snapshot is torn, nothing was committed. Before an adapter is merged, or base "
                "weights are changed in another way, call `pending.staged()`"
            )
            raise TornSnapshotError(text)


def role_of(part: str, roles: Iterable[str]) -> str:
    """Return the role that a part of a checkpoint belongs to."""
    first = part.partition("/")[0]
    return first if first in roles else ""


def take_snapshot(collected: Collected, roles: Mapping[str, TrainState], arena: Arena) -> Snapshot:
    """Copy what must not wait, and sample what may.

    Args:
        collected: this rank's tensors.
        roles: role -> state.
        arena: where the copies go; nothing of an earlier snapshot may still be in it.

    Memory:
        The buffers, tensors up to 64 KiB, and 8 KiB for each other tensor.
    """
    snapshot = Snapshot(dict(collected.held), collected.stepped)
    with torch.no_grad():
        later = _copy_now(snapshot, collected, arena)
        for role, samples in _samples(later, roles):
            snapshot.samples.setdefault(role, []).append(samples)
        snapshot.versions = {name: _version(local) for name, local in later}
    for role, state in roles.items():
        snapshot.probes[role] = list(_probes(state.optimizer))
    return snapshot


def _version(local: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; 0 where torch does not count."""
    return 0 if local.is_inference() else int(local._version)  # noqa: SLF001 - torch documents it, in autograd's notes


def _can_be_sampled(local: torch.Tensor) -> bool:
    return local.numel() * local.element_size() > SMALL_BYTES and _is_plain(local)


def _is_plain(local: torch.Tensor) -> bool:
    return local.is_contiguous() and not local.is_conj() and not local.is_neg()


def _bytes_of(local: torch.Tensor) -> torch.Tensor:
    return flat_bytes(local if _is_plain(local) else local.resolve_conj().resolve_neg().contiguous())


def _copy_now(snapshot: Snapshot, collected: Collected, arena: Arena) -> list[tuple[Name, torch.Tensor]]:
    """Copy what must not wait; return the others with their local tensors."""
    now: list[tuple[Name, Held, torch.Tensor]] = []
    later: list[tuple[Name, torch.Tensor]] = []
    for name, held in collected.held.items():
        if name[0] in collected.frozen:  # read from the live tensors when its turn comes
            continue
        local = held.local
        if held.is_stable and _can_be_sampled(local):
            later.append((name, local))
            continue
        now.append((name, held, _bytes_of(local)))
    rooms = arena.rooms(source.numel() for _, _, source in now)
    if rooms:
        torch._foreach_copy_(rooms, [source for _, _, source in now])
    for (name, held, _), room in zip(now, rooms, strict=True):
        snapshot.held[name] = Held(room, held.region, held.is_stable, room)
    return later


def _samples(later: list[tuple[Name, torch.Tensor]], roles: Mapping[str, TrainState]) -> Iterator[tuple[str, _Samples]]:
    """Yield roles with a few bytes of their tensors, which are plain and larger than 64 KiB."""
    by_place: dict[tuple[str, torch.device], list[tuple[Name, torch.Tensor]]] = {}
    for name, local in later:
        by_place.setdefault((role_of(name[0], roles), local.device), []).append((name, local))
    for (role, device), members in by_place.items():
        views = [_spread(flat_bytes(local)) for _, local in members]
        before = torch.empty((len(views), NUM_SAMPLES, SAMPLE_BYTES), dtype=torch.uint8, device=device)
        torch._foreach_copy_(list(before.unbind()), views)
        yield role, _Samples([name for name, _ in members], views, before, torch.empty_like(before))


def _spread(flat: torch.Tensor) -> torch.Tensor:
    """Return 16 times 256 bytes spread over a tensor of more than 64 KiB, sharing its memory."""
    step = (flat.numel() - SAMPLE_BYTES) // (NUM_SAMPLES - 1)
    return flat.as_strided((NUM_SAMPLES, SAMPLE_BYTES), (step, 1))


def _probes(optimizer: Any) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield step counters on the host, with their values now."""
    found = 0
    for state in getattr(optimizer, "state", {}).values():
        step = state.get("step") if isinstance(state, dict) else None
        if type(step) is torch.Tensor and step.device.type == "cpu" and step.numel() == 1:
            yield step, float(step.item())
            found += 1
            if found == _MAX_PROBES:
                return


def hook_steps(before: Callable[[Optimizer], None]) -> RemovableHandle:
    """Have a function called before every step of every `torch.optim.Optimizer`; return what `remove` ends it with."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        before(optimizer)

    return register_optimizer_step_pre_hook(hook)
