"""How one looks into a checkpoint: which tensors it has, and each of them, whole or a slice, without a model."""

from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from shardpoint.adapters.destinations import Destinations
from shardpoint.adapters.tensors import torch_dtype
from shardpoint.checksum import to_hex
from shardpoint.engine.filling import Readers, fill
from shardpoint.engine.parts import StrPath, locate
from shardpoint.engine.source import Source
from shardpoint.errors import ChecksumError, NotFoundError, UsageError
from shardpoint.geometry import Region, merge_spans
from shardpoint.manifest import TensorEntry
from shardpoint.planning import Entry, Wanted, plan_reads, wanted_runs

Rows = tuple[int, int] | tuple[slice, ...]
"""(start, stop) of the first dim, or one slice of step 1 for each of the first dims."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        part: the directory that it belongs to (`"modeling"`, `"optimizer"`, `"actor/modeling"`).
        name: its name there; of an optimizer's state, `<parameter>.<state>`.
        dtype: as training sees it.
        shape: of the whole tensor.
    """

    part: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What was read, with the evidence.

    Attributes:
        tensor: on the CPU, contiguous, nobody else's.
        verified: True when its checksum was compared with the committed one. A slice's cannot be (the checksum is the
            whole tensor's), nor that of a file without a manifest.
        read_bytes: bytes that were asked of the storage.
    """

    tensor: torch.Tensor
    verified: bool
    read_bytes: int


class Checkpoint:
    """One checkpoint, open to be read from; made by `open_checkpoint`.

    Args:
        source: the checkpoint.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._readers: Readers | None = Readers(source)
        self._tensors = {(tensor.part or "modeling", tensor.key): tensor for tensor in source.manifest.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The checkpoint's name in its root."""
        return self._source.manifest.name

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """What tensors it has."""
        return tuple(
            TensorInfo(part, key, torch_dtype(tensor.dtype), tuple(tensor.shape))
            for (part, key), tensor in self._tensors.items()
        )

    def read(self, name: str, *, part: str = "modeling", rows: Rows | None = None) -> ReadResult:
        """Read a tensor, or a slice of it.

        Args:
            name: as in `tensors`.
            part: which part.
            rows: None for the whole tensor; `(start, stop)` of its first dim; or a tuple of slices of step 1, one for
                each of its first dims. Negative numbers count from the end.

        Raises:
            UsageError: `rows` is no such thing, or reaches beyond the tensor; or the checkpoint was closed.
            NotFoundError: there is no such tensor; similar names are listed. Or the checkpoint was pruned meanwhile.
            ChecksumError: a whole tensor's bytes are not those that were committed.
            TruncatedError: its file is missing, or has another size.
            StorageError: the storage refused.

        Memory:
            The result, and no copy.
        """
        if self._readers is None:
            raise UsageError(f"{self.name} was closed: open it again")
        stored = self._find(name, part)
        region = _region(stored, rows)
        entry = Entry(stored.part, stored.fqn, stored.state, stored.key, stored.dtype, tuple(stored.shape), ())
        self._readers.take(stored.file)  # before the memory: a tensor is no larger than a file that is there
        tensor = torch.empty(region.lengths, dtype=torch_dtype(stored.dtype))
        is_whole = region == Region.whole(entry.shape)
        counted = (0, stored.num_bytes if is_whole else 0)
        plan = plan_reads([Wanted(stored.file, stored.byte_offset, wanted_runs(entry, region), counted)])
        (partial,) = fill(
            self._readers, plan, [Destinations().of(tensor)], [stored.num_bytes], progress=lambda _num_bytes: None
        )
        verified = is_whole and self._source.sealed
        if verified and (actual := to_hex(partial.whole_crc(stored.num_bytes))) != stored.crc64nvme:
            path = self._source.manifest.files[stored.file].path
            text = f"{path} of {self.name} is damaged: tensor {name} does not have the checksum that was committed"
            raise ChecksumError(text, key=f"{path}#{name}", expected=stored.crc64nvme, actual=actual)
        return ReadResult(tensor, verified, plan.read_bytes)

    def close(self) -> None:
        """Close its files; a second call does nothing."""
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.close()

    def _find(self, name: str, part: str) -> TensorEntry:
        if (part, name) in self._tensors:
            return self._tensors[part, name]
        names = [key for known, key in self._tensors if known == part]
        if not names:
            raise NotFoundError(f"{self.name} has no part {part!r}: it has {sorted({p for p, _ in self._tensors})}")
        elsewhere = [known for known, key in self._tensors if key == name]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        text = f"{self.name} has no tensor {name!r} in {part!r}"
        if elsewhere:
            text += f"; {elsewhere} has one of that name"
        elif near:
            text += f"; similar names: {', '.join(near)}"
        raise NotFoundError(text)


def _region(tensor: TensorEntry, rows: Rows | None) -> Region:
    """Return the part of a tensor that `rows` means.

    Raises:
        UsageError: it means none.
    """
    shape = tuple(tensor.shape)
    if rows is None:
        return Region.whole(shape)
    wrong = f"rows={rows!r} of tensor {tensor.key} of shape {list(shape)}"
    given: Any = rows  # whatever a caller passes
    if not isinstance(given, tuple):
        raise UsageError(f"{wrong}: give (start, stop), or a tuple of slices")
    if len(given) == 2 and not any(isinstance(item, slice) for item in given):  # noqa: PLR2004 - start and stop
        given = (slice(*given),)
    slices = [item for item in given if isinstance(item, slice)]
    if not slices or len(slices) != len(given):
        raise UsageError(f"{wrong}: give (start, stop), or a tuple of slices")
    if len(slices) > len(shape):
        raise UsageError(f"{wrong}: it has {len(shape)} dims")
    spans = [_span(item, length, wrong) for item, length in zip(slices, shape, strict=False)]
    spans += [(0, length) for length in shape[len(slices) :]]
    return Region(tuple(merge_spans([span]) for span in spans))


def _span(item: slice, length: int, wrong: str) -> tuple[int, int]:
    """Return (start, length) of a slice of one dim; beyond the end is an error, not an empty tensor."""
    try:
        step = 1 if item.step is None else operator.index(item.step)
        start = 0 if item.start is None else operator.index(item.start)
        stop = length if item.stop is None else operator.index(item.stop)
    except TypeError as error:
        raise UsageError(f"{wrong}: start and stop must be integers") from error
    start, stop = (edge + length if edge < 0 else edge for edge in (start, stop))
    if step != 1 or not 0 <= start <= stop <= length:
        raise UsageError(f"{wrong}: {start} to {stop} in steps of {step} is no range of a dim of {length}")
    return start, stop - start


def open_checkpoint(path: StrPath) -> Checkpoint:
    """Open a checkpoint to read tensors, or slices of them, without a model.

    Args:
        path: a committed checkpoint, something inside one (the whole checkpoint is opened), a Hugging Face model
            directory, or one safetensors file. The tensors of the last two, and of a part that was saved by itself,
            count as the part `"modeling"`.

    Raises:
        NotFoundError: nothing is there.
        TornCheckpointError: it was never committed.
        CorruptionError: its manifest, an index or a header is damaged.
        UnsupportedFormatError: a newer format, or another library's files.

    Examples:
        >>> import tempfile
        >>> from shardpoint import Checkpointer, TrainState
        >>> root = tempfile.mkdtemp()
        >>> with Checkpointer(root) as checkpointer:
        ...     _ = checkpointer.save(TrainState(model=torch.nn.Linear(3, 4)), epoch=0, step=1, batch_size=1)
        >>> with open_checkpoint(f"{root}/epoch-0_step-1") as checkpoint:
        ...     whole = checkpoint.read("weight")
        ...     slice_ = checkpoint.read("weight", rows=(1, 3))
        >>> tuple(whole.tensor.shape), whole.verified, tuple(slice_.tensor.shape), slice_.verified, slice_.read_bytes
        ((4, 3), True, (2, 3), False, 24)
    """
    source, _ = locate(path, "modeling")()
    return Checkpoint(source)
