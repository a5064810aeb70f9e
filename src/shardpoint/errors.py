"""Which errors Shardpoint raises, what each one carries, and how one travels to another rank.

```
CheckpointError(Exception)                       exit 1
|-- UsageError(ValueError)                       exit 2    arguments; no I/O done
|-- NotFoundError(FileNotFoundError)             exit 10
|-- AlreadyExistsError(FileExistsError)          exit 11
|-- TornCheckpointError                          exit 12   never committed
|-- RootBusyError                                exit 13   another living run owns the root
|-- FencedError                                  exit 13   this run lost the root to a newer one
|-- CorruptionError                              exit 20   committed, but bytes disagree
|   |-- ManifestError
|   |-- ChecksumError
|   `-- TruncatedError
|-- UnsupportedFormatError                       exit 21
|-- MismatchError                                exit 22
|-- ResumeMismatchError                          exit 23   what was restored is not what was saved
|-- StorageError(OSError)                        exit 30
|-- TornSnapshotError                            exit 14   weights changed while they were staged; nothing was committed
|-- SaveCancelledError                           exit 15   a rank asked to give the save up; nothing was committed
|-- DistributedError                             exit 40
|   |-- PeerError
|   `-- CollectiveTimeout(TimeoutError)
`-- CommitUnknownError                           exit 41   the commit may or may not have landed
```

Every error pickles, and `to_fields` / `revive` carry it between ranks as plain JSON values: what the coordinator
decides is raised on every rank as the same class with the same attributes.
"""

from __future__ import annotations

import traceback as traceback_module
from dataclasses import dataclass
from typing import Any, ClassVar, Self

MAX_TRACEBACK_CHARS = 8_000


class CheckpointError(Exception):
    """Say what failed, where, and what to do next: the base of every error that Shardpoint raises."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {}

    @classmethod
    def from_details(cls, message: str, details: dict[str, Any]) -> Self:
        """Make the error again from what `details` returned."""
        return cls(message, **details)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive_pickled, (type(self), self.message, self.details())


def _revive_pickled(cls: type[CheckpointError], message: str, details: dict[str, Any]) -> CheckpointError:
    return cls.from_details(message, details)


class UsageError(CheckpointError, ValueError):
    """An argument is wrong; nothing was read or written."""

    exit_code = 2


class NotFoundError(CheckpointError, FileNotFoundError):
    """What was asked for does not exist."""

    exit_code = 10


class AlreadyExistsError(CheckpointError, FileExistsError):
    """Something that is not ours to replace stands where the result should go."""

    exit_code = 11


class TornCheckpointError(CheckpointError):
    """The directory was never committed: a save ended before its manifest was published."""

    exit_code = 12


class TornSnapshotError(CheckpointError):
    """Weights or optimizer states changed while they were staged behind the training; nothing was committed."""

    exit_code = 14


class SaveCancelledError(CheckpointError):
    """A rank asked to give the save up; nothing was committed."""

    exit_code = 15


class RootBusyError(CheckpointError):
    """Another living run owns the root."""

    exit_code = 13


class FencedError(CheckpointError):
    """This run lost the root to a newer incarnation; nothing that it does there counts any more."""

    exit_code = 13


class CorruptionError(CheckpointError):
    """A committed checkpoint's bytes are not what was committed.

    Attributes:
        key: the file, relative to the checkpoint, and where known the tensor:
            `"modeling/x.safetensors#model.norm.weight"`.
        expected: what the manifest says (a size, a CRC as 16 hex digits, a text).
        actual: what was found.
        target_modified: True when the error was found after bytes of the load's target had changed.
    """

    exit_code = 20

    def __init__(
        self, message: str, *, key: str = "", expected: str = "", actual: str = "", target_modified: bool = False
    ) -> None:
        super().__init__(message)
        self.key = key
        self.expected = expected
        self.actual = actual
        self.target_modified = target_modified

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {
            "key": self.key,
            "expected": self.expected,
            "actual": self.actual,
            "target_modified": self.target_modified,
        }


class ManifestError(CorruptionError):
    """A manifest, an index, a header or another document does not parse, or contradicts itself."""


class ChecksumError(CorruptionError):
    """Bytes were read, and their checksum is not the manifest's."""


class TruncatedError(CorruptionError):
    """A file is missing or has another size than was committed."""


class UnsupportedFormatError(CheckpointError):
    """The checkpoint is of a format version, or a kind, that this release does not read."""

    exit_code = 21


class MismatchError(CheckpointError):
    """Checkpoint and target differ; no byte of the target was changed.

    Attributes:
        missing: names that the target has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the target lacks.
        mismatched: one line for each name that both have with another shape, dtype or grouping.
    """

    exit_code = 22

    def __init__(
        self,
        message: str,
        *,
        missing: list[str] | None = None,
        unexpected: list[str] | None = None,
        mismatched: list[str] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = list(missing or [])
        self.unexpected = list(unexpected or [])
        self.mismatched = list(mismatched or [])

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}


class ResumeMismatchError(CheckpointError):
    """What a resume put in place is not what the checkpoint holds, or the data do not go on where they stopped.

    The target has been changed: do not train on with it.

    Attributes:
        differences: one line for each thing.
    """

    exit_code = 23

    def __init__(self, message: str, *, differences: list[str] | None = None) -> None:
        super().__init__(message)
        self.differences = list(differences or [])

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {"differences": self.differences}


class StorageError(CheckpointError, OSError):
    """The storage refused an operation.

    Attributes:
        key: what was operated on, relative to the root.
        op: the operation (`"pwrite"`, `"fsync"`, `"rename"`, ...).
        retryable: False where trying again could hide a loss (a failed fsync).
        errno: the operating system's number, where there was one.
    """

    exit_code = 30

    def __init__(
        self, message: str, *, key: str = "", op: str = "", retryable: bool = False, errno: int | None = None
    ) -> None:
        super().__init__(message)
        self.key = key
        self.op = op
        self.retryable = retryable
        self.errno = errno

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {"key": self.key, "op": self.op, "retryable": self.retryable, "errno": self.errno}


class DistributedError(CheckpointError):
    """The ranks could not agree."""

    exit_code = 40


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank's failure: the error's class name, its message, and its traceback (cut to 8,000 characters)."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an error that was caught on this rank."""
        try:
            message = str(error)
            text = "".join(traceback_module.format_exception(error))
        except Exception as second:  # noqa: BLE001 - an error that cannot be shown is still one that all ranks must hear of
            message = f"(its message cannot be shown: {type(second).__name__})"
            text = "".join(traceback_module.format_tb(error.__traceback__))
        return cls(type=type(error).__name__, message=message, traceback=text[-MAX_TRACEBACK_CHARS:])


class PeerError(DistributedError):
    """At least one rank failed, so all of them do, with this same error.

    Attributes:
        failures: rank -> its `Failure`.
    """

    def __init__(self, message: str, *, failures: dict[int, Failure]) -> None:
        super().__init__(message)
        self.failures = dict(failures)

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {
            "failures": [[rank, f.type, f.message, f.traceback] for rank, f in sorted(self.failures.items())],
        }

    @classmethod
    def from_details(cls, message: str, details: dict[str, Any]) -> Self:
        """Make the error again from what `details` returned."""
        return cls(
            message, failures={rank: Failure(kind, text, trace) for rank, kind, text, trace in details["failures"]}
        )


class CollectiveTimeout(DistributedError, TimeoutError):
    """Ranks fell silent, or made no progress, while the others waited.

    Attributes:
        waiting_for: the ranks that were waited for.
    """

    def __init__(self, message: str, *, waiting_for: list[int]) -> None:
        super().__init__(message)
        self.waiting_for = list(waiting_for)

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {"waiting_for": self.waiting_for}


class CommitUnknownError(CheckpointError):
    """This rank voted and heard no verdict, or the root's fsync failed: the commit may or may not have landed.

    Attributes:
        attempt_id: compare it with the `checkpoint_id` in the manifest under the name: equal means committed.
    """

    exit_code = 41

    def __init__(self, message: str, *, attempt_id: str) -> None:
        super().__init__(message)
        self.attempt_id = attempt_id

    def details(self) -> dict[str, Any]:
        """Return the attributes beyond the message, as JSON values."""
        return {"attempt_id": self.attempt_id}


def error_classes() -> dict[str, type[CheckpointError]]:
    """Return every class of the tree by its name."""
    found: dict[str, type[CheckpointError]] = {}
    pending: list[type[CheckpointError]] = [CheckpointError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found


def to_fields(error: CheckpointError) -> dict[str, Any]:
    """Return an error as JSON values that `revive` turns back into the same class with the same attributes."""
    return {"type": type(error).__name__, "message": error.message, "details": error.details()}


def revive(fields: dict[str, Any]) -> CheckpointError:
    """Make an error again from what `to_fields` returned on another rank.

    Raises:
        DistributedError: the fields name no class of this release's tree.
    """
    cls = error_classes().get(fields["type"])
    if cls is None:
        text = f"a peer raised {fields['type']}, which this release does not know: {fields['message']}"
        raise DistributedError(text)
    return cls.from_details(fields["message"], fields["details"])
