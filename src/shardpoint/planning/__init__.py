"""What is decided before any byte moves: the merged table of facts, the files, the owners, and how a target matches."""

from shardpoint.planning.allowances import Allowances
from shardpoint.planning.chunks import Chunk, Extent, Piece, plan_chunks
from shardpoint.planning.documents import merge_optimizer_documents
from shardpoint.planning.facts import (
    Entry,
    Holding,
    MergedTable,
    Table,
    TensorFact,
    decode_table,
    decode_tables,
    encode_table,
    merge_tables,
)
from shardpoint.planning.files import Layout, PartNaming, PlacedTensor, PlannedFile, index_document, plan_files
from shardpoint.planning.matching import Match, match_target
from shardpoint.planning.ownership import WriteItem, held_runs, is_held_alone, owned_items
from shardpoint.planning.reads import PIECE_BYTES, Read, ReadPlan, Wanted, plan_reads, wanted_runs
from shardpoint.planning.replicas import MIN_WINDOW_BYTES, ReplicaGroup, compared_window, replica_groups, turn_of
from shardpoint.planning.small import (
    RUN_FIELDS,
    RunTable,
    gathered_entries,
    split_items,
    tabulate_runs,
    whole_items,
)

__all__ = [
    "MIN_WINDOW_BYTES",
    "PIECE_BYTES",
    "RUN_FIELDS",
    "Allowances",
    "Chunk",
    "Entry",
    "Extent",
    "Holding",
    "Layout",
    "Match",
    "MergedTable",
    "PartNaming",
    "Piece",
    "PlacedTensor",
    "PlannedFile",
    "Read",
    "ReadPlan",
    "ReplicaGroup",
    "RunTable",
    "Table",
    "TensorFact",
    "Wanted",
    "WriteItem",
    "compared_window",
    "decode_table",
    "decode_tables",
    "encode_table",
    "gathered_entries",
    "held_runs",
    "index_document",
    "is_held_alone",
    "match_target",
    "merge_optimizer_documents",
    "merge_tables",
    "owned_items",
    "plan_chunks",
    "plan_files",
    "plan_reads",
    "replica_groups",
    "split_items",
    "tabulate_runs",
    "turn_of",
    "wanted_runs",
    "whole_items",
]
