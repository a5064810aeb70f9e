"""What does it cost to save and to load, here, beside the raw limits of the machine and beside others?

Starts the ranks, runs the cases, and writes a report in JSON and in Markdown. `make bench` sets everything up and runs
all of it; `benchmarks/README.md` says what each case measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPO)  # in place of this directory, so that `benchmarks` is imported as what it is everywhere else

from benchmarks import machine, report  # noqa: E402 - after the path is right
from benchmarks.stage import Options  # noqa: E402 - as above
from benchmarks.targets import judge  # noqa: E402 - as above

CASES = {
    "save": "save",
    "load": "load",
    "async": "async_save",
    "step": "step_time",
    "slice": "slice",
    "memory": "memory",
    "small": "small_tensors",
    "planning": "plans",
}
_FREE_CHECKPOINTS = 8  # the warm load keeps one of each contender


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(CASES), help="cases to run, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--size-gb", type=float, default=2.0, help="float32 weights and Adam moments, over both ranks")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each case, after a warm-up round")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--name", default=None, help="the report's file name (default: the date)")
    parser.add_argument("--scratch", type=Path, default=REPO / "benchmarks" / "scratch", help="written to, and emptied")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def main() -> None:
    """Run the cases, and write the report after each of them."""
    arguments = parse_arguments()
    scratch: Path = arguments.scratch.resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    needed = _FREE_CHECKPOINTS * arguments.size_gb * 1e9
    if shutil.disk_usage(scratch).free < needed:
        raise SystemExit(
            f"{scratch} needs {needed / 1e9:.0f} GB of free space for checkpoints of {arguments.size_gb} GB"
        )
    pythons = {"main": Path(sys.executable), "colossalai": REPO / ".venv-colossalai" / "bin" / "python"}
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:7.1f} s] {text}", flush=True)

    options = Options(arguments.size_gb, arguments.rounds, scratch, pythons, say)
    facts: dict[str, object] = {
        "date": machine.today(),
        "commit": machine.commit(),
        "machine": machine.machine(scratch),
        "options": {"size": f"{arguments.size_gb} GB", "rounds": str(arguments.rounds), "ranks": "2, one thread each"},
        "versions": machine.versions(pythons),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / (arguments.name or time.strftime("%Y-%m-%d", time.gmtime()))
    tables: list[report.Table] = []
    for case, module in CASES.items():
        if case in arguments.only.split(","):
            tables += importlib.import_module(f"benchmarks.cases.{module}").run(options)
            write(stem, tables, facts)
    say(f"wrote {stem}.json and {stem}.md")


def write(stem: Path, tables: list[report.Table], facts: dict[str, object]) -> None:
    """Write both reports."""
    targets = judge({table.name: table for table in tables})
    text = json.dumps(report.as_json(tables, facts, targets), indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(report.as_markdown(tables, facts, targets), encoding="utf-8")


if __name__ == "__main__":
    main()
