from __future__ import annotations

import builtins
import copy
import json
import pickle
import re
from dataclasses import dataclass

import pytest

from shardpoint import errors
from shardpoint.errors import CheckpointError, Failure

LINE = re.compile(r"(?P<lead>[|` -]*)(?P<name>\w+)(?:\((?P<base>\w+)\))?(?:\s+exit (?P<code>\d+))?(?:\s.*)?")

FAILURE = Failure(type="OSError", message="disk full: \u00fc", traceback="Traceback ...\n")

# One error of each class, no attribute at its default.
CORRUPTION = {"key": "modeling/x.safetensors#a.b", "expected": "00ff", "actual": "ff00", "target_modified": True}
SAMPLES: dict[str, CheckpointError] = {
    **{
        name: getattr(errors, name)(f"{name}: what, where, what next")
        for name in (
            "CheckpointError",
            "UsageError",
            "NotFoundError",
            "AlreadyExistsError",
            "TornCheckpointError",
            "TornSnapshotError",
            "SaveCancelledError",
            "RootBusyError",
            "FencedError",
            "UnsupportedFormatError",
            "DistributedError",
        )
    },
    **{
        name: getattr(errors, name)(f"{name} message", **CORRUPTION)
        for name in ("CorruptionError", "ManifestError", "ChecksumError", "TruncatedError")
    },
    "MismatchError": errors.MismatchError(
        "differs", missing=["a"], unexpected=["b", "c"], mismatched=["d: [2] vs [3]"]
    ),
    "ResumeMismatchError": errors.ResumeMismatchError("not what was saved", differences=["a: 1 then, 2 now", "b"]),
    "StorageError": errors.StorageError("no space", key="epoch-0_step-1/x", op="pwrite", retryable=True, errno=28),
    "PeerError": errors.PeerError("2 ranks failed", failures={3: FAILURE, 1: FAILURE}),
    "CollectiveTimeout": errors.CollectiveTimeout("silent", waiting_for=[1, 5]),
    "CommitUnknownError": errors.CommitUnknownError("no verdict", attempt_id="0123abcd"),
}


@dataclass(frozen=True)
class Told:
    bases: tuple[str, ...]
    exit_code: int


def told_tree() -> dict[str, Told]:
    """Read the tree in the module's docstring."""
    assert errors.__doc__ is not None
    block = errors.__doc__.split("```")[1].strip().splitlines()
    told: dict[str, Told] = {}
    path: list[str] = []
    for line in block:
        match = LINE.fullmatch(line)
        assert match, line
        depth, odd = divmod(len(match["lead"]), 4)
        assert odd == 0, line
        name, base = match["name"], match["base"]
        parent = path[depth - 1] if depth else None
        bases = tuple(each for each in (parent, base) if each)
        code = int(match["code"]) if match["code"] or parent is None else told[parent].exit_code
        path[depth:] = [name]
        told[name] = Told(bases, code)
    return told


def real_tree() -> dict[str, Told]:
    """Read the tree of the classes themselves."""
    return {
        name: Told(tuple(base.__name__ for base in cls.__bases__), cls.exit_code)
        for name, cls in errors.error_classes().items()
        if cls.__module__ == errors.__name__
    }


def test_the_docstrings_tree_is_the_real_one() -> None:
    assert told_tree() == real_tree()


def test_foreign_bases_are_pythons_own() -> None:
    own = real_tree()
    foreign = {base for told in own.values() for base in told.bases if base not in own}
    assert foreign == {"Exception", "ValueError", "FileNotFoundError", "FileExistsError", "OSError", "TimeoutError"}
    assert all(issubclass(getattr(builtins, base), Exception) for base in foreign)


def test_exit_codes_tell_kinds_apart() -> None:
    kinds = {name: told.exit_code for name, told in real_tree().items() if "CheckpointError" in told.bases}
    assert kinds.pop("FencedError") == kinds["RootBusyError"]  # one meaning: the root is another run's
    assert len(set(kinds.values())) == len(kinds)
    assert all(2 <= code <= 125 for code in kinds.values())  # 126 and above are the shell's own


def test_there_is_a_sample_of_every_class() -> None:
    assert set(SAMPLES) == set(real_tree())
    assert all(type(error).__name__ == name for name, error in SAMPLES.items())


def assert_same(revived: object, original: CheckpointError) -> None:
    assert type(revived) is type(original)
    assert isinstance(revived, CheckpointError)
    assert vars(revived) == vars(original)
    assert revived.details() == original.details()
    assert (str(revived), revived.args) == (str(original), original.args)


@pytest.mark.parametrize("name", SAMPLES)
def test_errors_pickle_and_copy(name: str) -> None:
    original = SAMPLES[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_same(pickle.loads(pickle.dumps(original, protocol)), original)
    assert_same(copy.copy(original), original)
    assert_same(copy.deepcopy(original), original)


@pytest.mark.parametrize("name", SAMPLES)
def test_errors_travel_as_json(name: str) -> None:
    original = SAMPLES[name]
    fields = json.loads(json.dumps(errors.to_fields(original)))
    assert_same(errors.revive(fields), original)


@pytest.mark.parametrize("name", SAMPLES)
def test_details_are_the_attributes(name: str) -> None:
    error = SAMPLES[name]
    assert set(vars(error)) - {"message"} | ({"errno"} if name == "StorageError" else set()) == set(error.details())
