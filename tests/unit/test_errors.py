from __future__ import annotations

import pytest

from shardpoint import errors
from shardpoint.errors import (
    CheckpointError,
    CollectiveTimeout,
    CorruptionError,
    DistributedError,
    Failure,
    MismatchError,
    NotFoundError,
    PeerError,
    StorageError,
    UsageError,
)


def test_str_is_the_message_for_every_class() -> None:
    # OSError and its children would print "[Errno ...]" and KeyError a repr; a message is shown as it was written.
    for error in (NotFoundError("no such root: x"), StorageError("disk full", errno=28), UsageError("step is -1")):
        assert str(error) == error.message
        assert error.args == (error.message,)


def test_errors_are_caught_as_pythons_own_kind() -> None:
    with pytest.raises(FileNotFoundError):
        raise NotFoundError("gone")
    with pytest.raises(ValueError, match="step"):
        raise UsageError("step is -1")
    with pytest.raises(TimeoutError):
        raise CollectiveTimeout("silent", waiting_for=[1])


def test_a_storage_errors_errno_is_the_operating_systems() -> None:
    assert StorageError("disk full", errno=28).errno == 28
    assert StorageError("refused").errno is None


def test_lists_are_the_errors_own() -> None:
    missing = ["a"]
    error = MismatchError("differs", missing=missing)
    missing.append("b")
    assert (error.missing, error.unexpected, error.mismatched) == (["a"], [], [])


def test_corruption_defaults_say_that_the_target_is_untouched() -> None:
    assert CorruptionError("bad").details() == {"key": "", "expected": "", "actual": "", "target_modified": False}


def test_a_failure_describes_an_error_with_its_traceback() -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        failure = Failure.of(error)
    assert (failure.type, failure.message) == ("KeyError", "'x'")
    assert "test_a_failure_describes_an_error_with_its_traceback" in failure.traceback


def test_a_failures_traceback_is_cut_at_the_front() -> None:
    failure = Failure.of(ValueError("x" * (2 * errors.MAX_TRACEBACK_CHARS) + " the end"))
    assert len(failure.traceback) == errors.MAX_TRACEBACK_CHARS
    assert failure.traceback.endswith("the end\n")


def test_a_peer_error_keeps_ranks_as_numbers_through_fields() -> None:
    original = PeerError(
        "rank 10 failed", failures={10: Failure("OSError", "m", "t"), 2: Failure("ValueError", "n", "u")}
    )
    fields = errors.to_fields(original)
    assert [row[0] for row in fields["details"]["failures"]] == [2, 10]
    revived = errors.revive(fields)
    assert isinstance(revived, PeerError)
    assert revived.failures == original.failures


def test_an_unknown_class_cannot_be_revived() -> None:
    with pytest.raises(DistributedError, match=r"NewError.*does not know.*the disk is on fire"):
        errors.revive({"type": "NewError", "message": "the disk is on fire", "details": {}})


def test_only_errors_of_the_tree_can_be_revived() -> None:
    # A name from a peer never reaches another class: no builtin, no attribute of the module.
    for name in ("Exception", "OSError", "Failure", "error_classes", "__class__"):
        with pytest.raises(DistributedError):
            errors.revive({"type": name, "message": "", "details": {}})


def test_error_classes_holds_the_base_and_every_leaf() -> None:
    found = errors.error_classes()
    assert found["CheckpointError"] is CheckpointError
    assert found["CollectiveTimeout"] is CollectiveTimeout
    assert all(issubclass(cls, CheckpointError) for cls in found.values())


def test_an_error_that_cannot_be_shown_is_still_a_failure() -> None:
    class UnshowableError(RuntimeError):
        def __str__(self) -> str:
            raise ValueError

    failure = Failure.of(UnshowableError())
    assert failure.type == "UnshowableError"
    assert "cannot be shown" in failure.message
