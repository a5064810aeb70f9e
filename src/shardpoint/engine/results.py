"""What a save and a load give back: evidence, not just success."""

from __future__ import annotations

from dataclasses import dataclass

from shardpoint.manifest import Suspect


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What was committed.

    Attributes:
        name: the checkpoint's name in its root.
        path: where it is.
        checkpoint_id: 32 hex digits.
        sequence: the commit sequence number.
        num_bytes: bytes of all files but the manifest.
        linked_bytes: those of files that were not written, but linked: an earlier checkpoint has the same.
        num_tensors: tensors stored.
        seconds: wall time of the save on this rank.
        notes: what a person should know (a filesystem that could not reserve space).
        suspect: what looked wrong in the state that was saved (replicas that differ, NaN), or None. The checkpoint is
            committed all the same, and `Checkpointer.resume` prefers one that is not suspect.
    """

    name: str
    path: str
    checkpoint_id: str
    sequence: int
    num_bytes: int
    linked_bytes: int
    num_tensors: int
    seconds: float
    notes: tuple[str, ...] = ()
    suspect: Suspect | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was loaded.

    Attributes:
        name: the checkpoint.
        num_bytes: bytes that this rank read into tensors.
        num_tensors: tensors that this rank filled (a part of).
        seconds: wall time of the load on this rank.
        verified: True when every tensor's checksum was compared; False for files without a manifest.
        missing: names of the target that the checkpoint lacks, left as they were (`strict=False`, `allow_missing`).
        unexpected: names of the checkpoint that the target lacks (`strict=False`, `allow_unexpected`).
        read_bytes: bytes that this rank asked the store for: `num_bytes`, and what lies between neighbours.
        cast: weights that were converted, each with the stored dtype and its own (`allow_cast`).
        idle: patterns of `allow_missing` and `allow_unexpected` that no name matches.
    """

    name: str
    num_bytes: int
    num_tensors: int
    seconds: float
    verified: bool
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    read_bytes: int = 0
    cast: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
