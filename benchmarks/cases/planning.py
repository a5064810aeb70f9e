"""How long does planning take for 16,384 ranks, on one of them?

Llama-3-405B with AdamW (3,411 tensors) under FSDP over tensor parallelism, 2048 x 8 ranks, 8 kinds of tables.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from shardpoint.checksum import merge_packed, whole_tensors
from shardpoint.comm.tree import FANOUT, Tree
from shardpoint.engine import PlanCache, StructureCache
from shardpoint.engine.structure import digest_of, merge_sent
from shardpoint.layout import Mesh
from shardpoint.planning import MergedTable, Table, encode_table
from shardpoint.testing import Simulation, llama3_405b

ROUNDS = 7


def run() -> dict[str, float]:
    """Measure.

    Returns:
        Medians in seconds: `cold_plan_s`, from the encoded tables of all kinds to the merged table, its digest, the
        file layout, its digest and one rank's items and chunks; `warm_plan_s`, from a rank's own new table over its
        digest to the plan in the cache; `coordinator_merge_s`, what the coordinator does with the bundles of its
        children and its own vote, to the whole tensors' checksums and the check that each byte was written once;
        `interior_merge_s`, what a rank with as many children does.
    """
    job = llama3_405b()
    sent = [(ranks, encode_table(table)) for ranks, table in job.tables]
    cache = StructureCache()
    merged = merge_sent(sent, job.world_size)
    plan = _plan(job, merged, cache.plans)
    own = job.tables[0][1]
    cache.put(b"key", digest_of(encode_table(own)), merged)
    sizes = [entry.num_bytes for entry in merged.entries]
    bundles = _bundles(job)
    if not all(whole_tensors([merge_packed(bundles)], sizes).covered):
        text = "the simulated votes do not cover every byte"
        raise AssertionError(text)

    def cold() -> None:
        _plan(job, merge_sent(sent, job.world_size), PlanCache())

    def warm(table: Table) -> None:
        known = cache.get(cache.key_for(digest_of(encode_table(table))))
        if known is None or _plan(job, known, cache.plans) is not plan:
            text = "the plan was not found in the cache"
            raise AssertionError(text)

    return {
        "cold_plan_s": _median(lambda: cold),
        "warm_plan_s": _median(lambda: _with(warm, _renewed(own))),
        "coordinator_merge_s": _median(lambda: lambda: whole_tensors([merge_packed(bundles)], sizes)),
        "interior_merge_s": _median(lambda: lambda: merge_packed(bundles)),
    }


def _plan(job: Simulation, merged: MergedTable, plans: PlanCache) -> object:
    plan = plans.plan(merged, job.naming, job.max_file_bytes, 0)
    if not plan.layout.digest:
        raise AssertionError
    return plan


def _renewed(table: Table) -> Table:
    """Return an equal table of new objects, as a save collects it."""
    meshes = tuple(Mesh(mesh.shape, mesh.ranks) for mesh in table.meshes)
    return Table(meshes, tuple(replace(fact) for fact in table.facts), table.members)


def _with(call: Callable[[Table], None], table: Table) -> Callable[[], None]:
    return lambda: call(table)


def _bundles(job: Simulation) -> list[bytes]:
    """Return the coordinator's vote and its children's bundles: all ranks' votes, without the levels between."""
    tree = Tree(job.world_size, FANOUT)
    bundles = [job.vote(0)]
    for child in tree.children(0):
        below, bundle = [child], b""
        while below:
            rank = below.pop()
            bundle = merge_packed([bundle, job.vote(rank)])
            below += tree.children(rank)
        bundles.append(bundle)
    return bundles


def _median(prepare: Callable[[], Callable[[], object]]) -> float:
    seconds: list[float] = []
    for _ in range(ROUNDS):
        call = prepare()
        gc.collect()  # the heap of seven rounds is not that of one
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
