"""What the ranks tell of what they hold while it is saved, how their votes merge, and the findings that follow.

First each rank tells one digest for each group of replicas. On its way up the tree only the least and the greatest of a
group are kept: they are equal if and only if all are. Only where some are not do the ranks, in one more round, tell the
digest of each tensor of those groups, and what is kept is which ranks hold which version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shardpoint.manifest import Finding, Holders, Suspect
from shardpoint.planning import MergedTable

MAX_RANKS = 8
MAX_VERSIONS = 8
MAX_GROUPS = 16
MAX_FINDINGS = 32


class NotFinite(msgspec.Struct, frozen=True):
    """Values of one tensor that are NaN or infinite: how many bytes of them, and who wrote them."""

    num_bytes: int
    holders: Holders


class Evidence(msgspec.Struct, frozen=True):
    """What some ranks found.

    Attributes:
        replicas: key of a group -> the least and the greatest digest of those that its ranks told.
        not_finite: index of a tensor -> what is not finite in it.
    """

    replicas: dict[int, tuple[int, int]] = {}
    not_finite: dict[int, NotFinite] = {}

    def differing(self) -> list[int]:
        """Return the groups whose replicas are not all equal, ascending."""
        return sorted(key for key, (least, greatest) in self.replicas.items() if least != greatest)


class Versions(msgspec.Struct, frozen=True):
    """The versions of one tensor in one group of replicas.

    Attributes:
        num_bytes: how many bytes each rank compared.
        holders: digest -> the ranks that told it; of more than eight digests, the eight least.
    """

    num_bytes: int
    holders: dict[int, Holders]


Details = dict[int, dict[int, Versions]]
"""Key of a group -> index of a tensor -> its versions."""


def join_holders(first: Holders, second: Holders) -> Holders:
    """Return the ranks of two disjoint sets."""
    return Holders(sorted([*first.ranks, *second.ranks])[:MAX_RANKS], first.num_ranks + second.num_ranks)


def merge_evidence(votes: Sequence[Evidence]) -> Evidence:
    """Make one vote of several of different ranks."""
    replicas: dict[int, tuple[int, int]] = {}
    not_finite: dict[int, NotFinite] = {}
    for vote in votes:
        for key, (least, greatest) in vote.replicas.items():
            low, high = replicas.get(key, (least, greatest))
            replicas[key] = min(low, least), max(high, greatest)
        for entry, found in vote.not_finite.items():
            known = not_finite.get(entry)
            if known is not None:
                found = NotFinite(known.num_bytes + found.num_bytes, join_holders(known.holders, found.holders))  # noqa: PLW2901 - joined
            not_finite[entry] = found
    return Evidence(replicas, not_finite)


def merge_details(votes: Sequence[Details]) -> Details:
    """Make one vote of several of different ranks.

    A digest among the least of all is among the least wherever it occurs, so its ranks are counted exactly, however the
    votes are grouped.
    """
    merged: Details = {}
    for vote in votes:
        for key, tensors in vote.items():
            known = merged.setdefault(key, {})
            for entry, versions in tensors.items():
                known[entry] = _merge_versions(known[entry], versions) if entry in known else versions
    return merged


def _merge_versions(first: Versions, second: Versions) -> Versions:
    holders = dict(first.holders)
    for digest, ranks in second.holders.items():
        holders[digest] = join_holders(holders[digest], ranks) if digest in holders else ranks
    return Versions(first.num_bytes, {digest: holders[digest] for digest in sorted(holders)[:MAX_VERSIONS]})


def suspicion(
    table: MergedTable, not_finite: Mapping[int, NotFinite], details: Details, *, num_differing: int
) -> Suspect | None:
    """Return what is wrong with a checkpoint, or None where nothing is.

    Args:
        table: the merged table.
        not_finite: index of a tensor -> what is not finite in it.
        details: the versions in the differing groups that were asked for.
        num_differing: how many groups differ; each that was not asked for counts as one finding.
    """
    found = sorted(
        [*_differences(table, details), *_numbers(table, not_finite)],
        key=lambda item: (item[0], item[1].kind, item[1].holders[0].ranks),
    )
    total = len(found) + num_differing - len(details)
    return Suspect(total, [finding for _, finding in found[:MAX_FINDINGS]]) if total else None


def _differences(table: MergedTable, details: Details) -> Iterable[tuple[int, Finding]]:
    for tensors in details.values():
        for index, versions in tensors.items():
            if len(versions.holders) > 1:
                entry = table.entries[index]
                holders = sorted(versions.holders.values(), key=lambda one: one.ranks)
                yield (
                    index,
                    Finding("replicas_differ", entry.part, entry.fqn, entry.state, holders, versions.num_bytes),
                )


def _numbers(table: MergedTable, not_finite: Mapping[int, NotFinite]) -> Iterable[tuple[int, Finding]]:
    for index, found in not_finite.items():
        entry = table.entries[index]
        yield index, Finding("not_finite", entry.part, entry.fqn, entry.state, [found.holders], found.num_bytes)
