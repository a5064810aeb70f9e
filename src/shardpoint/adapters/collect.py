"""What a training state consists of, as facts, bytes and documents: the edge between live torch objects and the engine.

The same walk serves both ways: a save reads the tensors that it names, a load fills them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer

from shardpoint.adapters import hugging_face, lora
from shardpoint.adapters.documents import EXTRA_STATE_NAME, join, rank_document, sampler_document, scheduler_document
from shardpoint.adapters.grad_scaler import GRAD_SCALER_NAME, scaler_document, scaler_of
from shardpoint.adapters.names import NamedModule, name_tensors
from shardpoint.adapters.optimizer import OptimizerTarget, StateTensor, read_optimizer, target_optimizer
from shardpoint.adapters.state import TrainState
from shardpoint.adapters.tensors import LocalBytes, describe, dtype_name, local_tensor, plain_values
from shardpoint.errors import UsageError
from shardpoint.geometry import Region
from shardpoint.layout import Mesh
from shardpoint.manifest import Manifest, encode_document
from shardpoint.planning import PartNaming, Table, TensorFact

GROUPS_NAME = "param_groups.json"
SMALL_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor that this rank holds (a part of).

    Attributes:
        tensor: the live tensor.
        region: the part.
        is_stable: whether nothing but an optimizer's step changes it (parameters, optimizer states).
        part: the tensor's local part, where it is known already.
        read: for what is not in memory, reads the part anew; `tensor` is a stand-in then.
    """

    tensor: torch.Tensor
    region: Region
    is_stable: bool = True
    part: torch.Tensor | None = None
    read: Callable[[], torch.Tensor] | None = None

    @property
    def local(self) -> torch.Tensor:
        """This rank's part, sharing the tensor's memory."""
        if self.read is not None:
            return self.read()
        return self.part if self.part is not None else local_tensor(self.tensor)

    def open(self) -> LocalBytes:
        """Return its bytes."""
        with torch.no_grad():
            return LocalBytes(self.local)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a tensor was found to be, and by what it is told that it still is."""

    reference: weakref.ref[torch.Tensor]
    address: int
    replicated_over: Mesh | None
    mesh: Mesh | None
    region: Region | None
    fact: TensorFact
    device_mesh: Any
    placements: Any

    def still_holds(self, tensor: torch.Tensor, local: torch.Tensor, replicated_over: Mesh | None) -> bool:
        """Whether the same tensor lies at the same place, in the same shape, dtype and layout."""
        return (
            self.reference() is tensor
            and local.data_ptr() == self.address
            and local.is_contiguous()
            and tensor.shape == self.fact.shape
            and dtype_name(local.dtype, "") == self.fact.dtype
            and self.replicated_over is replicated_over
            and getattr(tensor, "device_mesh", None) is self.device_mesh
            and getattr(tensor, "placements", None) is self.placements
        )


Known = dict[tuple[str, str], _Known]
"""What earlier collections found, by (part, key): a tensor that did not change is not looked at again."""


@dataclass
class Collected:
    """Everything of one rank.

    Attributes:
        rank: this rank.
        held: (part, key) -> the live tensor, in table order.
        naming: part -> how its files are called.
        optimizer_documents: part -> the document to be merged with the other ranks'.
        documents: path -> contents; must be equal on all ranks that have it.
        rank_documents: path -> contents, written by this rank.
        coordinator_documents: path -> contents, made on the coordinator only.
        optimizers: for a load, what is to be installed.
        problems: for a load, what does not fit on this rank.
        missing: for a load, what this rank has beside its tensors and the checkpoint lacks.
        unexpected: for a load, what the checkpoint has beside tensors and this rank lacks.
        missing_of: for a load, (FQN, line) of what the checkpoint lacks for one parameter or module.
        unexpected_of: for a load, (FQN, line) of what it has for one that this rank lacks.
        checks: for a load, tell how what was put in place differs from the checkpoint, one line each.
        known: what earlier collections found; added to.
        stepped: for a save, role -> the ids of its model's tensors: an optimizer that steps one changes the role.
        frozen: for a save, the parts that their owner called frozen.
        under_adapters: for a save, the parts that lie under adapters.
    """

    rank: int
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    naming: dict[str, PartNaming] = field(default_factory=dict)
    optimizer_documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    rank_documents: dict[str, bytes] = field(default_factory=dict)
    coordinator_documents: dict[str, bytes] = field(default_factory=dict)
    optimizers: list[OptimizerTarget] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing_of: list[tuple[str, str]] = field(default_factory=list)
    unexpected_of: list[tuple[str, str]] = field(default_factory=list)
    checks: list[Callable[[], Iterable[str]]] = field(default_factory=list)
    known: Known = field(default_factory=dict)
    stepped: dict[str, Mapping[int, str]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    under_adapters: set[str] = field(default_factory=set)
    _facts: list[TensorFact] = field(default_factory=list)
    _names: set[tuple[str, str]] = field(default_factory=set)
    _tied: dict[tuple[str, str], str] = field(default_factory=dict)
    _meshes: dict[Mesh, int] = field(default_factory=dict)
    _members: list[tuple[str, str]] = field(default_factory=list)

    @property
    def table(self) -> Table:
        """This rank's facts."""
        return Table(tuple(self._meshes), tuple(self._facts), tuple(self._members))

    def _add(
        self,
        part: str,
        fqn: str,
        state: str | None,
        key: str,
        tensor: torch.Tensor,
        mesh: Mesh | None,
        *,
        is_stable: bool = True,
        is_still: bool = False,
    ) -> None:
        name = self._new_name(part, fqn, state, key)
        known, local = self.known.get(name), local_tensor(tensor)
        if known is None or not known.still_holds(tensor, local, mesh):
            known = self._look(part, fqn, state, key, tensor, mesh)
        index = None if known.mesh is None else self._meshes.setdefault(known.mesh, len(self._meshes))
        fact = known.fact
        if (fact.fqn, fact.state, fact.mesh, fact.is_still) != (fqn, state, index, is_still):
            fact = replace(fact, fqn=fqn, state=state, mesh=index, is_still=is_still)
        self._facts.append(fact)
        if known.region is not None:
            self.held[name] = Held(tensor, known.region, is_stable, local)

    def add_unread(
        self,
        part: str,
        fqn: str,
        state: str | None,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[], torch.Tensor],
    ) -> None:
        """Add a whole tensor that this rank alone has, and reads only when its bytes are written."""
        key = fqn if state is None else f"{fqn}.{state}"
        name = self._new_name(part, fqn, state, key)
        dtype_of = dtype_name(dtype, _place(part, fqn, state))
        self._facts.append(TensorFact(part, fqn, state, key, dtype_of, shape, None, ()))
        self.held[name] = Held(torch.empty(0), Region.whole(shape), read=read)

    def _new_name(self, part: str, fqn: str, state: str | None, key: str) -> tuple[str, str]:
        if (part, key) in self._names:
            text = f"{_place(part, fqn, state)}: another tensor of this rank is called {key!r} in {part} too"
            raise UsageError(text)
        self._names.add((part, key))
        return part, key

    def _look(
        self, part: str, fqn: str, state: str | None, key: str, tensor: torch.Tensor, replicated_over: Mesh | None
    ) -> _Known:
        """Look at a tensor, and remember what it is."""
        layout = describe(tensor, replicated_over, _place(part, fqn, state), self.rank)
        index = None if layout.mesh is None else self._meshes.setdefault(layout.mesh, len(self._meshes))
        fact = TensorFact(part, fqn, state, key, layout.dtype, layout.shape, index, layout.placements)
        known = self.known[part, key] = _Known(
            weakref.ref(tensor),
            layout.local.data_ptr(),
            replicated_over,
            layout.mesh,
            layout.region,
            fact,
            getattr(tensor, "device_mesh", None),
            getattr(tensor, "placements", None),
        )
        return known

    def add_model(
        self, named: NamedModule, part: str, adapters: str, stem: str = "model", *, has_optimizer: bool = False
    ) -> None:
        """Add a model's parameters and persistent buffers.

        Args:
            named: the model.
            part: where base weights go.
            adapters: the directory that adapters' directories go into.
            stem: what the files are called.
            has_optimizer: whether only an optimizer is to change parameters, so that those without a gradient are
                still: under adapters all of them, elsewhere those of more than 64 KiB.
        """
        self.naming.setdefault(part, PartNaming(stem))
        by_name, again = named.by_name(), lora.second_places(named)
        where = lora.places(named) | again
        under_adapters = bool(lora.adapter_names(named.root))
        for tensor in [*named.tensors, *(replace(by_name[named.aliases[name]], fqn=name) for name in again)]:
            place, live = where[tensor.fqn], tensor.tensor
            target = part
            is_still = has_optimizer and tensor.is_parameter and not live.requires_grad
            if place.adapter is not None:
                target = join(adapters, place.adapter)
                self.naming.setdefault(target, PartNaming("adapter_model", single=True))
                is_still = False
            elif not under_adapters:
                is_still = is_still and live.numel() * live.element_size() > SMALL_BYTES
            if tensor.fqn in again:
                self._tied[target, tensor.fqn] = named.aliases[tensor.fqn]
            self._add(
                target, tensor.fqn, None, place.key, live, tensor.mesh,
                is_stable=tensor.is_parameter, is_still=is_still,
            )  # fmt: skip

    def untied(self, manifest: Manifest) -> list[str]:
        """Return what is one tensor here and two different ones in a checkpoint: both would be read into one memory."""
        stored = {(entry.part, entry.fqn): entry for entry in manifest.tensors if entry.state is None}
        found: list[str] = []
        for (part, again), first in self._tied.items():
            one, other = stored.get((part, first)), stored.get((part, again))
            if one is not None and other is not None and one.crc64nvme != other.crc64nvme:
                found.append(f"{part}: {again} is tied to {first}, and the checkpoint has other values for it")
        return found

    def add_model_documents(self, named: NamedModule, part: str, adapters: str, tokenizer: Any) -> None:
        """Add the files beside the weights; only the coordinator needs to."""
        base = lora.base_model(named.root)
        beside = hugging_face.model_documents(base, named.tensors, tokenizer)
        self.coordinator_documents |= {join(part, name): data for name, data in beside.items()}
        for adapter in lora.adapter_names(named.root):
            self.coordinator_documents[join(adapters, adapter, "adapter_config.json")] = lora.adapter_config(
                named.root, adapter
            )

    def add_extra_state(self, named: NamedModule, part: str) -> None:
        """Add what modules keep outside their tensors (`get_extra_state`)."""
        if named.extra_states:
            values = {
                name: plain_values(module.get_extra_state(), f"extra state of {name}")
                for name, module in named.extra_states.items()
            }
            self.documents[join(part, EXTRA_STATE_NAME)] = encode_document(values)

    def add_optimizer(self, optimizer: Optimizer, named: NamedModule, part: str, stem: str = "optimizer") -> None:
        """Add an optimizer's state, to be saved."""
        document, tensors = read_optimizer(optimizer, named, part)
        self.add_optimizer_state(document, tensors, part, stem)

    def add_optimizer_state(
        self, document: dict[str, Any], tensors: Collection[StateTensor], part: str, stem: str = "optimizer"
    ) -> None:
        """Add an optimizer's state, as `read_optimizer` returns it."""
        self.naming.setdefault(part, PartNaming(stem))
        self.optimizer_documents[part] = document
        self._members += [(part, name) for group in document["groups"] for name in group["params"]]
        self._add_states(part, tensors)

    def add_optimizer_target(
        self,
        optimizer: Optimizer,
        named: NamedModule,
        part: str,
        document: Mapping[str, Any],
        manifest: Manifest,
        *,
        fresh: bool = False,
        may_miss: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Add an optimizer that is to be filled with what a checkpoint has (the rest as `target_optimizer` has it)."""
        stored = (entry for entry in manifest.tensors if entry.part == part)
        target = target_optimizer(optimizer, named, part, document, stored, fresh=fresh, may_miss=may_miss)
        self.missing_of += target.missing
        self._members += [(part, name) for members in target.groups for name, _ in members]
        self.optimizers.append(target)
        self.problems += target.problems
        self._add_states(part, target.tensors)

    def only(self, part: str, renamed: str) -> Collected:
        """Return the tensors of one part under another part's name."""
        chosen = Collected(self.rank, naming={renamed: self.naming[part]})
        for fact in self._facts:
            if fact.part == part:
                mesh = None if fact.mesh is None else list(self._meshes)[fact.mesh]
                index = None if mesh is None else chosen._meshes.setdefault(mesh, len(chosen._meshes))
                chosen._facts.append(replace(fact, part=renamed, mesh=index))
                if (part, fact.key) in self.held:
                    chosen.held[renamed, fact.key] = self.held[part, fact.key]
        return chosen

    def _add_states(self, part: str, tensors: Collection[StateTensor]) -> None:
        for tensor in tensors:
            self._add(part, tensor.fqn, tensor.state, f"{tensor.fqn}.{tensor.state}", tensor.tensor, tensor.mesh)


def _place(part: str, fqn: str, state: str | None) -> str:
    return f"{part}: {fqn}" + (f" [{state}]" if state is not None else "")


def collect_roles(
    roles: Mapping[str, TrainState], rank: int, *, is_coordinator: bool, known: Known | None = None
) -> Collected:
    """Collect what a save of roles writes, without random state.

    Args:
        roles: role -> state; the single role `""` has no directory of its own.
        rank: this rank.
        is_coordinator: whether to make the documents that the coordinator alone writes.
        known: what earlier collections found; added to.

    Raises:
        UsageError: something in a state cannot be saved.
    """
    with torch.no_grad():
        collected = Collected(rank, known={} if known is None else known)
        return _collect_roles(collected, roles, is_coordinator=is_coordinator)


def _collect_roles(collected: Collected, roles: Mapping[str, TrainState], *, is_coordinator: bool) -> Collected:
    rank = collected.rank
    for role, state in roles.items():
        modeling, adapters = join(role, "modeling"), join(role, "adapter")
        named = name_tensors(state.model)
        collected.stepped[role] = named.names
        collected.add_model(named, modeling, adapters, has_optimizer=state.optimizer is not None)
        collected.add_extra_state(named, modeling)
        if is_coordinator:
            collected.add_model_documents(named, modeling, adapters, state.tokenizer)
        if state.optimizer is not None:
            collected.add_optimizer(state.optimizer, named, join(role, "optimizer"))
            if lora.adapter_names(named.root):
                collected.under_adapters.add(modeling)
        if state.lr_scheduler is not None:
            path = join(role, "lr_scheduler.json")
            collected.documents[path] = scheduler_document(state.lr_scheduler, path)
        grad_scaler = scaler_of(state)
        if grad_scaler is not None:
            path = join(role, GRAD_SCALER_NAME)
            collected.documents[path] = scaler_document(grad_scaler, path)
        collected.rank_documents |= _rank_documents(role, state, rank)
        if state.frozen:
            parts = (part for part in collected.naming if part == modeling or part.startswith(f"{adapters}/"))
            collected.frozen.update(parts)
    return collected


def _rank_documents(role: str, state: TrainState, rank: int) -> dict[str, bytes]:
    documents: dict[str, bytes] = {}
    if state.sampler is not None:
        path = rank_document(join(role, "data"), rank)
        documents[path] = sampler_document(state.sampler, path)
    for extra, value in state.extras.items():
        path = rank_document(join(role, "extras", extra), rank)
        is_plain = isinstance(value, dict)
        documents[path] = encode_document(plain_values(value, path)) if is_plain else sampler_document(value, path)
    return documents
