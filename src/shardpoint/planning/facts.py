"""What is true of every tensor, on every rank: one rank's table of facts, and the merged table that all plan from.

Ranks' own tables legitimately differ (pipeline stages, norms on a smaller mesh, plain tensors without a mesh), so only
distinct tables travel and the digest that must agree is that of the *merged* table. A digest covers names, shapes,
dtypes, placements and meshes, never names alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from shardpoint.dtypes import stored_form, tensor_bytes
from shardpoint.errors import UsageError
from shardpoint.layout import Mesh, Placement


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What one rank knows of one tensor that it holds (a part of).

    Attributes:
        part: the directory that it belongs to (`"modeling"`, `"actor/optimizer"`).
        fqn: the parameter's or buffer's name in the unwrapped model.
        state: the optimizer state's name, or None for weights.
        key: its name in the file.
        dtype: logical dtype name.
        shape: logical global shape.
        mesh: index into the table's meshes, or None: a plain tensor, which nothing guarantees to be equal across ranks.
        placements: one per mesh axis; empty without a mesh.
        is_still: whether no step of its role's optimizer can change it, so that it is put into files of its own.
    """

    part: str
    fqn: str
    state: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    mesh: int | None = None
    placements: tuple[Placement, ...] = ()
    is_still: bool = False


@dataclass(frozen=True)
class Table:
    """One rank's facts, in the order of its model.

    Attributes:
        meshes: those that the facts refer to.
        facts: one for each tensor that the rank holds (a part of).
        members: (part, FQN) of every parameter that an optimizer has, with or without state.
    """

    meshes: tuple[Mesh, ...]
    facts: tuple[TensorFact, ...]
    members: tuple[tuple[str, str], ...] = ()

    @cached_property
    def encoded(self) -> bytes:
        """The table as it travels, and as its digest is taken."""
        meshes = tuple(msgspec.Raw(msgspec.msgpack.encode(mesh)) for mesh in self.meshes)
        facts, members = (msgspec.Raw(msgspec.msgpack.encode(part)) for part in (self.facts, self.members))
        return msgspec.msgpack.encode(_Wire(meshes, facts, members))


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    """A table as it travels: its parts are encoded one by one, so that equal parts of several tables show as bytes."""

    meshes: tuple[msgspec.Raw, ...]
    facts: msgspec.Raw
    members: msgspec.Raw


def encode_table(table: Table) -> bytes:
    """Return a table as bytes: equal tables give equal bytes. They are made once."""
    return table.encoded


def decode_table(data: bytes) -> Table:
    """Return the table that `encode_table` encoded."""
    return decode_tables([data])[0]


def decode_tables(encoded: Sequence[bytes]) -> list[Table]:
    """Return the tables that `encode_table` encoded; what several have in common is one object.

    Under tensor parallelism each of its ranks sees another data-parallel mesh, and all else alike: the facts, which are
    most of a table, are decoded once, and `merge_tables` looks at them once.
    """
    known: dict[tuple[Any, bytes], Any] = {}

    def part(raw: msgspec.Raw, kind: Any) -> Any:
        key = (kind, bytes(raw))
        if key not in known:
            known[key] = msgspec.msgpack.decode(raw, type=kind)
        return known[key]

    tables: list[Table] = []
    for data in encoded:
        wire = msgspec.msgpack.decode(data, type=_Wire)
        meshes = tuple(part(raw, Mesh) for raw in wire.meshes)
        facts, members = part(wire.facts, tuple[TensorFact, ...]), part(wire.members, tuple[tuple[str, str], ...])
        tables.append(Table(meshes, facts, members))
    return tables


_Way = tuple[Mesh | None, tuple[Placement, ...]]


@dataclass(frozen=True, slots=True)
class Holding:
    """One way in which ranks hold a tensor.

    Attributes:
        ranks: those whose table says so, ascending; all ranks of the mesh are among them.
        mesh: over which it is spread, or None for a plain tensor.
        placements: one per mesh axis.
    """

    ranks: tuple[int, ...]
    mesh: Mesh | None
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor, as all ranks together know it; still where it is so on every rank that has it."""

    part: str
    fqn: str
    state: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    holdings: tuple[Holding, ...]
    is_still: bool = False

    @cached_property
    def num_bytes(self) -> int:
        """The bytes of the whole tensor."""
        return tensor_bytes(*stored_form(self.dtype, self.shape))

    @property
    def label(self) -> str:
        """The tensor's name for a person: part, name and state."""
        return f"{self.part}: {self.fqn}" + (f" [{self.state}]" if self.state is not None else "")


@dataclass(frozen=True)
class MergedTable:
    """All ranks' facts."""

    entries: tuple[Entry, ...]
    world_size: int
    members: frozenset[tuple[str, str]] = frozenset()

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ when anything in the table differs."""
        # Most tensors are held in one of a few ways: each way, with its thousands of ranks, is told once.
        number_of: dict[tuple[Holding, ...], int] = {}
        seen: dict[int, int] = {}
        rows: list[tuple[str, str, str | None, str, str, tuple[int, ...], bool, int]] = []
        for entry in self.entries:
            number = seen.get(id(entry.holdings))
            if number is None:
                number = seen[id(entry.holdings)] = number_of.setdefault(entry.holdings, len(number_of))
            named = (entry.part, entry.fqn, entry.state, entry.key, entry.dtype, entry.shape)
            rows.append((*named, entry.is_still, number))
        told = (list(number_of), rows, self.world_size, sorted(self.members))
        return hashlib.sha256(msgspec.msgpack.encode(told)).digest()

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries)


def merge_tables(tables: Sequence[tuple[Sequence[int], Table]], world_size: int) -> MergedTable:
    """Merge the ranks' tables into one.

    Args:
        tables: each distinct table, with the ranks whose table it is; ascending by lowest rank.
        world_size: the number of ranks.

    Returns:
        The merged table; entries stand in the order in which the tables, one after another, first name them.

    Raises:
        UsageError: two ranks describe one name differently, one rank names a tensor twice, two keys are one tensor, or
            a rank of a tensor's mesh does not have the tensor (its bytes would have no writer).
    """
    sources, slots = _sources(tables)
    merged: dict[tuple[str, str], tuple[TensorFact, _Where]] = {}
    clean = True
    for source, facts in enumerate(sources):
        numbers = {slot: number for number, slot in enumerate(slots[source])}
        for fact in facts:
            name, where = (fact.part, fact.key), (source, numbers[fact.mesh, fact.placements])
            known = merged.get(name)
            if known is None:
                merged[name] = (fact, (where,))
                continue
            first, places = known
            clean = clean and places[-1][0] != source and _identity(first) == _identity(fact)
            merged[name] = (fact if first.is_still and not fact.is_still else first, (*places, where))
    holdings: dict[_Where, tuple[Holding, ...]] = {}
    for _, places in merged.values():
        if places not in holdings:
            ways = _ways(tables, sources, slots, places)
            clean = clean and not any(_absent(ways))
            holdings[places] = _holdings(ways)
    if not clean or len({(fact.part, fact.fqn, fact.state) for fact, _ in merged.values()}) != len(merged):
        raise UsageError("the ranks do not describe the same tensors:\n  " + "\n  ".join(_conflicts(tables)))
    entries = tuple(
        Entry(fact.part, fact.fqn, fact.state, fact.key, fact.dtype, fact.shape, holdings[places], fact.is_still)
        for fact, places in merged.values()
    )
    members = frozenset(member for _, table in tables for member in table.members)
    return MergedTable(entries, world_size, members)


_Tables = Sequence[tuple[Sequence[int], Table]]
_Slot = tuple[int | None, tuple[Placement, ...]]
"""Mesh, by its index in a table, and placements: how one table says that a tensor is held."""
_Where = tuple[tuple[int, int], ...]
"""Which sources name a tensor, ascending, and in which slot each: tensors of equal places are held alike."""


def _sources(tables: _Tables) -> tuple[list[tuple[TensorFact, ...]], list[list[_Slot]]]:
    """Return the distinct fact lists (by identity: those that tables share), and the slots that each one uses."""
    sources = list({id(table.facts): table.facts for _, table in tables}.values())
    return sources, [list(dict.fromkeys((fact.mesh, fact.placements) for fact in facts)) for facts in sources]


def _ways(
    tables: _Tables, sources: list[tuple[TensorFact, ...]], slots: list[list[_Slot]], places: _Where
) -> dict[_Way, list[int]]:
    """Return the ways in which the tensors of some places are held, with their ranks, in the order of the tables."""
    slot_of = {id(sources[source]): slots[source][number] for source, number in places}
    ways: dict[_Way, list[int]] = {}
    for ranks, table in tables:
        if id(table.facts) in slot_of:
            index, placements = slot_of[id(table.facts)]
            ways.setdefault((None if index is None else table.meshes[index], placements), []).extend(ranks)
    return ways


def _identity(fact: TensorFact) -> tuple[str, str | None, str, tuple[int, ...]]:
    return fact.fqn, fact.state, fact.dtype, fact.shape


def _holdings(ways: dict[_Way, list[int]]) -> tuple[Holding, ...]:
    return tuple(Holding(tuple(sorted(ranks)), mesh, placements) for (mesh, placements), ranks in ways.items())


def _absent(ways: dict[_Way, list[int]]) -> list[list[int]]:
    """Return, for each way, the ranks of its mesh that do not hold the tensor so."""
    return [[] if mesh is None else sorted(set(mesh.ranks).difference(ranks)) for (mesh, _), ranks in ways.items()]


def _conflicts(tables: _Tables) -> list[str]:
    """Return what is wrong with tables that do not fit together, in words: one fact after another, at leisure."""
    merged: dict[tuple[str, str], tuple[TensorFact, dict[_Way, list[int]]]] = {}
    conflicts: list[str] = []
    for ranks, table in tables:
        seen: set[tuple[str, str]] = set()
        for fact in table.facts:
            name = (fact.part, fact.key)
            if name in seen:
                conflicts.append(f"rank {ranks[0]} has two tensors called {fact.key!r} in {fact.part}")
            seen.add(name)
            mesh = None if fact.mesh is None else table.meshes[fact.mesh]
            known, ways = merged.setdefault(name, (fact, {}))
            if _identity(known) != _identity(fact):
                first = min(rank for holders in ways.values() for rank in holders)
                conflicts.append(
                    f"{fact.part}/{fact.key}: rank {first} has {known.dtype} {list(known.shape)} of {known.fqn}, "
                    f"rank {ranks[0]} has {fact.dtype} {list(fact.shape)} of {fact.fqn}"
                )
            ways.setdefault((mesh, fact.placements), []).extend(ranks)
    key_of: dict[tuple[str, str, str | None], str] = {}
    for (part, key), (fact, ways) in merged.items():
        other = key_of.setdefault((part, fact.fqn, fact.state), key)
        if other != key:
            conflicts.append(f"{part}: {fact.fqn} is stored under two names, {other!r} and {key!r}")
        conflicts += [
            f"{part}/{key}: spread over the ranks {sorted(mesh.ranks)}, of which {absent} do not have it in this way"
            for (mesh, _), absent in zip(ways, _absent(ways), strict=True)
            if mesh is not None and absent
        ]
    return conflicts
