"""What a run writes down of each step, how a reader gets it back, and which steps are those that count in the end.

A journal is evidence beside the checkpoints, never what a resume goes by. It is JSON lines: one for each *life* of the
run (a start or a resume), one for each step. Floats are written so that every bit comes back.

Source: docs/spec/FORMAT.md, "The journal".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from shardpoint.checksum import crc64, to_hex
from shardpoint.errors import ManifestError, NotFoundError, UnsupportedFormatError, UsageError
from shardpoint.manifest import metric_value
from shardpoint.manifest.codec import parse_strict_json
from shardpoint.storage import AppendedFile, Store

JOURNAL_NAME = "journal.jsonl"
JOURNAL_VERSION = 1
MAX_INDICES = 4096

Number = float | Literal["nan", "inf", "-inf"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Hex16 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]


class Samples(msgspec.Struct, frozen=True):
    """Which samples a step consumed, over all ranks.

    Attributes:
        count: how many.
        crc64nvme: CRC-64/NVME of their indices in order, as int64, little-endian.
        indices: the indices themselves, where they are at most 4,096.
    """

    count: Count
    crc64nvme: Hex16
    indices: list[int] | None = None


class OptimizerMark(msgspec.Struct, frozen=True):
    """What is cheap to tell of an optimizer after a step.

    Attributes:
        learning_rates: of each param group.
        steps: how many steps it has counted itself, where it counts them on the host.
    """

    learning_rates: list[Number]
    steps: float | None = None


class Origin(msgspec.Struct, frozen=True):
    """The checkpoint that a life resumed from."""

    name: str
    checkpoint_id: str
    epoch: Count
    step: Count


class PassedOver(msgspec.Struct, frozen=True):
    """A checkpoint that a resume tried before the one that it took, and why it did not take it."""

    name: str
    reason: str


class Life(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="life"):
    """One start, or one resume, of a run.

    Attributes:
        version: of the journal's format.
        life: its id, which its steps name too.
        incarnation: the number of the root's owner.
        library: what wrote it.
        started_utc: the coordinator's wall clock, for people.
        host: the coordinator's.
        world_size: the number of ranks.
        layout: how the trained parameters lie on them.
        versions: of what computes: package -> version.
        num_samples: the length of the data set, where the sampler tells it.
        resumed_from: the checkpoint that it resumed from, or None when it started afresh.
        passed_over: what its resume had to pass over.
    """

    version: int
    life: str
    incarnation: Count
    library: str
    started_utc: str
    host: str
    world_size: Count
    layout: str
    versions: dict[str, str]
    num_samples: Count | None = None
    resumed_from: Origin | None = None
    passed_over: list[PassedOver] = []


class Step(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="step"):
    """One step.

    Attributes:
        life: the id of its life.
        epoch: the epoch.
        step: steps done, this one included, counted as in the checkpoints' names.
        loss: its loss.
        grad_norm: the norm of its gradient, where the loop tells it.
        optimizers: role -> what its optimizer shows after the step.
        samples: what it consumed, where the loop tells it.
        rng: CRC-64/NVME of the coordinator's random state after it.
    """

    life: str
    epoch: Count
    step: Count
    loss: Number
    grad_norm: Number | None = None
    optimizers: dict[str, OptimizerMark] = {}
    samples: Samples | None = None
    rng: Hex16 | None = None

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step."""
        return self.epoch, self.step


def samples_of(indices: Iterable[Any]) -> Samples:
    """Return what the journal holds of a step's samples.

    Args:
        indices: integers (a list, an array, a tensor), in the order of consumption, over all ranks.

    Raises:
        UsageError: something is no integer of 64 bits.
    """
    try:
        array = np.asarray(indices.tolist() if hasattr(indices, "tolist") else list(indices))
        exact = array.astype("<i8", casting="safe" if array.size else "unsafe").reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"samples must be integers of 64 bits, the indices that the step consumed: {error}") from error
    listed = exact.tolist() if exact.size <= MAX_INDICES else None
    return Samples(exact.size, to_hex(crc64(exact.tobytes())), listed)


def number(value: Any, name: str) -> Number:
    """Return a float as the journal holds it: what is not finite as text, since JSON has no form for it.

    Raises:
        UsageError: it is no number.
    """
    try:
        return metric_value(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} must be a number, got {value!r}: {error}") from error


class JournalWriter:
    """Appends to a root's journal; for the owner of the root alone.

    Args:
        store: the root.

    Raises:
        StorageError: the file cannot be opened.

    Durability:
        As `AppendedFile`: each line survives the process, and power loss once `close` has returned.
    """

    def __init__(self, store: Store) -> None:
        self._file = AppendedFile(store, JOURNAL_NAME)

    def write(self, entry: Life | Step) -> None:
        """Append one line.

        Raises:
            StorageError: the system refused it.
        """
        self._file.append(msgspec.json.encode(entry))

    def close(self) -> None:
        """Make it durable and close it."""
        self._file.close()


@dataclass
class LifeSteps:
    """One life of a run, as a journal tells it.

    Attributes:
        number: 1 for the first one of its journal, and so on.
        life: its first line; None where that is lost.
        steps: its steps, in the order in which they were written.
    """

    number: int
    life: Life | None
    steps: list[Step] = field(default_factory=list)

    @property
    def origin(self) -> tuple[int, int] | None:
        """Epoch and step that it resumed from; None where it started afresh, or where that is lost."""
        origin = self.life.resumed_from if self.life is not None else None
        return None if origin is None else (origin.epoch, origin.step)


@dataclass
class JournalContents:
    """What a journal holds.

    Attributes:
        lives: in the order of their beginning.
        torn: the numbers of lines that a death cut short: the last one of a life.
        damaged: the numbers of other lines that cannot be read.
    """

    lives: list[LifeSteps] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


def read_journal(store: Store) -> JournalContents:
    """Read a root's journal, as it is at this moment.

    Lines of a kind that this release does not know, and fields that it does not know, are left out.

    Raises:
        NotFoundError: there is none.
        UnsupportedFormatError: a life of a newer version.
        StorageError: it cannot be read.
    """
    try:
        data = store.read_bytes(JOURNAL_NAME)
    except NotFoundError as error:
        text = (
            f"there is no {JOURNAL_NAME} in {store.location}: a loop writes one when it calls "
            "`Checkpointer.journal.record` after each step"
        )
        raise NotFoundError(text) from error
    contents = JournalContents()
    by_id: dict[str, LifeSteps] = {}
    lines = data.split(b"\n")
    unreadable: int | None = None
    for place, line in enumerate(lines, start=1):
        if not line:
            continue
        entry = _parsed(line, f"line {place} of {JOURNAL_NAME}")
        if unreadable is not None:
            # A death cuts the last line of a life: what follows it is the beginning of the next one.
            (contents.torn if isinstance(entry, Life) else contents.damaged).append(unreadable)
            unreadable = None
        if entry is None:
            unreadable = place
        elif not isinstance(entry, str):
            found = by_id.get(entry.life)
            if found is None:
                found = by_id[entry.life] = LifeSteps(len(by_id) + 1, entry if isinstance(entry, Life) else None)
                contents.lives.append(found)
            if isinstance(entry, Step):
                found.steps.append(entry)
    if unreadable is not None:
        contents.torn.append(unreadable)
    return contents


def _parsed(line: bytes, place: str) -> Life | Step | str | None:
    """Return a line's entry, the name of a kind that is not known, or None where it cannot be read."""
    try:
        tree = parse_strict_json(line, place)
    except ManifestError:
        return None
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if kind == "life" and isinstance(tree.get("version"), int) and tree["version"] > JOURNAL_VERSION:
        text = (
            f"{place} is of journal version {tree['version']}; this release reads version {JOURNAL_VERSION}: install a "
            "newer Shardpoint"
        )
        raise UnsupportedFormatError(text)
    if kind not in ("life", "step"):
        return kind if isinstance(kind, str) else None
    try:
        return msgspec.convert(tree, Life | Step)
    except msgspec.ValidationError:
        return None


def timeline(lives: Sequence[LifeSteps]) -> list[tuple[Step, LifeSteps]]:
    """Return the steps that count in the end, each with its life: what a resume went back behind does not.

    Examples:
        >>> def step(life: str, number: int) -> Step:
        ...     return Step(life=life, epoch=0, step=number, loss=1.0)
        >>> first = LifeSteps(1, None, [step("a", 1), step("a", 2), step("a", 3)])
        >>> second = LifeSteps(2, None, [step("b", 2)])
        >>> [(entry.step, life.number) for entry, life in timeline([first, second])]
        [(1, 1), (2, 2)]
    """
    counting: list[tuple[Step, LifeSteps]] = []
    for life in lives:
        if life.life is not None:
            origin = life.origin
            counting = [item for item in counting if origin is not None and item[0].position <= origin]
        elif life.steps:
            first = life.steps[0].position
            counting = [item for item in counting if item[0].position < first]
        counting += [(step, life) for step in life.steps]
    return counting


def as_float(value: Number) -> float:
    """Return the float that the journal holds."""
    return float(value)


def same_bits(one: Number | None, other: Number | None) -> bool:
    """Tell whether two numbers are equal to the last bit; a NaN equals a NaN."""
    if one is None or other is None:
        return one is other
    return as_float(one).hex() == as_float(other).hex()


def relative_difference(one: Number, other: Number) -> float:
    """Return `|a - b| / max(|a|, |b|)`; 0 for equal ones, infinity where one of them is not finite."""
    a, b = as_float(one), as_float(other)
    if same_bits(one, other) or a == b:
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))
