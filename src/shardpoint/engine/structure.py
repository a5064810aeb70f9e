"""How the ranks come to plan from one table: digests first, tables only when a structure is new.

Ballots of 32 bytes tell which ranks have the same table; only one rank of each kind sends its table, and only when some
rank's structure differs from that of the last time. The digest of the merged table is then compared on every rank.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.plans import PlanCache
from shardpoint.errors import DistributedError
from shardpoint.planning import MergedTable, Table, decode_tables, encode_table, merge_tables

MAX_CACHED = 8


class StructureBallot(msgspec.Struct, frozen=True):
    """One rank's structure.

    Attributes:
        table: digest of its table.
        known: the structure key under which this rank has that table cached; empty when it is new.
        documents: digest of its documents.
        facts: what must be equal on all ranks, as text (name, epoch, step).
        host: the kernel that the rank runs on.
        late: the parts of which this rank would read what is still at the end.
        careful: the parts of which what is still must have been read before a step ends.
    """

    table: bytes
    known: bytes
    documents: bytes
    facts: str
    host: str = ""
    late: list[str] = []
    careful: list[str] = []


class StructureVerdict(msgspec.Struct, frozen=True):
    """Who sends what.

    Attributes:
        key: identifies the ranks' tables together.
        table_senders: lowest rank of each kind of table -> the ranks of that kind; empty when all have it cached.
        document_senders: lowest rank of each kind of documents.
        one_host: whether all ranks run on one kernel.
        late: the parts of which no rank must be careful.
        tries: paths of files of the other parts that may have the bytes that they had before: so the last save found.
    """

    key: bytes
    table_senders: list[tuple[int, list[int]]]
    document_senders: list[int]
    one_host: bool
    late: list[str] = []
    tries: list[str] = []


@dataclass
class StructureCache:
    """Merged tables of the last structures, by their key.

    Attributes:
        plans: what follows from them.
        proven: on the coordinator, the files of still tensors that the last save found to have the bytes of the
            checkpoint before it; empty after a save that failed.
    """

    plans: PlanCache = field(default_factory=PlanCache)
    proven: frozenset[str] = frozenset()
    _merged: OrderedDict[bytes, MergedTable] = field(default_factory=OrderedDict)
    _key_of: dict[bytes, bytes] = field(default_factory=dict)

    def key_for(self, table_digest: bytes) -> bytes:
        """Return the key of the structure that this rank's table was last part of, or nothing."""
        key = self._key_of.get(table_digest, b"")
        return key if key in self._merged else b""

    def get(self, key: bytes) -> MergedTable | None:
        """Return a merged table."""
        return self._merged.get(key)

    def put(self, key: bytes, table_digest: bytes, merged: MergedTable) -> None:
        """Remember a merged table; the oldest is forgotten."""
        self._merged[key] = merged
        self._merged.move_to_end(key)
        self._key_of[table_digest] = key
        while len(self._merged) > MAX_CACHED:
            self._merged.popitem(last=False)
        self._key_of = {digest: known for digest, known in self._key_of.items() if known in self._merged}


def digest_of(data: bytes) -> bytes:
    """Return 32 bytes that identify some bytes."""
    return hashlib.sha256(data).digest()


def decide_structure(ballots: Sequence[StructureBallot], cache: StructureCache) -> StructureVerdict:
    """Decide, on the coordinator, who sends what."""
    key = digest_of(b"".join(ballot.table for ballot in ballots))
    kinds: dict[bytes, list[int]] = {}
    documents: dict[bytes, int] = {}
    for rank, ballot in enumerate(ballots):
        kinds.setdefault(ballot.table, []).append(rank)
        documents.setdefault(ballot.documents, rank)
    cached = cache.get(key) is not None and all(ballot.known == key for ballot in ballots)
    senders = [] if cached else [(ranks[0], ranks) for ranks in kinds.values()]
    one_host = len({ballot.host for ballot in ballots}) == 1
    careful = {part for ballot in ballots for part in ballot.careful}
    late = {part for ballot in ballots for part in ballot.late} - careful
    tries = sorted(cache.proven) if careful else []
    return StructureVerdict(key, senders, sorted(documents.values()), one_host, sorted(late), tries)


def exchange_tables(comm: Comm, topic: str, own: Table, structure: StructureVerdict) -> list[tuple[list[int], bytes]]:
    """Return each distinct table with its ranks; nothing where all ranks have the structure cached.

    Collective:
        All ranks: one round where a rank's structure is new, else none.
    """
    if not structure.table_senders:
        return []
    senders = dict(structure.table_senders)

    def choose(tables: Sequence[bytes]) -> list[tuple[list[int], bytes]]:
        return [(ranks, tables[sender]) for sender, ranks in structure.table_senders]

    return agree(
        comm,
        topic,
        lambda: encode_table(own) if comm.rank in senders else b"",
        bytes,
        choose,
        list[tuple[list[int], bytes]],
    )


def merge_sent(sent: Sequence[tuple[list[int], bytes]], world_size: int) -> MergedTable:
    """Merge the tables that were sent, each with its ranks."""
    tables = decode_tables([data for _, data in sent])
    return merge_tables([(ranks, table) for (ranks, _), table in zip(sent, tables, strict=True)], world_size)


def settle(
    cache: StructureCache,
    verdict: StructureVerdict,
    own: Table,
    tables: Sequence[tuple[list[int], bytes]],
    digest: bytes | None,
    world_size: int,
) -> MergedTable:
    """Return the merged table on this rank, and remember it.

    Args:
        cache: this rank's.
        verdict: of the structure round.
        own: this rank's table.
        tables: what was sent, or nothing where all have it cached.
        digest: the coordinator's digest of the merged table; None where it is compared later.
        world_size: the number of ranks.

    Raises:
        DistributedError: this rank's merged table is not the coordinator's.
    """
    merged = merge_sent(tables, world_size) if tables else cache.get(verdict.key)
    if merged is None or digest not in (None, merged.digest):
        text = (
            "this rank's merged table of tensors is not the coordinator's: the ranks run different releases, or a bug"
        )
        raise DistributedError(text)
    cache.put(verdict.key, digest_of(encode_table(own)), merged)
    return merged
