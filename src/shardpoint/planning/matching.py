"""How a target compares with a checkpoint, decided before any byte of the target changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from shardpoint.errors import MismatchError
from shardpoint.manifest import Manifest
from shardpoint.planning.allowances import Allowances
from shardpoint.planning.facts import MergedTable

_NOTHING = Allowances()


@dataclass(frozen=True, slots=True)
class Match:
    """Which stored tensor fills which entry of the target.

    Attributes:
        stored: for each entry of the target's merged table, the index into the manifest's tensors; None where the
            target has a tensor that the checkpoint lacks and the caller allowed that.
        missing: names that were left as they are.
        unexpected: names of the checkpoint that were not used.
        cast: tensors that are converted, with the stored dtype and the target's.
        idle: patterns of the allowances that no name matches.
    """

    stored: tuple[int | None, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cast: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def as_stored(self, target: MergedTable, manifest: Manifest) -> MergedTable:
        """Return the target's table with the dtypes that the bytes in the files have."""
        if not self.cast:
            return target
        entries = tuple(
            entry if index is None else replace(entry, dtype=manifest.tensors[index].dtype)
            for entry, index in zip(target.entries, self.stored, strict=True)
        )
        return replace(target, entries=entries)


def match_target(
    target: MergedTable,
    manifest: Manifest,
    parts: Collection[str],
    *,
    problems: Collection[str] = (),
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    strict: bool = True,
    allowed: Allowances = _NOTHING,
    missing_of: Collection[tuple[str, str]] = (),
    unexpected_of: Collection[tuple[str, str]] = (),
) -> Match:
    """Match every tensor of a target by part, name and state.

    Args:
        target: the target's merged table.
        manifest: the checkpoint.
        parts: the parts that are loaded; tensors of others are not looked at.
        problems: mismatches found elsewhere (param groups), reported together with those found here.
        missing: what else the target has and the checkpoint lacks (a scheduler), found elsewhere.
        unexpected: what else the checkpoint has and the target lacks, found elsewhere.
        strict: False allows missing and unexpected names; shapes must always agree.
        allowed: which names may be missing or unexpected, and whether weights may be converted.
        missing_of: (FQN, line) of what else the checkpoint lacks for a parameter or module of the target.
        unexpected_of: (FQN, line) of what else the checkpoint has for one that the target lacks.

    Raises:
        MismatchError: lists everything that differs.
    """
    stored = {(t.part, t.fqn, t.state): index for index, t in enumerate(manifest.tensors) if t.part in parts}
    found: list[int | None] = []
    lacking, left = list(missing), [line for fqn, line in missing_of if allowed.may_miss(fqn)]
    lacking += [line for fqn, line in missing_of if not allowed.may_miss(fqn)]
    mismatched = list(problems)
    cast: list[str] = []
    for entry in target.entries:
        index = stored.pop((entry.part, entry.fqn, entry.state), None)
        found.append(index)
        if index is None:
            (left if allowed.may_miss(entry.fqn) else lacking).append(entry.label)
            continue
        tensor = manifest.tensors[index]
        fits = (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape)
        is_like = tensor.shape == entry.shape and entry.state is None
        if not fits and is_like and allowed.may_cast(tensor.dtype, entry.dtype):
            cast.append(f"{entry.label}: {tensor.dtype} to {entry.dtype}")
        elif not fits:
            stored_kind, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{entry.dtype} {list(entry.shape)}"
            mismatched.append(f"{entry.label}: stored {stored_kind}, the target wants {wanted}")
    unused, passed = list(unexpected), [line for fqn, line in unexpected_of if allowed.may_leave(fqn)]
    unused += [line for fqn, line in unexpected_of if not allowed.may_leave(fqn)]
    for part, fqn, state in stored:
        line = f"{part}: {fqn}" + (f" [{state}]" if state is not None else "")
        (passed if allowed.may_leave(fqn) else unused).append(line)
    idle = allowed.idle(
        [
            *(entry.fqn for entry in target.entries),
            *(fqn for _, fqn in target.members),
            *(fqn for fqn, _ in missing_of),
        ],
        [*(t.fqn for t in manifest.tensors if t.part in parts), *(fqn for fqn, _ in unexpected_of)],
    )
    if mismatched or (strict and (lacking or unused)):
        raise MismatchError(
            _describe(manifest.name, lacking, unused, mismatched, idle),
            missing=lacking,
            unexpected=unused,
            mismatched=mismatched,
        )
    return Match(
        tuple(found),
        tuple(dict.fromkeys(lacking + left)),
        tuple(dict.fromkeys(unused + passed)),
        tuple(cast),
        tuple(idle),
    )


def _describe(name: str, missing: list[str], unexpected: list[str], mismatched: list[str], idle: list[str]) -> str:
    lines = [f"checkpoint {name} does not fit the target; nothing was changed:"]
    for title, names in (
        ("the target has, the checkpoint lacks", missing),
        ("the checkpoint has, the target lacks", unexpected),
        ("differ", mismatched),
        ("allow nothing", idle),
    ):
        if names:
            lines.append(f"  {title} ({len(names)}):")
            lines += [f"    {text}" for text in names[:20]]
            if len(names) > 20:  # noqa: PLR2004 - the error's attributes have them all
                lines.append(f"    ... and {len(names) - 20} more (all are in the error's attributes)")
    lines.append(
        "  build the same model and optimizer, load only the parts that fit, or say what may differ: allow_missing, "
        "allow_unexpected (patterns of names), allow_cast"
    )
    return "\n".join(lines)
