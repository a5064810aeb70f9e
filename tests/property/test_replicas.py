"""Are those ranks compared that hold the same, and do votes on what they hold come to the same in any order?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.engine.evidence import (
    MAX_RANKS,
    MAX_VERSIONS,
    Details,
    Evidence,
    NotFinite,
    Versions,
    merge_details,
    merge_evidence,
    suspicion,
)
from shardpoint.layout import owned_region
from shardpoint.manifest import Holders
from shardpoint.planning import MergedTable, compared_window, merge_tables, replica_groups, turn_of
from tests.property.drawn import RankedTables, elements, ranked_tables, worlds

Vote = TypeVar("Vote")


def held_plainly(tables: RankedTables) -> dict[tuple[str, int], frozenset[int]]:
    """Return which elements of each tensor each rank holds, by numpy."""
    held = {}
    for (rank, *_), table in tables:
        for fact in table.facts:
            whole = ((0, ()),) if fact.mesh is None else None
            if whole is not None:
                region = owned_region(fact.shape, (1,), (0,), ())
            else:
                assert fact.mesh is not None
                mesh = table.meshes[fact.mesh]
                coordinate = mesh.coordinate(rank)
                if coordinate is None:
                    continue
                region = owned_region(fact.shape, mesh.shape, coordinate, fact.placements)
            held[fact.key, rank] = frozenset(elements(region, fact.shape).flatten().tolist())
    return held


@given(ranked_tables())
def test_a_group_is_all_ranks_that_hold_the_same_elements(drawn: tuple[RankedTables, int]) -> None:
    tables, world = drawn
    table, held = merge_tables(tables, world), held_plainly(tables)
    keys: dict[int, tuple[int, ...]] = {}
    for rank in range(world):
        groups = replica_groups(table, rank)
        found = {index: group.ranks for group in groups for index in group.entries}
        expected = {}
        for index, entry in enumerate(table.entries):
            own = held.get((entry.key, rank))
            ranks = tuple(other for other in range(world) if own and held.get((entry.key, other)) == own)
            if len(ranks) > 1:
                expected[index] = ranks
        assert found == expected
        assert len({group.ranks for group in groups}) == len(groups)
        for group in groups:
            assert list(group.entries) == sorted(group.entries)
            assert keys.setdefault(group.key, group.ranks) == group.ranks
            for other in group.ranks:  # all ranks of a group see the same group
                assert group in replica_groups(table, other)
    assert len(set(keys.values())) == len(keys)


@given(st.integers(1, 10 * 2**20), st.integers(0, 2**64 - 1))
def test_a_window_lies_within_and_all_of_them_are_everything(num_bytes: int, turn: int) -> None:
    start, stop = compared_window(num_bytes, turn)
    assert 0 <= start < stop <= num_bytes
    position = 0
    for start, stop in sorted({compared_window(num_bytes, turn) for turn in range(32)}):
        assert start == position
        position = stop
    assert position == num_bytes


def test_names_of_steps_reach_every_window() -> None:
    for stride in (1, 10, 500, 1000):
        turns = {turn_of(f"epoch-0_step-{stride * number}") % 32 for number in range(1, 400)}
        assert len(turns) == 32


# ---- merging


def _merged_in_a_tree(data: st.DataObject, votes: Sequence[Vote], merge: Callable[[Sequence[Vote]], Vote]) -> Vote:
    """Merge as ranks do: any grouping, any order, each result encoded on its way."""
    left = list(votes)
    while len(left) > 1:
        count = data.draw(st.integers(2, len(left)))
        taken = [left.pop(data.draw(st.integers(0, len(left) - 1))) for _ in range(count)]
        merged = merge(taken)
        kind: Any = Evidence if isinstance(merged, Evidence) else Details
        left.append(msgspec.msgpack.decode(msgspec.msgpack.encode(merged), type=kind))
    return left[0]


DIGESTS = st.one_of(st.integers(0, 2), st.integers(0, 2**64 - 1))


@given(st.data(), worlds())
def test_votes_merge_as_if_one_had_seen_them_all(data: st.DataObject, table: MergedTable) -> None:
    num_ranks = data.draw(st.integers(1, 24))
    groups: dict[int, dict[int, int]] = defaultdict(dict)  # key -> rank -> digest
    numbers: dict[int, dict[int, int]] = defaultdict(dict)  # tensor -> rank -> bytes
    votes = []
    for rank in range(num_ranks):
        own = data.draw(st.dictionaries(st.integers(0, 4), DIGESTS, max_size=3))
        bad = data.draw(st.dictionaries(st.integers(0, len(table.entries) - 1), st.integers(1, 9), max_size=2))
        for key, digest in own.items():
            groups[key][rank] = digest
        for entry, num_bytes in bad.items():
            numbers[entry][rank] = num_bytes
        alone = Holders([rank], 1)
        votes.append(Evidence({k: (d, d) for k, d in own.items()}, {e: NotFinite(n, alone) for e, n in bad.items()}))
    merged = _merged_in_a_tree(data, votes, merge_evidence)
    assert merged.differing() == sorted(key for key, told in groups.items() if len(set(told.values())) > 1)
    found = suspicion(table, merged.not_finite, {}, num_differing=0)
    assert (found is None) == (not numbers)
    for finding, entry in zip(found.findings if found else (), sorted(numbers), strict=True):
        assert (finding.kind, finding.fqn) == ("not_finite", table.entries[entry].fqn)
        assert finding.num_bytes == sum(numbers[entry].values())
        assert finding.holders == [Holders(sorted(numbers[entry])[:MAX_RANKS], len(numbers[entry]))]


@given(st.data(), worlds())
def test_details_merge_as_if_one_had_seen_them_all(data: st.DataObject, table: MergedTable) -> None:
    versions: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    votes: list[Details] = []
    for rank in range(data.draw(st.integers(1, 24))):
        vote: Details = {}
        for key in data.draw(st.sets(st.integers(0, 2), max_size=2)):
            for entry in range(len(table.entries)):
                digest = data.draw(DIGESTS)
                vote.setdefault(key, {})[entry] = Versions(64, {digest: Holders([rank], 1)})
                versions[key, entry][digest].append(rank)
        votes.append(vote)
    merged = _merged_in_a_tree(data, votes, merge_details)
    expected = []
    for (key, entry), told in versions.items():
        kept = sorted(told)[:MAX_VERSIONS]
        assert merged[key][entry].holders == {d: Holders(told[d][:MAX_RANKS], len(told[d])) for d in kept}
        if len(told) > 1:
            expected.append((entry, min(told[digest] for digest in kept)[:MAX_RANKS]))
    found = suspicion(table, {}, merged, num_differing=len(merged) + 3)
    assert found is not None
    assert found.num_findings == len(expected) + 3
    names = [(finding.fqn, finding.holders[0].ranks) for finding in found.findings]
    assert names == [(table.entries[entry].fqn, ranks) for entry, ranks in sorted(expected)][:32]
    for finding in found.findings:
        assert [holders.ranks for holders in finding.holders] == sorted(h.ranks for h in finding.holders)
