"""In which thing do two lives that did the same steps differ first?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardpoint.audit.report import Comparison, Difference, Position, Speller, some_of
from shardpoint.journal import (
    LifeSteps,
    OptimizerMark,
    Step,
    as_float,
    relative_difference,
    same_bits,
)


@dataclass(frozen=True, slots=True)
class _Pair:
    then: Step
    then_life: LifeSteps
    now: Step
    now_life: LifeSteps


def overlaps(lives: Sequence[LifeSteps], spell: Speller) -> list[Comparison]:
    """Compare each life with what earlier ones did last of the same steps."""
    latest: dict[Position, tuple[Step, LifeSteps]] = {}
    comparisons: list[Comparison] = []
    for life in lives:
        pairs = [_Pair(*latest[step.position], step, life) for step in life.steps if step.position in latest]
        comparisons += [
            _compare(group, f"life {life.number}", f"life {group[0].then_life.number}", spell)
            for group in _groups(pairs)
        ]
        latest |= {step.position: (step, life) for step in life.steps}
    return comparisons


def beside(
    reference: Sequence[tuple[Step, LifeSteps]],
    counting: Sequence[tuple[Step, LifeSteps]],
    location: str,
    spell: Speller,
) -> list[Comparison]:
    """Compare what counts of two runs."""
    there = {step.position: (step, life) for step, life in reference}
    pairs = [_Pair(*there[step.position], step, life) for step, life in counting if step.position in there]
    return [
        _compare(group, f"life {group[0].now_life.number}", f"life {group[0].then_life.number} of {location}", spell)
        for group in _groups(pairs)
    ]


def _groups(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    groups: dict[tuple[int, int], list[_Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.then_life.number, pair.now_life.number), []).append(pair)
    return list(groups.values())


def _compare(pairs: Sequence[_Pair], now: str, then: str, spell: Speller) -> Comparison:
    topology = _topology_difference(pairs[0])
    difference = None
    for index, pair in enumerate(pairs):
        difference = _step_difference(pair, pairs[:index], spell, same_topology=topology is None)
        if difference is not None:
            break
    difference = difference or topology
    largest, where = max(
        ((relative_difference(pair.then.loss, pair.now.loss), pair.now.position) for pair in pairs),
        key=lambda item: item[0],
    )
    first, last = pairs[0].now.position, pairs[-1].now.position
    if difference is None:
        message = f"bit-exact for {spell.some(first, last)}"
    elif difference.cause == "topology":
        message = f"{difference.message}; {spell.some(first, last)} differ by up to {largest:.1e} of the loss"
        message += f" ({spell.one(where)})" if largest else ""
    else:
        message = f"differs first in {spell.one((difference.epoch, difference.step))}: {difference.message}"
        message += _other_versions(pairs[0])
    return Comparison(now, then, first, last, len(pairs), difference, largest, message)


def _topology_difference(pair: _Pair) -> Difference | None:
    then, now = pair.then_life.life, pair.now_life.life
    if then is None or now is None or (then.world_size, then.layout) == (now.world_size, now.layout):
        return None
    if then.world_size != now.world_size:
        words = [f"{count} rank{'' if count == 1 else 's'}" for count in (then.world_size, now.world_size)]
        what = f"{words[0]} then, {now.world_size} now"
    else:
        what = f"{then.layout} then, {now.layout} now"
    message = f"not comparable bit for bit: {what}"
    before, after = (f"{life.world_size} ranks, {life.layout}" for life in (then, now))
    return Difference("topology", *pair.now.position, "world_size, layout", before, after, message)


def _other_versions(pair: _Pair) -> str:
    then, now = pair.then_life.life, pair.now_life.life
    if then is None or now is None:
        return ""
    names = sorted(then.versions.keys() | now.versions.keys())
    changed = [
        f"{name} {then.versions.get(name, 'none')} then, {now.versions.get(name, 'none')} now"
        for name in names
        if then.versions.get(name) != now.versions.get(name)
    ]
    return f" ({'; '.join(changed)})" if changed else ""


def _step_difference(pair: _Pair, before: Sequence[_Pair], spell: Speller, *, same_topology: bool) -> Difference | None:
    """Return the first thing in which two lives of a step differ, causes before effects."""
    difference = _data_difference(pair)
    if difference is None and same_topology:
        difference = _rng_difference(pair)
    if difference is None:
        difference = _optimizer_difference(pair)
    if difference is None and same_topology:
        difference = _result_difference(pair, before, spell)
    return difference


def _data_difference(pair: _Pair) -> Difference | None:
    then, now = pair.then.samples, pair.now.samples
    if then is None or now is None or (then.count, then.crc64nvme) == (now.count, now.crc64nvme):
        return None
    if then.indices is not None and now.indices is not None:
        message = f"data: the samples {some_of(then.indices)} then, {some_of(now.indices)} now"
    else:
        message = f"data: {then.count} samples of checksum {then.crc64nvme} then, {now.count} of {now.crc64nvme} now"
    return Difference(
        "data",
        *pair.now.position,
        "samples",
        then.indices if then.indices is not None else then.crc64nvme,
        now.indices if now.indices is not None else now.crc64nvme,
        message,
    )


def _rng_difference(pair: _Pair) -> Difference | None:
    then, now = pair.then.rng, pair.now.rng
    if then is None or now is None or then == now:
        return None
    message = f"RNG: the random state after it has the checksum {then} then, {now} now"
    return Difference("rng", *pair.now.position, "rng", then, now, message)


def _optimizer_difference(pair: _Pair) -> Difference | None:
    for role in sorted(pair.then.optimizers.keys() & pair.now.optimizers.keys()):
        then, now = pair.then.optimizers[role], pair.now.optimizers[role]
        whose = f" of {role}" if role else ""
        if not _same_rates(then, now):
            before, after = _rates(then), _rates(now)
            message = f"optimizer: the learning rate{whose} is {before} then, {after} now"
            return Difference("optimizer", *pair.now.position, "learning_rates", before, after, message)
        if then.steps is not None and now.steps is not None and then.steps != now.steps:
            message = f"optimizer: it{whose} has counted {then.steps:g} steps then, {now.steps:g} now"
            return Difference("optimizer", *pair.now.position, "steps", then.steps, now.steps, message)
    return None


def _same_rates(then: OptimizerMark, now: OptimizerMark) -> bool:
    return len(then.learning_rates) == len(now.learning_rates) and all(
        same_bits(one, other) for one, other in zip(then.learning_rates, now.learning_rates, strict=True)
    )


def _rates(mark: OptimizerMark) -> str:
    return ", ".join(repr(as_float(rate)) for rate in mark.learning_rates)


def _result_difference(pair: _Pair, before: Sequence[_Pair], spell: Speller) -> Difference | None:
    """Compare loss and gradient norm, once all that goes into a step is equal."""
    losses = as_float(pair.then.loss), as_float(pair.now.loss)
    if not same_bits(pair.then.loss, pair.now.loss):
        told = f"the loss is {losses[0]!r} then, {losses[1]!r} now"
        if before:
            # What went into the step before was equal, and so was what came out: what followed was its update.
            known = " and gradient norm" if before[-1].now.grad_norm is not None else ""
            last = spell.one(before[-1].now.position)
            message = (
                f"optimizer: {told}, though the loss{known} of {last} is equal: the update after {last} went another "
                "way (the optimizer's state or options)"
            )
            return Difference("optimizer", *pair.now.position, "loss", *losses, message)
        message = f"loss: {told}: other weights, or samples that hold something else"
        return Difference("loss", *pair.now.position, "loss", *losses, message)
    then, now = pair.then.grad_norm, pair.now.grad_norm
    if then is None or now is None or same_bits(then, now):
        return None
    message = (
        f"optimizer: the gradient norm is {as_float(then)!r} then, {as_float(now)!r} now, though the loss is equal: "
        "the backward pass, clipping, or gradients that were left over"
    )
    return Difference("optimizer", *pair.now.position, "grad_norm", as_float(then), as_float(now), message)
