"""What a user imports: the public names, each loaded on first use.

`import shardpoint` loads neither torch nor numpy; `shardpoint.save_checkpoint` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardpoint.adapters.state import RunState, TrainState
    from shardpoint.booster import Booster, DistCoordinator
    from shardpoint.checkpointer import Checkpointer
    from shardpoint.ckpt_io import load_checkpoint, load_json, save_checkpoint, save_json
    from shardpoint.engine import Checkpoint, PendingSave, ReadResult, SaveResult, TensorInfo, open_checkpoint
    from shardpoint.errors import (
        AlreadyExistsError,
        CheckpointError,
        ChecksumError,
        CollectiveTimeout,
        CommitUnknownError,
        CorruptionError,
        DistributedError,
        FencedError,
        ManifestError,
        MismatchError,
        NotFoundError,
        PeerError,
        ResumeMismatchError,
        RootBusyError,
        SaveCancelledError,
        StorageError,
        TornCheckpointError,
        TornSnapshotError,
        TruncatedError,
        UnsupportedFormatError,
        UsageError,
    )
    from shardpoint.loading import load
    from shardpoint.policies import At, Best, Every, EveryNth, Latest, NewerThan, OnPreemption, Pinned

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "At",
    "Best",
    "Booster",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "ChecksumError",
    "CollectiveTimeout",
    "CommitUnknownError",
    "CorruptionError",
    "DistCoordinator",
    "DistributedError",
    "Every",
    "EveryNth",
    "FencedError",
    "Latest",
    "ManifestError",
    "MismatchError",
    "NewerThan",
    "NotFoundError",
    "OnPreemption",
    "PeerError",
    "PendingSave",
    "Pinned",
    "ReadResult",
    "ResumeMismatchError",
    "RootBusyError",
    "RunState",
    "SaveCancelledError",
    "SaveResult",
    "StorageError",
    "TensorInfo",
    "TornCheckpointError",
    "TornSnapshotError",
    "TrainState",
    "TruncatedError",
    "UnsupportedFormatError",
    "UsageError",
    "__version__",
    "load",
    "load_checkpoint",
    "load_json",
    "open_checkpoint",
    "save_checkpoint",
    "save_json",
]

# name -> the module that defines it; an error class's is shardpoint.errors
_HOMES = {
    "At": "shardpoint.policies",
    "Best": "shardpoint.policies",
    "Booster": "shardpoint.booster",
    "Checkpoint": "shardpoint.engine",
    "Checkpointer": "shardpoint.checkpointer",
    "DistCoordinator": "shardpoint.booster",
    "Every": "shardpoint.policies",
    "EveryNth": "shardpoint.policies",
    "Latest": "shardpoint.policies",
    "NewerThan": "shardpoint.policies",
    "OnPreemption": "shardpoint.policies",
    "PendingSave": "shardpoint.engine",
    "Pinned": "shardpoint.policies",
    "ReadResult": "shardpoint.engine",
    "RunState": "shardpoint.adapters.state",
    "SaveResult": "shardpoint.engine",
    "TensorInfo": "shardpoint.engine",
    "TrainState": "shardpoint.adapters.state",
    "load": "shardpoint.loading",
    "load_checkpoint": "shardpoint.ckpt_io",
    "load_json": "shardpoint.ckpt_io",
    "open_checkpoint": "shardpoint.engine",
    "save_checkpoint": "shardpoint.ckpt_io",
    "save_json": "shardpoint.ckpt_io",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "shardpoint.errors")), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
