"""Is a plan remembered only for exactly what it was made for?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardpoint.engine.plans import PlanCache, SavePlan
from shardpoint.engine.structure import StructureCache, digest_of, merge_sent
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import PartNaming, Table, TensorFact, encode_table, merge_tables, owned_items, plan_files

SHARD = (Placement("shard", 0),)
REPLICATE = (Placement("replicate"),)
W = TensorFact("modeling", "w", None, "w", "F32", (64, 64), 0, SHARD)
V = replace(W, fqn="v", key="v")
NAMING = {"modeling": PartNaming("model")}


def plan_of(cache: PlanCache, facts: tuple[TensorFact, ...] = (W, V), **changes: Any) -> SavePlan:
    world = changes.get("world", 2)
    table = merge_tables([(range(world), Table((Mesh((world,), tuple(range(world))),), facts))], world)
    naming = changes.get("naming", NAMING)
    return cache.plan(
        table, naming, changes.get("max_file_bytes", 10**6), changes.get("rank", 0), changes.get("buffer_bytes", 4096)
    )


def parts(plan: SavePlan) -> tuple[Any, ...]:
    """Return what makes a plan, to be compared."""
    return plan.layout, plan.items, plan.chunks, plan.small_chunks, plan.gathered, plan.sent_local


def test_the_same_structure_again_is_the_same_plan() -> None:
    cache = PlanCache()
    first, second = plan_of(cache), plan_of(cache)
    assert first.layout is second.layout
    assert first.items is second.items
    table = merge_tables([((0, 1), Table((Mesh((2,), (0, 1)),), (W, V)))], 2)
    assert (first.layout, first.items) == (plan_files(table, NAMING, 10**6), tuple(owned_items(table, 0)))
    assert plan_of(cache, buffer_bytes=8192) is not first


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": (replace(W, dtype="BF16"), V)},
        {"facts": (replace(W, shape=(64, 32)), V)},
        {"facts": (replace(W, fqn="u", key="u"), V)},
        {"naming": {"modeling": PartNaming("model", variant="fp8")}},
        {"naming": {"modeling": PartNaming("adapter_model", single=True)}},
        {"naming": {"modeling": PartNaming("model", metadata={"a": "1"})}},
        {"max_file_bytes": 20_000},
    ],
    ids=["dtype", "shape", "name", "variant", "stem", "metadata", "largest file"],
)
def test_another_structure_or_naming_is_another_layout(changes: dict[str, Any]) -> None:
    cache = PlanCache()
    before, after = plan_of(cache), plan_of(cache, **changes)
    assert after.layout != before.layout
    assert parts(after) == parts(plan_of(PlanCache(), **changes))
    assert plan_of(cache) is before


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": (replace(W, placements=REPLICATE), V)},
        {"world": 4},
        {"rank": 1},
        {"facts": (replace(W, mesh=None, placements=()), V)},
    ],
    ids=["placement", "world", "rank", "no mesh"],
)
def test_who_holds_what_decides_the_items(changes: dict[str, Any]) -> None:
    cache = PlanCache()
    before, after = plan_of(cache), plan_of(cache, **changes)
    assert after.items != before.items
    assert parts(after) == parts(plan_of(PlanCache(), **changes))


def test_a_header_keeps_the_order_of_its_texts() -> None:
    cache = PlanCache()
    one, other = (
        {"modeling": PartNaming("m", metadata=texts)} for texts in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    )
    first, second = (plan_of(cache, naming=naming).layout.files[0].layout.header for naming in (one, other))
    assert first.index(b'"a"') < first.index(b'"b"')
    assert second.index(b'"b"') < second.index(b'"a"')


def test_the_plan_that_was_used_longest_ago_is_forgotten() -> None:
    cache = PlanCache(max_plans=2)
    first = plan_of(cache)
    second = plan_of(cache, max_file_bytes=1, rank=1)
    assert plan_of(cache).layout is first.layout
    plan_of(cache, max_file_bytes=2, world=3)
    assert plan_of(cache).layout is first.layout
    again = plan_of(cache, max_file_bytes=1, rank=1)
    assert parts(again) == parts(second)
    assert again.layout is not second.layout
    assert again.items is not second.items


def test_a_structure_that_is_known_leads_to_its_plan_without_its_tables() -> None:
    cache = StructureCache()
    own = Table((Mesh((2,), (0, 1)),), (W, V))
    merged = merge_sent([([0, 1], encode_table(own))], 2)
    planned = cache.plans.plan(merged, NAMING, 10**6, 1)
    cache.put(b"key", digest_of(encode_table(own)), merged)
    same = Table((Mesh((2,), (0, 1)),), (replace(W), V))
    known = cache.get(cache.key_for(digest_of(encode_table(same))))
    assert known is not None
    assert cache.plans.plan(known, NAMING, 10**6, 1).items is planned.items
    other = Table(own.meshes, (replace(W, dtype="BF16"), V))
    assert cache.key_for(digest_of(encode_table(other))) == b""
