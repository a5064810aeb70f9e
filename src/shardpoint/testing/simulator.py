"""Plans, votes and checkpoints of jobs that are too large to start: any number of virtual ranks in one process.

The code that runs is that of a save: tables are encoded, decoded and merged, files laid out, bytes dealt out, partial
checksums merged up the tree and judged; and `Simulation.write` really saves, with one thread for each rank.

Not modelled: time (threads and a loop are no cluster), the network and its store, the memory of real ranks, failures,
optimizer documents and random states; nor whether torch would cut tensors as the description says, which a save checks
on every rank against the real local tensors. Votes of `Simulation.vote` without contents are those of tensors of zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardpoint.checksum import Partial, WholeTensors, crc64, merge_packed, pack_partials, whole_tensors, zeros
from shardpoint.comm import Comm, in_process_comms
from shardpoint.comm.tree import FANOUT, Tree
from shardpoint.errors import UsageError
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import (
    Entry,
    Layout,
    MergedTable,
    PartNaming,
    Table,
    TensorFact,
    WriteItem,
    decode_tables,
    encode_table,
    merge_tables,
    owned_items,
    plan_files,
)

if TYPE_CHECKING:
    from shardpoint.engine import SaveResult
    from shardpoint.storage import Store

Contents = Mapping[tuple[str, str], npt.NDArray[Any]]
"""(part, key) -> the whole tensor."""

_BUDGET_BYTES = 4 * 2**20  # of each virtual rank, in a simulation that writes
_PACKED_INDEX = np.dtype([("index", "<u4"), ("sums", "V40")])  # as `pack_partials` packs: an index, and 40 more bytes


@dataclass(frozen=True, slots=True)
class VirtualTensor:
    """A tensor, and which ranks hold it how.

    Attributes:
        part: the directory that it belongs to.
        fqn: its name in the model.
        dtype: logical dtype name (`"BF16"`).
        shape: global shape.
        meshes: one, or several side by side, each of which has all of it (the data-parallel meshes of the ranks of a
            tensor-parallel group); a mesh need not have all ranks (a pipeline stage).
        placements: one per mesh axis; empty for a plain tensor, which is held whole by the ranks of its meshes.
        state: an optimizer state's name, or None for weights.
    """

    part: str
    fqn: str
    dtype: str
    shape: tuple[int, ...]
    meshes: tuple[Mesh, ...]
    placements: tuple[Placement, ...] = ()
    state: str | None = None

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.fqn if self.state is None else f"{self.fqn}.{self.state}"


class Simulation:
    """A job of virtual ranks.

    Args:
        tensors: what there is, in the order of the model.
        world_size: how many ranks there are.
        max_file_bytes: the largest tensor file.

    Raises:
        UsageError: the description is not one of a world: a rank is in two of a tensor's meshes, or beyond the world.
    """

    def __init__(self, tensors: Sequence[VirtualTensor], world_size: int, *, max_file_bytes: int = 4 * 2**30) -> None:
        self.tensors = tuple(tensors)
        self.world_size = world_size
        self.max_file_bytes = max_file_bytes
        parts = dict.fromkeys(tensor.part for tensor in self.tensors)
        self.naming = {part: PartNaming("optimizer" if part.endswith("optimizer") else "model") for part in parts}

    @cached_property
    def tables(self) -> list[tuple[list[int], Table]]:
        """Each kind of table, with the ranks whose table it is."""
        layouts = list(dict.fromkeys(tensor.meshes for tensor in self.tensors))
        kinds: dict[tuple[Mesh | None, ...], list[int]] = {}
        mesh_of = [_mesh_of_rank(meshes, self.world_size) for meshes in layouts]
        for rank in range(self.world_size):
            kinds.setdefault(tuple(known.get(rank) for known in mesh_of), []).append(rank)
        return [(ranks, self._table(dict(zip(layouts, chosen, strict=True)))) for chosen, ranks in kinds.items()]

    def _table(self, chosen: Mapping[tuple[Mesh, ...], Mesh | None]) -> Table:
        """Return the table of the ranks that are in the given one of each tensor's meshes."""
        meshes: dict[Mesh, int] = {}
        facts: list[TensorFact] = []
        for tensor in self.tensors:
            mesh = chosen[tensor.meshes]
            if mesh is None:
                continue
            index = meshes.setdefault(mesh, len(meshes)) if tensor.placements else None
            facts.append(
                TensorFact(
                    tensor.part,
                    tensor.fqn,
                    tensor.state,
                    tensor.key,
                    tensor.dtype,
                    tensor.shape,
                    index,
                    tensor.placements,
                )
            )
        return Table(tuple(meshes), tuple(facts))

    @cached_property
    def merged(self) -> MergedTable:
        """The merged table, from the encoded tables."""
        tables = decode_tables([encode_table(table) for _, table in self.tables])
        return merge_tables(
            [(ranks, table) for (ranks, _), table in zip(self.tables, tables, strict=True)], self.world_size
        )

    @cached_property
    def layout(self) -> Layout:
        """The files, and where each tensor lies."""
        return plan_files(self.merged, self.naming, self.max_file_bytes)

    def items(self, rank: int) -> list[WriteItem]:
        """Return what a virtual rank writes."""
        return owned_items(self.merged, rank)

    @cached_property
    def _kinds(self) -> tuple[MergedTable, npt.NDArray[np.int64], list[int]] | None:
        """One tensor of each kind, the kind of every tensor, and where each kind's tensor is in the merged table.

        Without replicas a rank writes just what it holds, the same of all tensors of one kind: it is enough to look at
        one. None where replicas share, since their cuts go by the place in the concatenation of all tensors.
        """
        number_of: dict[tuple[int, tuple[int, ...], str], int] = {}
        first: list[int] = []
        kinds = np.zeros(len(self.merged.entries), dtype=np.int64)
        for index, entry in enumerate(self.merged.entries):
            if _has_replicas(entry):
                return None
            kind = (id(entry.holdings), entry.shape, entry.dtype)
            kinds[index] = number_of.setdefault(kind, len(first))
            if kinds[index] == len(first):
                first.append(index)
        entries = tuple(self.merged.entries[index] for index in first)
        return MergedTable(entries, self.world_size), kinds, first

    def check_coverage(self) -> None:
        """Check that the ranks together own every byte of every tensor exactly once.

        Raises:
            AssertionError: a byte has no owner, or two; the message names the tensor.
        """
        table = self._kinds[0] if self._kinds else self.merged
        starts: list[list[npt.NDArray[np.int64]]] = [[] for _ in table.entries]
        stops: list[list[npt.NDArray[np.int64]]] = [[] for _ in table.entries]
        for rank in range(self.world_size):
            for item in owned_items(table, rank):
                runs = item.runs(table)
                starts[item.entry].append(runs.byte_offsets)
                stops[item.entry].append(runs.byte_offsets + runs.num_bytes)
        for entry, begins, ends in zip(table.entries, starts, stops, strict=True):
            # Runs cover all exactly once if one starts wherever one stops, but for the beginning and the end.
            first, last = np.array([0]), np.array([entry.num_bytes])
            starting = np.sort(np.concatenate([*begins, last]))
            stopping = np.sort(np.concatenate([first, *ends]))
            if not np.array_equal(starting, stopping):
                text = f"{entry.label}: the ranks do not own each of its {entry.num_bytes} bytes exactly once"
                raise AssertionError(text)

    def vote(self, rank: int, contents: Contents | None = None) -> bytes:
        """Return a virtual rank's packed partial checksums.

        Args:
            rank: which rank.
            contents: the tensors; without them they count as zeros.
        """
        if contents is None and self._kinds is not None:
            table, kinds, _ = self._kinds
            packed = pack_partials(_partials(table, owned_items(table, rank), None))
            rows = np.frombuffer(packed, dtype=_PACKED_INDEX)
            row_of = np.full(len(table.entries), -1)
            row_of[rows["index"]] = np.arange(len(rows))
            owned = np.flatnonzero(row_of[kinds] >= 0)
            vote = rows[row_of[kinds[owned]]]
            vote["index"] = owned
            return bytes(vote.tobytes())
        return pack_partials(_partials(self.merged, self.items(rank), contents))

    def bundles(self, fanout: int = FANOUT, contents: Contents | None = None) -> list[bytes]:
        """Return what the coordinator merges: its own vote, and what came up the tree from each of its children."""
        tree = Tree(self.world_size, fanout)

        def merged(rank: int) -> bytes:
            return merge_packed([self.vote(rank, contents), *(merged(child) for child in tree.children(rank))])

        return [self.vote(0, contents), *(merged(child) for child in tree.children(0))]

    def judge(self, packed: Sequence[bytes]) -> WholeTensors:
        """Return what votes say of the tensors, in the order of the merged table."""
        return whole_tensors(packed, [entry.num_bytes for entry in self.merged.entries])

    def write(self, store: Store, name: str, contents: Contents, *, fanout: int = FANOUT) -> SaveResult:
        """Save a checkpoint, each virtual rank in a thread of its own. This loads torch.

        Args:
            store: the root.
            name: of the checkpoint.
            contents: every tensor, whole, of the numpy dtype that its logical dtype names.
            fanout: of the tree in which the votes travel.

        Raises:
            CheckpointError: as `save` says.
        """
        comms = in_process_comms(self.world_size, fanout=fanout)
        outcomes: list[Any] = [None] * self.world_size

        def run(comm: Comm) -> None:
            try:
                outcomes[comm.rank] = self._save(store, name, contents, comm)
            except BaseException as error:  # noqa: BLE001 - raised below, where somebody hears it
                outcomes[comm.rank] = error

        threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        result: SaveResult = outcomes[0]
        return result

    def _save(self, store: Store, name: str, contents: Contents, comm: Comm) -> SaveResult:
        import torch  # noqa: PLC0415 - a simulation that only plans does without

        from shardpoint.adapters.collect import Collected, Held  # noqa: PLC0415
        from shardpoint.engine import SaveRequest, StructureCache, save  # noqa: PLC0415
        from shardpoint.planning.ownership import held_region  # noqa: PLC0415
        from shardpoint.storage import BufferPool  # noqa: PLC0415

        class _Virtual(Collected):
            """What a rank has whose table is given."""

            @property
            def table(self) -> Table:
                return own

        (own,) = [table for ranks, table in self.tables if comm.rank in ranks]

        def collect() -> Collected:
            collected = _Virtual(comm.rank, naming=dict(self.naming))
            for entry in self.merged.entries:
                region = held_region(entry, comm.rank)
                if region is not None:
                    local = _local(contents[entry.part, entry.key], region.spans)
                    collected.held[entry.part, entry.key] = Held(torch.from_numpy(local), region)
            return collected

        request = SaveRequest(name, collect, max_file_bytes=self.max_file_bytes)
        return save(store, comm, request, StructureCache(), pool=BufferPool(_BUDGET_BYTES))


def _mesh_of_rank(meshes: Sequence[Mesh], world_size: int) -> dict[int, Mesh]:
    known: dict[int, Mesh] = {}
    for mesh in meshes:
        for rank in mesh.ranks:
            if rank in known or not 0 <= rank < world_size:
                text = f"rank {rank} is in two meshes of one tensor, or not in a world of {world_size} ranks"
                raise UsageError(text)
            known[rank] = mesh
    return known


def _has_replicas(entry: Entry) -> bool:
    return any(
        size > 1 and not placement.cuts
        for holding in entry.holdings
        if holding.mesh is not None
        for size, placement in zip(holding.mesh.shape, holding.placements, strict=True)
    )


def _partials(
    table: MergedTable, items: Sequence[WriteItem], contents: Contents | None
) -> Iterator[tuple[int, Partial]]:
    for item in items:
        entry = table.entries[item.entry]
        partial = Partial()
        data = None if contents is None else contents[entry.part, entry.key].tobytes()
        for byte_offset, _, num_bytes in item.runs(table):
            crc = zeros(num_bytes) if data is None else crc64(data[byte_offset : byte_offset + num_bytes])
            partial.add(crc, byte_offset, num_bytes, entry.num_bytes)
        yield item.entry, partial


def _local(whole: npt.NDArray[Any], spans: Sequence[Sequence[tuple[int, int]]]) -> npt.NDArray[Any]:
    """Return a rank's part of a tensor, as memory of its own."""
    for dim, kept in enumerate(spans):
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(start, start + n) for start, n in kept)])
        whole = np.take(whole, chosen, axis=dim)
    return np.array(whole, order="C")


_How = tuple[tuple[Mesh, ...], tuple[Placement, ...]]


def transformer_tensors(
    *,
    num_layers: int,
    hidden: int,
    ffn: int,
    kv_hidden: int,
    vocab: int,
    data_parallel: int,
    tensor_parallel: int,
    dtype: str = "BF16",
    states: Sequence[str] = ("exp_avg", "exp_avg_sq"),
    state_dtype: str = "F32",
) -> list[VirtualTensor]:
    """Describe a decoder under FSDP over tensor parallelism, as torch shards it.

    Rank `d * tensor_parallel + t` is the `d`-th of the data-parallel and the `t`-th of the tensor-parallel ranks.
    Projections that tensor parallelism cuts by columns are `_StridedShard(0), Shard(0)`, those by rows `Shard(0),
    Shard(1)`; norms know only the data-parallel mesh of their tensor-parallel rank, so there are as many kinds of
    tables.

    Args:
        num_layers: how many blocks.
        hidden: the model's width.
        ffn: the width of the feed-forward layers.
        kv_hidden: the width of keys and of values: heads of them times the width of a head.
        vocab: the number of tokens.
        data_parallel: ranks that share each tensor-parallel part.
        tensor_parallel: ranks that share each layer.
        dtype: of the weights.
        states: the optimizer's states of each weight.
        state_dtype: theirs.
    """
    ranks = range(data_parallel * tensor_parallel)
    whole = (Mesh((data_parallel, tensor_parallel), tuple(ranks)),)
    apart = tuple(Mesh((data_parallel,), tuple(ranks[t::tensor_parallel])) for t in range(tensor_parallel))
    columns = (Placement("strided_shard", 0, tensor_parallel), Placement("shard", 0))
    rows = (Placement("shard", 0), Placement("shard", 1))
    norm: _How = (apart, (Placement("shard", 0),))
    layer: list[tuple[str, tuple[int, ...], _How]] = [
        ("self_attn.q_proj", (hidden, hidden), (whole, columns)),
        ("self_attn.k_proj", (kv_hidden, hidden), (whole, columns)),
        ("self_attn.v_proj", (kv_hidden, hidden), (whole, columns)),
        ("self_attn.o_proj", (hidden, hidden), (whole, rows)),
        ("mlp.gate_proj", (ffn, hidden), (whole, columns)),
        ("mlp.up_proj", (ffn, hidden), (whole, columns)),
        ("mlp.down_proj", (hidden, ffn), (whole, rows)),
        ("input_layernorm", (hidden,), norm),
        ("post_attention_layernorm", (hidden,), norm),
    ]
    named: list[tuple[str, tuple[int, ...], _How]] = [("model.embed_tokens", (vocab, hidden), (whole, columns))]
    named += [(f"model.layers.{n}.{name}", shape, how) for n in range(num_layers) for name, shape, how in layer]
    named += [("model.norm", (hidden,), norm), ("lm_head", (vocab, hidden), (whole, columns))]
    weights = [VirtualTensor("modeling", f"{name}.weight", dtype, shape, *how) for name, shape, how in named]
    return weights + [
        VirtualTensor("optimizer", f"{name}.weight", state_dtype, shape, *how, state)
        for name, shape, how in named
        for state in states
    ]


def llama3_405b(
    *, num_layers: int = 126, data_parallel: int = 2048, tensor_parallel: int = 8, max_file_bytes: int = 4 * 2**30
) -> Simulation:
    """Return a job that trains Llama-3-405B with AdamW: 3,411 tensors on 16,384 ranks, unless told otherwise."""
    tensors = transformer_tensors(
        num_layers=num_layers,
        hidden=16_384,
        ffn=53_248,
        kv_hidden=1_024,
        vocab=128_256,
        data_parallel=data_parallel,
        tensor_parallel=tensor_parallel,
    )
    return Simulation(tensors, data_parallel * tensor_parallel, max_file_bytes=max_file_bytes)
