"""How a target compares with a checkpoint, decided before any byte of the target changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shardpoint.errors import MismatchError
from shardpoint.manifest import Manifest
from shardpoint.planning.facts import MergedTable


@dataclass(frozen=True, slots=True)
class Match:
    """Which stored tensor fills which entry of the target.

    Attributes:
        stored: for each entry of the target's merged table, the index into the manifest's tensors; None where the
            target has a tensor that the checkpoint lacks and the caller allowed that.
        missing: names that were left as they are.
        unexpected: names of the checkpoint that were not used.
    """

    stored: tuple[int | None, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def match_target(
    target: MergedTable,
    manifest: Manifest,
    parts: Collection[str],
    *,
    problems: Collection[str] = (),
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    strict: bool = True,
) -> Match:
    """Match every tensor of a target by part, name and state.

    Args:
        target: the target's merged table.
        manifest: the checkpoint.
        parts: the parts that are loaded; tensors of others are not looked at.
        problems: mismatches found elsewhere (param groups), reported together with those found here.
        missing: what else the target has and the checkpoint lacks (a scheduler), found elsewhere.
        unexpected: what else the checkpoint has and the target lacks, found elsewhere.
        strict: False allows missing and unexpected names; shapes and dtypes must always agree.

    Raises:
        MismatchError: lists everything that differs.
    """
    stored = {(t.part, t.fqn, t.state): index for index, t in enumerate(manifest.tensors) if t.part in parts}
    found: list[int | None] = []
    lacking = list(missing)
    mismatched = list(problems)
    for entry in target.entries:
        index = stored.pop((entry.part, entry.fqn, entry.state), None)
        found.append(index)
        if index is None:
            lacking.append(entry.label)
            continue
        tensor = manifest.tensors[index]
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            stored_kind, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{entry.dtype} {list(entry.shape)}"
            mismatched.append(f"{entry.label}: stored {stored_kind}, the target wants {wanted}")
    unused = list(unexpected)
    unused += [f"{part}: {fqn}" + (f" [{state}]" if state is not None else "") for part, fqn, state in stored]
    if mismatched or (strict and (lacking or unused)):
        raise MismatchError(
            _describe(manifest.name, lacking, unused, mismatched),
            missing=lacking,
            unexpected=unused,
            mismatched=mismatched,
        )
    return Match(tuple(found), tuple(lacking), tuple(unused))


def _describe(name: str, missing: list[str], unexpected: list[str], mismatched: list[str]) -> str:
    lines = [f"checkpoint {name} does not fit the target; nothing was changed:"]
    for title, names in (
        ("the target has, the checkpoint lacks", missing),
        ("the checkpoint has, the target lacks", unexpected),
        ("differ", mismatched),
    ):
        if names:
            lines.append(f"  {title} ({len(names)}):")
            lines += [f"    {text}" for text in names[:20]]
            if len(names) > 20:  # noqa: PLR2004 - the error's attributes have them all
                lines.append(f"    ... and {len(names) - 20} more (all are in the error's attributes)")
    lines.append("  build the same model and optimizer, or load only the parts that fit")
    return "\n".join(lines)
