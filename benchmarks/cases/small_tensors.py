"""How long do a save and a load of 10,000 tensors of 1 KB take?"""

from __future__ import annotations

from benchmarks.cases.load import load_table
from benchmarks.cases.save import save_table
from benchmarks.report import Table
from benchmarks.stage import Options, Stage

NAMES = ("shardpoint", "dcp_1", "dcp_2")
NUM_TENSORS = 10_000


def run(options: Options) -> list[Table]:
    """Measure saves and warm loads, under FSDP2 and under DDP."""
    tables = []
    for plugin, title in (("fsdp", "FSDP2"), ("ddp", "DDP")):
        arguments = {"plugin": plugin, "num_tensors": NUM_TENSORS}
        with Stage(options, f"many_{plugin}_save", "benchmarks.subject:build_many", **arguments) as stage:
            tables.append(
                save_table(
                    stage, f"many_{plugin}_save", f"Durable save of {NUM_TENSORS:,} tensors of 1 KB, {title}", NAMES
                )
            )
            tables[-1].reference, tables[-1].num_bytes = "dcp_1", None
        case = f"many_{plugin}_load"
        with Stage(options, case, "benchmarks.subject:build_many", **arguments) as stage:
            table = load_table(stage, case, f"Warm load of {NUM_TENSORS:,} tensors of 1 KB, {title}", NAMES, cold=False)
            table.reference, table.num_bytes = "dcp_1", None
            tables.append(table)
    return tables
