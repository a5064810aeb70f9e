"""How the ranks' optimizer documents become one: param groups and scalar states, matched by name.

Pipeline ranks have groups of their own parameters, so memberships are joined; everything else must be equal, and a
difference is an error instead of a silent pick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardpoint.errors import UsageError
from shardpoint.manifest import encode_document


def merge_optimizer_documents(documents: Sequence[dict[str, Any]], part: str) -> dict[str, Any]:
    """Merge optimizer documents.

    Args:
        documents: each distinct one, by lowest rank: `{"class", "groups": [{"params": [FQN], "options": {...}}],
            "states": {FQN: {state: value}}}`.
        part: for messages.

    Raises:
        UsageError: ranks disagree on the number of groups, a group's options, the group of a parameter, or the value
            of a scalar state.
    """
    first = documents[0]
    groups = [{"params": list(group["params"]), "options": group["options"]} for group in first["groups"]]
    states = {name: dict(values) for name, values in first["states"].items()}
    nested: dict[str, dict[Any, Any]] = {name: dict(values) for name, values in first.get("nested", {}).items()}
    for other in documents[1:]:
        if len(other["groups"]) != len(groups) or other["class"] != first["class"]:
            text = f"{part}: ranks have different optimizers: {first['class']} with {len(groups)} groups against "
            text += f"{other['class']} with {len(other['groups'])}"
            raise UsageError(text)
        for number, (mine, theirs) in enumerate(zip(groups, other["groups"], strict=True)):
            if encode_document(mine["options"]) != encode_document(theirs["options"]):
                text = (
                    f"{part}: param group {number} has different options on different ranks: {mine['options']} against "
                )
                text += f"{theirs['options']}"
                raise UsageError(text)
            known = set(mine["params"])
            mine["params"] += [name for name in theirs["params"] if name not in known]
        _join(states, other["states"], part)
        _join(nested, other.get("nested", {}), part)
    _refuse_two_groups(groups, part)
    merged = {"class": first["class"], "groups": groups, "states": states}
    return merged | {"nested": nested} if nested else merged


def _join(merged: dict[str, dict[Any, Any]], other: dict[str, dict[Any, Any]], part: str) -> None:
    """Add what another rank says of states; what both have must be equal.

    Raises:
        UsageError: it is not.
    """
    for name, values in other.items():
        target = merged.setdefault(name, {})
        for state, value in values.items():
            if encode_document(target.setdefault(state, value)) != encode_document(value):
                text = f"{part}: state {state!r} of {name} differs between ranks: {target[state]} against {value}"
                raise UsageError(text)


def _refuse_two_groups(groups: Sequence[dict[str, Any]], part: str) -> None:
    group_of: dict[str, int] = {}
    for number, group in enumerate(groups):
        for name in group["params"]:
            if group_of.setdefault(name, number) != number:
                text = f"{part}: {name} is in param group {group_of[name]} on one rank and in group {number} on another"
                raise UsageError(text)
