"""How the ranks come to write into one attempt: they agree on the structure, and the coordinator opens the attempt.

Two steps, since what is staged follows from the structure alone: a save behind the training stages after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import msgspec

from shardpoint.adapters.collect import GROUPS_NAME, Collected
from shardpoint.adapters.documents import join
from shardpoint.adapters.state import RunState
from shardpoint.comm import Comm
from shardpoint.commit import Attempt, Committed, RootOwner, acquire_root
from shardpoint.engine.ballots import agree
from shardpoint.engine.linking import Linkable, find_linkable, last_checkpoint
from shardpoint.engine.plans import SavePlan
from shardpoint.engine.structure import (
    StructureBallot,
    StructureCache,
    StructureVerdict,
    decide_structure,
    digest_of,
    exchange_tables,
    settle,
)
from shardpoint.errors import DistributedError, UsageError
from shardpoint.events import Listener
from shardpoint.manifest import decode_document, encode_document
from shardpoint.planning import (
    Layout,
    MergedTable,
    PartNaming,
    Table,
    encode_table,
    index_document,
    merge_optimizer_documents,
)
from shardpoint.storage import Store, kernel_id

MAX_FILE_BYTES = 4 * 2**30

ReplicaCheck = Literal["full", "sampled", "off"]
"""How much of what several ranks hold is compared between them: all, a part of each tensor, or nothing."""


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved.

    Attributes:
        name: the name to commit to, one path component.
        collect: makes this rank's items; its errors are those of this rank.
        run: position in training, or None for a directory that is not a training checkpoint.
        roles: the models' names.
        metrics: what the trainer passed along.
        documents: path -> contents, for documents that the caller gives, the same on all ranks.
        max_file_bytes: the largest tensor file.
        as_file: commit the only tensor file itself, not a directory.
        check_replicas: how much of what several ranks hold is compared.
        in_background: whether the training goes on meanwhile.
    """

    name: str
    collect: Callable[[], Collected]
    run: RunState | None = None
    roles: Sequence[str] = ("",)
    metrics: Mapping[str, float] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    max_file_bytes: int = MAX_FILE_BYTES
    as_file: bool = False
    check_replicas: ReplicaCheck = "sampled"
    in_background: bool = False


class Documents(msgspec.Struct, frozen=True):
    """A rank's documents: those that must be equal, and its optimizers' by part."""

    shared: dict[str, bytes]
    optimizers: dict[str, bytes]


class _Contribution(msgspec.Struct, frozen=True):
    documents: Documents | None


class _Opened(msgspec.Struct, frozen=True):
    key: str
    attempt_id: str
    merged: bytes
    layout: bytes
    gathers_small: bool
    one_writer: bool
    linked: list[int]


@dataclass(frozen=True)
class AgreedSave:
    """A structure that all ranks agreed on.

    Attributes:
        own: what this rank collected.
        documents: this rank's, encoded.
        document_senders: the ranks whose documents differ from those of every lower one.
        one_host: whether all ranks run on one kernel.
        planned: the merged table and what this rank does; or why this rank cannot take part, which its next round says.
        late: the parts of which what is still is read at the end.
        tries: paths of files of still tensors of which it is asked, before a step may end, whether they are unchanged.
        unchanged: the files that are, by index: they are frozen too.
    """

    own: Collected
    documents: Documents
    document_senders: list[int]
    one_host: bool
    planned: tuple[MergedTable, SavePlan] | Exception
    late: frozenset[str] = frozenset()
    tries: frozenset[str] = frozenset()
    unchanged: frozenset[int] = frozenset()

    @property
    def checks_frozen(self) -> bool:
        """Whether a round tells the checksums of what is read at the end: the same on all ranks in any case."""
        return bool(self.own.frozen or self.late)

    @property
    def table(self) -> MergedTable:
        """The merged table; raises what planning raised."""
        return self._planned()[0]

    @property
    def plan(self) -> SavePlan:
        """What this rank does; raises what planning raised."""
        return self._planned()[1]

    @cached_property
    def read_late(self) -> frozenset[tuple[str, str]]:
        """The tensors, by part and key, that are read at the end of the save though nobody called them frozen."""
        if isinstance(self.planned, Exception):
            return frozenset()  # nothing is read at all
        table, plan = self.planned
        return frozenset(
            (entry.part, entry.key)
            for entry, placed in zip(table.entries, plan.layout.tensors, strict=True)
            if placed.file in plan.frozen_files - self.unchanged and entry.part not in self.own.frozen
        )

    def _planned(self) -> tuple[MergedTable, SavePlan]:
        if isinstance(self.planned, Exception):
            raise self.planned
        return self.planned


@dataclass(frozen=True)
class OpenSave:
    """An attempt that is open on every rank.

    Attributes:
        key: where it is, relative to the root.
        attempt_id: 32 hex digits.
        merged: digest of the coordinator's merged table.
        layout: digest of the coordinator's layout.
        gathers_small: whether the coordinator gathers small tensors, in a round of its own.
        one_writer: whether each file has one writer.
        linked: files that are an earlier checkpoint's and that nobody writes, by index.
    """

    key: str
    attempt_id: str
    merged: bytes
    layout: bytes
    gathers_small: bool
    one_writer: bool
    linked: frozenset[int] = frozenset()

    def check(self, agreed: AgreedSave, rank: int) -> None:
        """Compare what this rank planned with what the coordinator did; in a round.

        Raises:
            UsageError: this rank lays out files differently.
            DistributedError: its merged table differs.
        """
        if agreed.table.digest != self.merged:
            text = (
                f"rank {rank}'s merged table of tensors is not the coordinator's: the ranks run different releases, "
                "or a bug"
            )
            raise DistributedError(text)
        if agreed.plan.layout.digest != self.layout:
            text = (
                f"rank {rank} lays out the files differently than the coordinator: give all ranks the same largest "
                "file size, variant and adapters"
            )
            raise UsageError(text)


@dataclass
class CoordinatorState:
    """What only the coordinator has while a save is under way.

    Attributes:
        owner: the hold on the root.
        attempt: once it is open.
        merged: the table of all ranks.
        layout: where everything lies.
        documents: path -> contents, for the files that no rank wrote.
        frozen_crcs: entry -> checksum, of the tensors of frozen files as they are now.
        linked: file -> how many checkpoints in a row have had it.
        unchanged: file -> where it was found with the same bytes, before a step could end.
        last: the last checkpoint, where it matters.
        proven: once it is committed, the files of still tensors that have the bytes that the last one has.
    """

    owner: RootOwner | None = None
    attempt: Attempt | None = None
    merged: MergedTable | None = None
    layout: Layout | None = None
    documents: dict[str, bytes] = field(default_factory=dict)
    frozen_crcs: dict[int, int] = field(default_factory=dict)
    linked: dict[int, int] = field(default_factory=dict)
    unchanged: dict[int, Linkable] = field(default_factory=dict)
    last: Committed | None = None
    proven: frozenset[str] = frozenset()


def agree_on_structure(comm: Comm, request: SaveRequest, cache: StructureCache, buffer_bytes: int) -> AgreedSave:
    """Collect, and agree on the structure.

    Args:
        comm: the ranks.
        request: what to save.
        cache: this process's.
        buffer_bytes: the size of a staging buffer.

    Raises:
        UsageError: the ranks asked for different saves, or something cannot be saved.
        PeerError: a rank failed.

    Collective:
        All ranks: one round, and one more where a rank's structure is new.
    """
    collected: tuple[Collected, Documents] | None = None

    def gather() -> StructureBallot:
        nonlocal collected
        own = request.collect()
        documents = _own_documents(request, own)
        collected = own, documents
        facts = own.table
        table = digest_of(encode_table(facts))
        late, careful = _parts_of_still(request, own, facts)
        digest = digest_of(msgspec.msgpack.encode(documents, order="sorted"))
        equal = _agreed_facts(request, own)
        return StructureBallot(table, cache.key_for(table), digest, equal, kernel_id(), late, careful)

    structure = agree(
        comm, "save: structure", gather, StructureBallot, lambda ballots: _structure(ballots, cache), StructureVerdict
    )
    assert collected is not None  # noqa: S101 - the round succeeded, so `gather` did
    own, documents = collected
    tables = exchange_tables(comm, "save: tables", own.table, structure)
    planned = _planned(comm, request, own, structure, tables, cache, buffer_bytes)
    late, tries = frozenset(structure.late), frozenset(structure.tries)
    return AgreedSave(own, documents, structure.document_senders, structure.one_host, planned, late, tries)


def _planned(
    comm: Comm,
    request: SaveRequest,
    own: Collected,
    structure: StructureVerdict,
    tables: list[tuple[list[int], bytes]],
    cache: StructureCache,
    buffer_bytes: int,
) -> tuple[MergedTable, SavePlan] | Exception:
    """Return what this rank does, or an error. Order: never raised between rounds; the others would wait for us."""
    try:
        merged = settle(cache, structure, own.table, tables, None, comm.world_size)
        naming = _naming(own, merged)
        layout = cache.plans.layout(merged, naming, request.max_file_bytes)
        frozen = _frozen_files(layout, own, structure.late)
        plan = cache.plans.plan(merged, naming, request.max_file_bytes, comm.rank, buffer_bytes, frozen)
    except Exception as error:  # noqa: BLE001 - see above
        return error
    return merged, plan


def _frozen_files(layout: Layout, own: Collected, late: Collection[str]) -> frozenset[int]:
    """Return the files that are checksummed where they are, and written only where no earlier file has their bytes."""
    return frozenset(
        number
        for number, file in enumerate(layout.files)
        if file.part in own.frozen or (file.is_still and file.part in late)
    )


def _parts_of_still(request: SaveRequest, own: Collected, table: Table) -> tuple[list[str], list[str]]:
    """Return the parts of which what is still may be read at the end of a save, and those of which it may not.

    What is still may be changed all the same, by what is no optimizer (averages of weights, a router's bias). Where the
    training goes on meanwhile, only what lies under adapters may wait.
    """
    still = {fact.part for fact in table.facts if fact.is_still}
    late = still & own.under_adapters if request.in_background else still
    return sorted(late), sorted(still - late)


def plan_again(
    request: SaveRequest,
    cache: StructureCache,
    agreed: AgreedSave,
    frozen: frozenset[int],
    rank: int,
    buffer_bytes: int,
) -> SavePlan:
    """Return what this rank does where more files are frozen; raises what planning raised."""
    naming = _naming(agreed.own, agreed.table)
    return cache.plans.plan(agreed.table, naming, request.max_file_bytes, rank, buffer_bytes, frozen)


def open_save(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    agreed: AgreedSave,
    coordinator: CoordinatorState,
    listener: Listener,
) -> OpenSave:
    """Open the attempt.

    Args:
        store: the root.
        comm: the ranks.
        request: what to save.
        agreed: the structure.
        coordinator: filled on the coordinator; whoever calls abandons its attempt if anything fails later.
        listener: told what is found in the root.

    Raises:
        UsageError: documents differ between ranks that must not.
        RootBusyError: another living run owns the root.
        PeerError: a rank failed.

    Collective:
        All ranks: one round.
    """

    def contribute() -> _Contribution:
        agreed.plan  # noqa: B018 - raises what planning raised
        return _Contribution(agreed.documents if comm.rank in agreed.document_senders else None)

    opened = agree(
        comm,
        "save: open",
        contribute,
        _Contribution,
        lambda ballots: _open(store, comm, request, agreed, ballots, coordinator, listener),
        _Opened,
    )
    return OpenSave(
        opened.key,
        opened.attempt_id,
        opened.merged,
        opened.layout,
        opened.gathers_small,
        opened.one_writer,
        frozenset(opened.linked),
    )


def _own_documents(request: SaveRequest, collected: Collected) -> Documents:
    optimizers = {part: encode_document(value) for part, value in collected.optimizer_documents.items()}
    return Documents({**collected.documents, **request.documents}, optimizers)


def _agreed_facts(request: SaveRequest, collected: Collected) -> str:
    run = request.run
    headers = {
        part: digest_of(msgspec.json.encode(naming.metadata)).hex()
        for part, naming in collected.naming.items()
        if naming.metadata
    }
    position = f"epoch {run.epoch}, step {run.step}, sample {run.sample_start_index}" if run else "no position"
    # Metrics may legitimately differ (a rank's own loss): the coordinator's are stored.
    frozen = f", frozen {sorted(collected.frozen)}" if collected.frozen else ""
    what = f"{request.name}: {position}, roles {list(request.roles)}, headers {headers}{frozen}"
    return f"{what}, replicas {request.check_replicas}"


def _structure(ballots: Sequence[StructureBallot], cache: StructureCache) -> StructureVerdict:
    positions = {ballot.facts: rank for rank, ballot in reversed(list(enumerate(ballots)))}
    if len(positions) > 1:
        text = "the ranks asked for different saves: " + "; ".join(
            f"rank {rank}: {facts}" for facts, rank in sorted(positions.items(), key=lambda item: item[1])
        )
        raise UsageError(text)
    return decide_structure(ballots, cache)


def _open(
    store: Store,
    comm: Comm,
    request: SaveRequest,
    agreed: AgreedSave,
    sent: Sequence[_Contribution],
    coordinator: CoordinatorState,
    listener: Listener,
) -> _Opened:
    own, merged, layout = agreed.own, agreed.table, agreed.plan.layout
    coordinator.documents = _merge_documents([one.documents for one in sent if one.documents is not None])
    coordinator.documents |= own.coordinator_documents
    for part, naming in own.naming.items():
        if not naming.single and any(file.part == part for file in layout.files):
            coordinator.documents[join(part, naming.index_name)] = index_document(layout, part)
    if coordinator.owner is None:
        coordinator.owner = acquire_root(store, listener=listener)
    if agreed.plan.frozen_files or any(file.is_still for file in layout.files):
        coordinator.last = last_checkpoint(store)
    crcs, asked = coordinator.frozen_crcs, agreed.plan.frozen_files - agreed.unchanged
    found = find_linkable(coordinator.last, merged, layout, asked, crcs, request.name, listener)
    # What was found then is there still, unless it was pruned; a checkpoint that was committed since may have it too.
    found |= coordinator.unchanged
    found |= find_linkable(coordinator.last, merged, layout, agreed.unchanged, crcs, request.name, lambda _: None)
    directories = {path.rpartition("/")[0] for path in (*coordinator.documents, *own.rank_documents)} - {""}
    coordinator.attempt = Attempt.open(
        store,
        coordinator.owner,
        request.name,
        files={file.path: file.layout for file in layout.files},
        directories=directories,
        links={layout.files[number].path: source.key for number, source in found.items()},
        replace_file=request.as_file,
    )
    made = coordinator.attempt.linked
    coordinator.linked = {n: source.linked for n, source in found.items() if layout.files[n].path in made}
    coordinator.merged, coordinator.layout = merged, layout
    sharing = store.shared_files
    one_writer = comm.world_size > 1 and (sharing == "never" or (sharing == "one_host" and not agreed.one_host))
    attempt = coordinator.attempt
    return _Opened(
        attempt.key,
        attempt.attempt_id,
        merged.digest,
        layout.digest,
        bool(agreed.plan.gathered),
        one_writer,
        sorted(coordinator.linked),
    )


def _naming(own: Collected, merged: MergedTable) -> dict[str, PartNaming]:
    filled = {entry.part for entry in merged.entries}
    return {part: naming for part, naming in own.naming.items() if naming.single or part in filled}


def _merge_documents(sent: Sequence[Documents]) -> dict[str, bytes]:
    merged: dict[str, bytes] = {}
    for documents in sent:
        for path, data in documents.shared.items():
            if merged.setdefault(path, data) != data:
                text = f"{path} differs between ranks: it must be the same on all of them"
                raise UsageError(text)
    for part in sorted({part for documents in sent for part in documents.optimizers}):
        encoded = list(dict.fromkeys(d.optimizers[part] for d in sent if part in d.optimizers))
        if len(encoded) > 1:
            decoded = [decode_document(document, part) for document in encoded]
            encoded = [encode_document(merge_optimizer_documents(decoded, part))]
        merged[join(part, GROUPS_NAME)] = encoded[0]
    return merged
