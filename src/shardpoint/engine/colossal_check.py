"""Does what ColossalAI's Booster is about to load fit what it boosted? Asked of every rank, before it touches anything.

ColossalAI skips a weight of another shape in silence, and with its hybrid plugin a name that is missing or unknown too;
it gives moments of another shape to a parameter, and a scheduler whatever state there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from shardpoint.adapters.colossal import Whole, plugin_name, whole_members, whole_weights
from shardpoint.adapters.torch_files import read_values
from shardpoint.comm import Comm
from shardpoint.engine.ballots import agree
from shardpoint.engine.colossal import SCHEDULER, local_path, locate_weights, read_optimizer_files
from shardpoint.engine.numbered import check_states, scheduler_file_document
from shardpoint.engine.source import Source
from shardpoint.errors import MismatchError

_GEMINI = "GeminiPlugin"
# They raise where a further name of a tied weight is not stored, when they have loaded the rest.
_WANT_EVERY_NAME = frozenset(("TorchDDPPlugin", "LowLevelZeroPlugin"))


class Fit(msgspec.Struct, frozen=True):
    """What one rank found.

    Attributes:
        missing: weights of this rank that are not stored.
        unknown: stored weights that this rank does not have; another may, where a pipeline spreads them.
        mismatched: one line for each difference.
        dtypes: of the stored weights.
    """

    missing: list[str]
    unknown: list[str]
    mismatched: list[str]
    dtypes: list[str]


def check_fit(source: Source, comm: Comm, booster: Any, model: Any, optimizer: Any, lr_scheduler: Any) -> Sequence[str]:
    """Refuse what ColossalAI's Booster would load in part, or wrongly, without a word.

    Args:
        source: a checkpoint with ColossalAI's files, verified where that is possible.
        comm: the ranks.
        booster: any Booster; of another than ColossalAI's nothing is known, and nothing is checked.
        model: as `boost` returned it, or None.
        optimizer: likewise.
        lr_scheduler: likewise.

    Returns:
        The dtypes of the stored weights; nothing where the model is not loaded.

    Raises:
        MismatchError: names, shapes, dtypes, groups or keys differ on any rank; it lists everything, on every rank.
        CorruptionError: a file is cut off, or an index is wrong.
        UnsupportedFormatError: a file holds what cannot be looked into without executing it.

    Collective:
        All ranks: one round.
    """
    plugin = plugin_name(booster)

    def look() -> Fit:
        fit = Fit([], [], [], [])
        if plugin is None:
            return fit
        if model is not None:
            fit = _fit_weights(source, whole_weights(model), plugin)
        if optimizer is not None:
            problems = check_states(read_optimizer_files(source), whole_members(model, optimizer))
            fit.mismatched.extend(problems)
        if lr_scheduler is not None:
            place = f"{SCHEDULER} of {source.manifest.name}"
            values = read_values(local_path(source, SCHEDULER), place)
            fit.mismatched.extend(scheduler_file_document(values, lr_scheduler, place)[1])
        return fit

    return agree(comm, "load: compare", look, Fit, partial(_judge, source.manifest.name), list[str], _merged)


def _fit_weights(source: Source, live: dict[str, Whole], plugin: str) -> Fit:
    stored = {name: place for name, (_, place) in locate_weights(source).tensors.items()}
    if plugin == _GEMINI:  # it knows a tied weight by its first name only, and raises on the others when it has loaded
        live = {name: whole for name, whole in live.items() if whole.first == name}
    if plugin in _WANT_EVERY_NAME:
        missing = [name for name in live if name not in stored]
    else:
        there = {whole.first for name, whole in live.items() if name in stored}
        missing = [name for name, whole in live.items() if whole.first == name and name not in there]
    mismatched = [
        f"{name}: stored {place.dtype} {list(place.shape)}, the model has {live[name].dtype} {list(live[name].shape)}"
        for name, place in stored.items()
        if name in live
        # Gemini stores what its chunks have at the time, fp32 or 16 bits, and takes both.
        and (place.shape != live[name].shape or (plugin != _GEMINI and place.dtype != live[name].dtype))
    ]
    return Fit(
        missing=missing,
        unknown=[name for name in stored if name not in live],
        mismatched=mismatched,
        dtypes=sorted({place.dtype for place in stored.values()}),
    )


def _merged(fits: Sequence[Fit]) -> Fit:
    """Return several ranks' findings as one: a stored weight is unknown if none of them has it."""
    unknown = set(fits[0].unknown).intersection(*(fit.unknown for fit in fits))
    return Fit(
        missing=sorted({name for fit in fits for name in fit.missing}),
        unknown=sorted(unknown),
        mismatched=sorted({line for fit in fits for line in fit.mismatched}),
        dtypes=fits[0].dtypes,
    )


def _judge(name: str, fits: Sequence[Fit]) -> list[str]:
    fit = _merged(fits)
    if fit.missing or fit.unknown or fit.mismatched:
        lines = [f"missing {weight}" for weight in fit.missing]
        lines += [f"unexpected {weight}" for weight in fit.unknown]
        text = (
            f"checkpoint {name} does not fit the target; nothing was changed:\n  "
            + "\n  ".join(lines + fit.mismatched)
            + "\n  build model, optimizer and scheduler as they were saved"
        )
        raise MismatchError(text, missing=fit.missing, unexpected=fit.unknown, mismatched=fit.mismatched)
    return fit.dtypes
