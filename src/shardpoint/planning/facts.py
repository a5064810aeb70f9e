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
    """

    part: str
    fqn: str
    state: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    mesh: int | None = None
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
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


def encode_table(table: Table) -> bytes:
    """Return a table as bytes: equal tables give equal bytes."""
    return msgspec.msgpack.encode(table)


def decode_table(data: bytes) -> Table:
    """Return the table that `encode_table` encoded."""
    return msgspec.msgpack.decode(data, type=Table)


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, as all ranks together know it."""

    part: str
    fqn: str
    state: str | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    holdings: tuple[Holding, ...]

    @property
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
        return hashlib.sha256(msgspec.msgpack.encode((self.entries, self.world_size, sorted(self.members)))).digest()

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
        conflicts += _absences(f"{part}/{key}", ways)
    if conflicts:
        text = "the ranks do not describe the same tensors:\n  " + "\n  ".join(conflicts)
        raise UsageError(text)
    entries = tuple(
        Entry(fact.part, fact.fqn, fact.state, fact.key, fact.dtype, fact.shape, _holdings(ways))
        for fact, ways in merged.values()
    )
    members = frozenset(member for _, table in tables for member in table.members)
    return MergedTable(entries, world_size, members)


def _identity(fact: TensorFact) -> tuple[str, str | None, str, tuple[int, ...]]:
    return fact.fqn, fact.state, fact.dtype, fact.shape


def _holdings(ways: dict[_Way, list[int]]) -> tuple[Holding, ...]:
    return tuple(Holding(tuple(sorted(ranks)), mesh, placements) for (mesh, placements), ranks in ways.items())


def _absences(name: str, ways: dict[_Way, list[int]]) -> list[str]:
    return [
        f"{name}: spread over the ranks {sorted(mesh.ranks)}, of which {absent} do not have it in this way"
        for (mesh, _), ranks in ways.items()
        if mesh is not None and (absent := sorted(set(mesh.ranks) - set(ranks)))
    ]
