"""Of the steps that count in the end: is one missing, and was a sample taken twice, never, or out of its turn?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardpoint.audit.report import Finding, Position, Speller, some_of
from shardpoint.commit import committed_checkpoints
from shardpoint.errors import CorruptionError, NotFoundError
from shardpoint.journal import LifeSteps, Step
from shardpoint.manifest import NEXT_SAMPLES_NAME, decode_document
from shardpoint.storage import Store


def _follows(before: Position, after: Position) -> bool:
    """Tell whether a step is the next one; a loop may count within each epoch, or through all of them."""
    if before[0] == after[0]:
        return after[1] == before[1] + 1
    return after[0] == before[0] + 1 and after[1] in (0, 1, before[1] + 1)


def gaps(counting: Sequence[tuple[Step, LifeSteps]], spell: Speller) -> Iterator[Finding]:
    """Yield where the steps that count are not one after the other."""
    if not counting:
        return
    previous = counting[0][1].origin
    for step, life in counting:
        here = step.position
        if previous is None:
            if counting[0][1].life is not None and here[1] > 1:
                yield Finding("gap", f"the run begins with {spell.one(here)}: what came before is in no life")
        elif here <= previous:
            yield Finding("twice", f"life {life.number} has {spell.one(here)} after {spell.one(previous)}")
        elif not _follows(previous, here):
            text = f"between {spell.one(previous)} and {spell.one(here)} steps are in no life that counts"
            yield Finding("gap", text)
        previous = here


def coverage(counting: Sequence[tuple[Step, LifeSteps]], spell: Speller) -> Iterator[Finding | str]:
    """Yield what is wrong with the samples of each epoch; as a plain text what is no fault."""
    by_epoch: dict[int, list[tuple[Step, LifeSteps]]] = {}
    for step, life in counting:
        by_epoch.setdefault(step.epoch, []).append((step, life))
    for epoch, steps in by_epoch.items():
        seen: dict[int, tuple[Step, LifeSteps]] = {}
        repeated: list[tuple[int, Step, Step]] = []
        draws_again = False
        for step, life in steps:
            for index in set(step.samples.indices or []) if step.samples is not None else ():
                if index in seen:
                    draws_again |= seen[index][1] is life
                    repeated.append((index, seen[index][0], step))
                seen[index] = (step, life)
        if draws_again:
            # A life that nothing interrupted does it too: the sampler draws with replacement.
            yield f"epoch {epoch}: samples are taken more than once within one life, so they are not counted"
            continue
        if repeated:
            index, first, second = repeated[0]
            text = (
                f"{len(repeated)} samples were taken twice in epoch {epoch}: first sample {index}, in "
                f"{spell.one(first.position)} and again in {spell.one(second.position)}"
            )
            yield Finding("repeated", text)
        if epoch + 1 in by_epoch:
            yield from _skipped(epoch, steps, set(seen))


def _skipped(epoch: int, steps: Sequence[tuple[Step, LifeSteps]], seen: set[int]) -> Iterator[Finding | str]:
    """Yield which samples of an epoch that is over were never taken, where the journal can tell."""
    life = steps[-1][1].life
    total = life.num_samples if life is not None else None
    if total is None or any(step.samples is None or step.samples.indices is None for step, _ in steps):
        return
    if steps[0][1].number != 1 and steps[0][0].step > 1:
        return  # the epoch began before this journal
    missing = sorted(set(range(total)) - seen)
    largest = max(step.samples.count for step, _ in steps if step.samples is not None)
    if len(missing) >= largest:
        text = f"{len(missing)} of {total} samples were never taken in epoch {epoch}: first sample {missing[0]}"
        yield Finding("skipped", text)
    elif missing:
        yield f"epoch {epoch}: its last {len(missing)} samples fill no step, and were left out"


def announced(store: Store, counting: Sequence[tuple[Step, LifeSteps]], spell: Speller) -> Iterator[Finding]:
    """Compare what checkpoints say comes next with what came."""
    for item in committed_checkpoints(store):
        manifest = item.manifest
        if manifest is None or manifest.epoch is None or manifest.step is None:
            continue
        paths = [entry.path for entry in manifest.files if entry.path.endswith(f"data/{NEXT_SAMPLES_NAME}")]
        if len(paths) != 1:
            continue  # none, or one for each of several roles: the journal does not tell whose its samples are
        try:
            document = decode_document(store.read_bytes(f"{item.key}/{paths[0]}"), paths[0])
            listed = [int(index) for index in document["samples"]]
        except NotFoundError:
            continue  # pruned in this moment
        except (CorruptionError, TypeError, KeyError, ValueError):
            yield Finding("damaged", f"{paths[0]} of {item.name} cannot be read: `shardpoint verify` tells more")
            continue
        position = (manifest.epoch, manifest.step)
        came = _taken_after(position, counting, len(listed))
        both = min(len(listed), len(came))
        if listed[:both] != came[:both]:
            text = (
                f"after {spell.one(position)} the samples {some_of(came)} were taken, but its checkpoint {item.name} "
                f"says that {some_of(listed)} come next"
            )
            yield Finding("next_samples", text)


def _taken_after(position: Position, counting: Sequence[tuple[Step, LifeSteps]], count: int) -> list[int]:
    """Return up to `count` samples that were taken after a position, as far as the journal lists them without a gap."""
    taken: list[int] = []
    previous = position
    for step, _ in counting:
        if step.position <= position:
            continue
        if len(taken) >= count or step.samples is None or step.samples.indices is None:
            break
        if not _follows(previous, step.position):
            break
        taken += step.samples.indices
        previous = step.position
    return taken[:count]
