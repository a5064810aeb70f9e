"""What is decided before any byte moves: the merged table of facts, the files, the owners, and how a target matches."""

from shardpoint.planning.documents import merge_optimizer_documents
from shardpoint.planning.facts import (
    Entry,
    Holding,
    MergedTable,
    Table,
    TensorFact,
    decode_table,
    encode_table,
    merge_tables,
)
from shardpoint.planning.files import Layout, PartNaming, PlacedTensor, PlannedFile, index_document, plan_files
from shardpoint.planning.matching import Match, match_target
from shardpoint.planning.ownership import WriteItem, held_runs, owned_items
from shardpoint.planning.reads import PIECE_BYTES, Read, ReadPlan, Wanted, plan_reads, wanted_runs

__all__ = [
    "PIECE_BYTES",
    "Entry",
    "Holding",
    "Layout",
    "Match",
    "MergedTable",
    "PartNaming",
    "PlacedTensor",
    "PlannedFile",
    "Read",
    "ReadPlan",
    "Table",
    "TensorFact",
    "Wanted",
    "WriteItem",
    "decode_table",
    "encode_table",
    "held_runs",
    "index_document",
    "match_target",
    "merge_optimizer_documents",
    "merge_tables",
    "owned_items",
    "plan_files",
    "plan_reads",
    "wanted_runs",
]
