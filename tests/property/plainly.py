"""What a plan is, said as plainly as can be: the oracle for the code that computes plans fast.

It goes rank by rank and tensor by tensor, remembers nothing, and calls only the rule for regions (`owned_region`),
which has oracles of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

from shardpoint.dtypes import stored_form, tensor_bytes
from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement, owned_region
from shardpoint.planning import MergedTable, PartNaming, Table, TensorFact
from tests.property.drawn import RankedTables

Way = tuple[Mesh | None, tuple[Placement, ...]]


def merged_plainly(tables: RankedTables) -> list[tuple[TensorFact, list[tuple[tuple[int, ...], Way]]]]:
    """Return each tensor's first fact, and the ways in which it is held, each with its ranks."""
    names: dict[tuple[str, str], tuple[TensorFact, dict[Way, list[int]]]] = {}
    for ranks, table in tables:
        for fact in table.facts:
            _, ways = names.setdefault((fact.part, fact.key), (fact, {}))
            mesh = None if fact.mesh is None else table.meshes[fact.mesh]
            ways.setdefault((mesh, fact.placements), []).extend(ranks)
    return [(fact, [(tuple(sorted(r)), way) for way, r in ways.items()]) for fact, ways in names.values()]


def items_plainly(tables: RankedTables, rank: int) -> list[tuple[int, Region, int, int]]:
    """Return (tensor, region, first byte, byte after the last) of what a rank writes."""
    groups: dict[tuple[int, ...], list[tuple[int, Region, int]]] = defaultdict(list)
    for index, (fact, holdings) in enumerate(merged_plainly(tables)):
        ranks, (mesh, placements) = min(holdings, key=lambda holding: holding[0][0])
        if mesh is None:
            if rank != ranks[0]:
                continue
            members: tuple[int, ...] = (rank,)
            region = Region.whole(fact.shape)
        else:
            at = dict(zip(mesh.ranks, itertools.product(*map(range, mesh.shape)), strict=True))
            if rank not in at:
                continue
            cutting = [axis for axis, placement in enumerate(placements) if placement.kind != "replicate"]
            mine = [at[rank][axis] for axis in cutting]
            members = tuple(sorted(r for r, c in at.items() if [c[axis] for axis in cutting] == mine))
            region = owned_region(fact.shape, mesh.shape, at[rank], placements)
        whole_bytes = tensor_bytes(*stored_form(fact.dtype, fact.shape))
        if region.numel:
            groups[members].append((index, region, region.numel * whole_bytes // prod(fact.shape)))
    items = []
    for members, shards in groups.items():
        total, place, start = sum(n for _, _, n in shards), members.index(rank), 0
        for index, region, n in shards:
            edges = [total * at // len(members) - start for at in (place, place + 1)]
            low, high = (0 if e <= 0 else n if e >= n else e // 4096 * 4096 for e in edges)
            if low < high:
                items.append((index, region, low, high))
            start += n
    return sorted(items, key=lambda item: item[0])


def files_plainly(
    tables: RankedTables, naming: Mapping[str, PartNaming], max_file_bytes: int
) -> tuple[list[tuple[str, str, bytes, int]], dict[int, tuple[int, int, int]]]:
    """Return each file's path, part, header and size, and each tensor's file, offset and size."""
    facts = [fact for fact, _ in merged_plainly(tables)]
    sizes = [tensor_bytes(*stored_form(fact.dtype, fact.shape)) for fact in facts]
    files: list[tuple[str, str, bytes, int]] = []
    placed: dict[int, tuple[int, int, int]] = {}
    for part in dict.fromkeys(fact.part for fact in facts):
        shards: list[list[int]] = []
        for index in (index for index, fact in enumerate(facts) if fact.part == part):
            used = sum(sizes[i] for i in shards[-1]) if shards else 0
            if not shards or (used and used + sizes[index] > max_file_bytes):
                shards.append([])
            shards[-1].append(index)
        for number, shard in enumerate(shards, start=1):
            entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            position = 0
            ordered = sorted(
                shard, key=lambda i: -next(a for a in (2**p for p in range(12, -1, -1)) if not sizes[i] % a)
            )
            for i in ordered:
                dtype, shape = stored_form(facts[i].dtype, facts[i].shape)
                offsets = [position, position + sizes[i]]
                entries[facts[i].key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
                position += sizes[i]
            text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-(8 + len(text)) % 4096)
            header = len(text).to_bytes(8, "little") + text
            for i in ordered:
                start = entries[facts[i].key]["data_offsets"][0]
                placed[i] = (len(files), len(header) + start, sizes[i])
            name = naming[part].file_name(number, len(shards))
            files.append((f"{part}/{name}", part, header, len(header) + position))
    return files, placed


def table_digest(table: MergedTable) -> str:
    """Return a digest of everything that a merged table says, which no release may change."""
    told = [
        [e.part, e.fqn, e.state, e.key, e.dtype, e.shape, [_holding(h.ranks, h.mesh, h.placements) for h in e.holdings]]
        for e in table.entries
    ]
    return hashlib.sha256(json.dumps([told, table.world_size, sorted(table.members)]).encode()).hexdigest()


def _holding(ranks: tuple[int, ...], mesh: Mesh | None, placements: tuple[Placement, ...]) -> list[Any]:
    return [
        ranks,
        None if mesh is None else [mesh.shape, mesh.ranks],
        [[p.kind, p.dim, p.split_factor] for p in placements],
    ]


def seeded_tables(seed: int) -> tuple[RankedTables, int]:
    """Return the tables of a world that follows from a number: several parts, meshes, stages, plain tensors."""
    dice = random.Random(seed)
    world = dice.choice([1, 2, 3, 4, 6, 8, 12])
    facts: list[list[TensorFact]] = [[] for _ in range(world)]
    meshes: list[dict[Mesh, int]] = [{} for _ in range(world)]
    for number in range(dice.randint(8, 40)):
        part = dice.choice(["modeling", "optimizer", "critic/modeling"])
        dtype = dice.choice(["BF16", "F32", "U8", "C64", "I64"])
        shape = tuple(dice.choice([1, 3, 7, 8, 64, 130, 256]) for _ in range(dice.randint(0, 3)))
        order = dice.sample(range(world), world)
        size = dice.choice([n for n in range(1, world + 1) if world % n == 0])
        kind = dice.choice(["side by side", "stage", "plain"])
        axes = dice.choice([(size,), (1, size), *([(size // 2, 2)] if size % 2 == 0 else [])])
        placements = tuple(_placement(dice, axes, axis, len(shape)) for axis in range(len(axes)))
        groups = [order[start : start + size] for start in range(0, world, size)]
        for group in groups if kind == "side by side" else groups[:1]:
            mesh = Mesh(axes, tuple(group))
            for rank in group:
                known = None if kind == "plain" else meshes[rank].setdefault(mesh, len(meshes[rank]))
                how = () if kind == "plain" else placements
                name = f"layers.{number}.é"
                facts[rank].append(TensorFact(part, name, None, name, dtype, shape, known, how))
    kinds: dict[Table, list[int]] = {}
    for rank in range(world):
        members = tuple(("optimizer", fact.fqn) for fact in facts[rank] if fact.part == "optimizer")
        kinds.setdefault(Table(tuple(meshes[rank]), tuple(facts[rank]), members), []).append(rank)
    return [(ranks, table) for table, ranks in kinds.items()], world


def _placement(dice: random.Random, axes: tuple[int, ...], axis: int, num_dims: int) -> Placement:
    kind = dice.choice(["replicate", "shard", "shard", "strided_shard"] if num_dims else ["replicate"])
    dim = dice.randrange(num_dims) if num_dims else 0
    if kind == "strided_shard":
        return Placement("strided_shard", dim, dice.choice([2, prod(axes[axis + 1 :])]))
    return Placement("shard", dim) if kind == "shard" else Placement("replicate")
