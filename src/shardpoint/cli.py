"""What the command line offers: list, show, verify, pin, unpin, audit, without torch; export and import, which load it.

Exit codes are those of the error classes: 0 all is well, 2 usage, 10 not found, 12 never committed, 20 corrupt, and so
on. `--json` prints one JSON object whose fields are stable: they are listed in docs/reference/cli.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from msgspec import to_builtins

from shardpoint.errors import CheckpointError, CorruptionError, UnsupportedFormatError, UsageError

if TYPE_CHECKING:
    from shardpoint.catalog import Report

app = typer.Typer(
    name="shardpoint",
    help="Look at checkpoints that Shardpoint saved, and turn them into other formats and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_json(value: Any) -> None:
    # Escaped: a terminal's encoding may lack a character, and a path may not even be text.
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _visible(text: str, *, err: bool = False) -> str:
    """Return a text without what a terminal would obey or cannot show: a stranger's checkpoint may hold any name."""
    plain = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    return plain.encode(encoding, errors="backslashreplace").decode(encoding)


def _echo(text: str, *, err: bool = False) -> None:
    typer.echo(_visible(text, err=err), err=err)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004 - decimal units
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _summary(item: Any, *, is_pinned: bool) -> dict[str, Any]:
    manifest = item.manifest
    if manifest is None:
        return {"name": item.name, "problem": str(item.problem)}
    return {
        "name": item.name,
        "epoch": manifest.epoch,
        "step": manifest.step,
        "sample_start_index": manifest.sample_start_index,
        "sequence": manifest.commit_sequence,
        "checkpoint_id": manifest.checkpoint_id,
        "created_utc": manifest.created_utc,
        "world_size": manifest.world_size,
        "roles": manifest.roles,
        "num_bytes": manifest.total_bytes,
        "num_files": len(manifest.files),
        "num_tensors": len(manifest.tensors),
        "metrics": manifest.metrics,
        "library": manifest.library,
        "format": f"{manifest.version[0]}.{manifest.version[1]}",
        "suspect": None if manifest.suspect is None else to_builtins(manifest.suspect),
        "pinned": is_pinned,
    }


@app.command("ls")
def list_command(
    root: Annotated[Path, typer.Argument(help="A directory of checkpoints.")], as_json: AsJson = False
) -> None:
    """List the committed checkpoints of ROOT, the last committed last."""
    from shardpoint.catalog import list_root
    from shardpoint.commit import pinned_names
    from shardpoint.storage import LocalStore

    listed = list_root(root)
    pinned = pinned_names(LocalStore(root))
    found = [_summary(item, is_pinned=item.name in pinned) for item in listed]
    if as_json:
        _print_json({"root": str(root), "checkpoints": found})
        return
    if not found:
        _echo(f"{root} has no committed checkpoint")
        return
    intact = [item for item in found if "problem" not in item]
    if intact:
        _print_table(intact)
    for item in found:
        if item.get("pinned"):
            _echo(f"{item['name']}: pinned")
        if "problem" in item:
            _echo(f"{item['name']}: {item['problem']}")


def _print_table(items: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    notes = ["note"] if any(item["suspect"] for item in items) else []
    table = Table(box=None, pad_edge=False)
    first = ("checkpoint", "epoch", "step", "samples", "size", "ranks", "committed (UTC)", "sequence")
    for heading in (*first, *notes):
        left = heading in ("checkpoint", "committed (UTC)", "note")
        # A column that does not fit is broken over lines, never cut.
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for item in items:
        position = [str(item[key]) if item[key] is not None else "-" for key in ("epoch", "step", "sample_start_index")]
        table.add_row(
            escape(_visible(item["name"])),
            *position,
            _size(item["num_bytes"]),
            str(item["world_size"]),
            escape(_visible(item["created_utc"])),
            str(item["sequence"]),
            *("suspect" if item["suspect"] else "" for _ in notes),
        )
    # Without a terminal there is no width to fit into: one line for each checkpoint, for whatever reads it.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(table)


@app.command("show")
def show_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's directory.")],
    as_json: AsJson = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
) -> None:
    """Show what CHECKPOINT holds, from its manifest; bytes are not read (see verify)."""
    from shardpoint.catalog import open_path
    from shardpoint.commit import is_pinned

    store, item = open_path(checkpoint)
    manifest = item.manifest
    if manifest is None:
        assert item.problem is not None  # noqa: S101 - one or the other
        raise item.problem
    summary = _summary(item, is_pinned=is_pinned(store, item.name))
    if as_json:
        summary["files"] = [
            {"path": entry.path, "size_bytes": entry.size_bytes, "crc64nvme": entry.crc64nvme}
            for entry in manifest.files
        ]
        summary["tensors"] = [
            {
                "part": entry.part,
                "fqn": entry.fqn,
                "state": entry.state,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "file": manifest.files[entry.file].path,
                "byte_offset": entry.byte_offset,
                "num_bytes": entry.num_bytes,
                "crc64nvme": entry.crc64nvme,
            }
            for entry in manifest.tensors
        ]
        _print_json(summary)
        return
    summary["suspect"] = "no" if manifest.suspect is None else f"{manifest.suspect.num_findings} findings"
    width = max(len(name) for name in summary)
    for name, value in summary.items():
        shown = f"{_size(value)} ({value} bytes)" if name == "num_bytes" else value
        _echo(f"{name.ljust(width)}  {shown}")
    for finding in manifest.suspect.findings if manifest.suspect is not None else []:
        _echo(f"  {finding}")
    _echo("files")
    for entry in manifest.files:
        _echo(f"  {entry.crc64nvme}  {_size(entry.size_bytes):>9}  {entry.path}")
    if tensors:
        _echo("tensors")
        for tensor in manifest.tensors:
            state = f" [{tensor.state}]" if tensor.state is not None else ""
            _echo(f"  {tensor.crc64nvme}  {tensor.dtype:>5} {list(tensor.shape)}  {tensor.part}: {tensor.fqn}{state}")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a directory of them.")], as_json: AsJson = False
) -> None:
    """Read every byte of a checkpoint, or of all of a root, and compare it with what was committed."""
    from shardpoint.catalog import is_root, open_path, verify, verify_root
    from shardpoint.storage import LocalStore

    reports = verify_root(LocalStore(path)) if is_root(path) else [verify(*open_path(path))]
    damaged = [report for report in reports if not report.ok]
    if as_json:
        checkpoints = [
            {
                "name": report.name,
                "ok": report.ok,
                "num_bytes": report.num_bytes,
                "num_files": report.num_files,
                "num_tensors": report.num_tensors,
                "problems": [
                    {"key": problem.key, "kind": problem.kind, "message": problem.message}
                    for problem in report.problems
                ],
            }
            for report in reports
        ]
        _print_json({"ok": not damaged, "checkpoints": checkpoints})
    else:
        for report in reports:
            counts = f"{report.num_files} files, {report.num_tensors} tensors, {_size(report.num_bytes)}"
            _echo(f"{_verdict(report):7}  {report.name}: {counts}")
            for problem in report.problems:
                _echo(f"         {problem.message}")
        if not reports:
            _echo(f"{path} has no committed checkpoint")
    if any(_verdict(report) == "CORRUPT" for report in damaged):
        raise typer.Exit(CorruptionError.exit_code)
    if damaged:
        raise typer.Exit(UnsupportedFormatError.exit_code)


@app.command("audit")
def audit_command(
    root: Annotated[Path, typer.Argument(help="A directory of checkpoints whose run wrote a journal.")],
    against: Annotated[Path | None, typer.Option(help="Another root, whose run should have done the same.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the steps that a run did more than once, and name the first thing that differs."""
    from shardpoint.audit import audit_root
    from shardpoint.storage import LocalStore

    report = audit_root(LocalStore(root), None if against is None else LocalStore(against))
    if as_json:
        _print_json({"root": str(root), **report.as_json()})
    else:
        for line in report.lines():
            _echo(line)
    if not report.ok:
        raise typer.Exit(1)


@app.command("pin")
def pin_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's directory.")], as_json: AsJson = False
) -> None:
    """Keep CHECKPOINT from being pruned, whatever the policies of a run say."""
    _set_pin(checkpoint, is_pinned=True, as_json=as_json)


@app.command("unpin")
def unpin_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's directory.")], as_json: AsJson = False
) -> None:
    """Let CHECKPOINT be pruned again."""
    _set_pin(checkpoint, is_pinned=False, as_json=as_json)


def _set_pin(checkpoint: Path, *, is_pinned: bool, as_json: bool) -> None:
    from shardpoint.catalog import set_pin

    name = set_pin(checkpoint, is_pinned=is_pinned)
    if as_json:
        _print_json({"name": name, "pinned": is_pinned})
    else:
        _echo(f"{name} is {'pinned: no run prunes it' if is_pinned else 'not pinned any more'}")


Tied = Annotated[
    list[str] | None,
    typer.Option("--tied", help="NAME=STORED: NAME is a tied tensor, stored as STORED; may be given several times."),
]
ModelKey = Annotated[str, typer.Option(help="The key of the model in the dict; '' for its tensors at the top.")]
OptimizerKey = Annotated[str, typer.Option(help="The key of the optimizer in the dict.")]


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's directory.")],
    directory: Annotated[Path, typer.Argument(help="The new directory.")],
    to: Annotated[Literal["dcp"], typer.Option(help="The format.")],
    role: Annotated[str | None, typer.Option(help="Which role, where there are several.")] = None,
    without_optimizer: Annotated[bool, typer.Option("--without-optimizer", help="Leave the optimizer out.")] = False,
    flatten_optimizer: Annotated[
        bool, typer.Option("--flatten-optimizer", help="As flatten_optimizer_state_dict=True has param groups.")
    ] = False,
    model_key: ModelKey = "model",
    optimizer_key: OptimizerKey = "optimizer",
    tied: Tied = None,
    as_json: AsJson = False,
) -> None:
    """Write one role of CHECKPOINT as a checkpoint of PyTorch's DCP to DIRECTORY, comparing every checksum."""
    from shardpoint.integrations.dcp import Keys, export_dcp

    result = export_dcp(
        checkpoint,
        directory,
        role=role,
        optimizer=not without_optimizer,
        flatten_optimizer=flatten_optimizer,
        keys=Keys(model_key, optimizer_key),
        tied=_pairs(tied),
    )
    if as_json:
        _print_json({"to": to, "path": result.path, "num_tensors": result.num_tensors, "num_bytes": result.num_bytes})
    else:
        _echo(f"exported {result.num_tensors} tensors, {_size(result.num_bytes)}, to {result.path}")


@app.command("import")
def import_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint of the other format.")],
    root: Annotated[Path, typer.Argument(help="The directory of checkpoints that gets it.")],
    from_: Annotated[Literal["dcp"], typer.Option("--from", help="The format.")],
    epoch: Annotated[int, typer.Option(help="The epoch that the run was in.")],
    step: Annotated[int, typer.Option(help="Steps done.")],
    batch_size: Annotated[int, typer.Option(help="Samples of a step, over all ranks.")],
    optimizer_class: Annotated[
        str | None, typer.Option(help="The optimizer's class, which DCP does not record: AdamW.")
    ] = None,
    without_optimizer: Annotated[bool, typer.Option("--without-optimizer", help="Leave the optimizer out.")] = False,
    role: Annotated[str, typer.Option(help="The role that the model gets.")] = "",
    model_key: ModelKey = "model",
    optimizer_key: OptimizerKey = "optimizer",
    tied: Tied = None,
    model_files: Annotated[
        Path | None, typer.Option(help="A model directory whose config and tokenizer go beside the weights.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a committed checkpoint in ROOT of DIRECTORY, a checkpoint of PyTorch's DCP."""
    from shardpoint.integrations.dcp import Keys, import_dcp

    if (optimizer_class is None) != without_optimizer:
        raise UsageError("give either --optimizer-class, or --without-optimizer to leave the optimizer out")
    result = import_dcp(
        directory,
        root,
        epoch=epoch,
        step=step,
        batch_size=batch_size,
        optimizer_class=optimizer_class,
        role=role,
        keys=Keys(model_key, optimizer_key),
        tied=_pairs(tied),
        model_files=model_files,
    )
    if as_json:
        fields = {"num_tensors": result.num_tensors, "num_bytes": result.num_bytes}
        _print_json({"from": from_, "path": result.path, "checkpoint_id": result.checkpoint_id, **fields})
    else:
        _echo(f"imported {result.num_tensors} tensors, {_size(result.num_bytes)}, as {result.path}")


def _pairs(tied: list[str] | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in tied or []]
    wrong = [alias + sign + name for alias, sign, name in pairs if not alias or not name]
    if wrong:
        raise UsageError(f"--tied {wrong[0]}: give NAME=STORED")
    return {alias: name for alias, _, name in pairs}


def _verdict(report: Report) -> str:
    if report.ok:
        return "ok"
    return "UNKNOWN" if all(problem.kind == "format" for problem in report.problems) else "CORRUPT"


def main() -> None:
    """Run the command line: `shardpoint ls|show|verify|pin|unpin|audit|export|import`."""
    try:
        app()
    except CheckpointError as error:
        if "--json" in sys.argv:
            _print_json({"error": type(error).__name__, "message": str(error), **error.details()})
        else:
            _echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(error.exit_code) from error
