"""The systems that are compared: a common interface, and what each is called, set to, and promises."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rank import Rank


class Contender(ABC):
    """One system, on one rank.

    Args:
        rank: the rank, with the training state to save and load into.
        home: a directory of its own, the same on all ranks; it exists.
    """

    def __init__(self, rank: Rank, home: Path) -> None:
        self.rank = rank
        self.subject = rank.subject
        self.home = home

    @abstractmethod
    def save(self, index: int) -> Path:
        """Save the training state and return the directory that it is in, the same on all ranks.

        Args:
            index: different in every call.
        """

    def load(self, path: Path) -> None:
        """Fill the live training state from what `save` wrote."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give everything back."""


class AsyncContender(Contender):
    """A system that saves while the training goes on."""

    @abstractmethod
    def start(self, index: int) -> Path:
        """Begin a save: what a training loop calls."""

    @abstractmethod
    def wait_staged(self) -> None:
        """Wait until the trainer may change the weights."""

    @abstractmethod
    def wait_written(self) -> None:
        """Wait until the save has ended."""

    @abstractmethod
    def written(self) -> bool:
        """Return whether the save has ended."""

    def blocked_s(self) -> float | None:
        """Return the seconds that the last save blocked its caller so far, where the system itself counts them."""
        return None

    def save(self, index: int) -> Path:
        """Save, and wait for the end."""
        path = self.start(index)
        self.wait_written()
        return path


@dataclass(frozen=True)
class Entry:
    """What there is to say about a contender before it is loaded.

    Attributes:
        label: its name in the tables.
        where: "module:class" below this package.
        settings: what it is set to, and why that is its best.
        durability: what is durable when the clock stops, and who made it so.
        syncs_itself: nothing is left to be synced by the benchmark.
        arguments: given to the class.
        job: which ranks it runs in: "main", or those of another environment.
    """

    label: str
    where: str
    settings: str
    durability: str
    syncs_itself: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    job: str = "main"


OWN = "its own fsync of files and directories"
AFTERWARDS = "none of its own; every file and directory synced afterwards, in the measured time"
FILES_OWN = "its own fsync of data files; metadata and directories synced afterwards, in the measured time"

ENTRIES: dict[str, Entry] = {
    "raw_direct": Entry(
        "raw O_DIRECT",
        "raw:RawDirect",
        "the limit: 16 MiB aligned O_DIRECT pwrite from huge pages that are there already, 2 threads per process, "
        "one preallocated file per process",
        OWN,
        syncs_itself=True,
    ),
    "raw_preadv": Entry(
        "raw preadv", "raw:RawPreadv", "the limit: 16 MiB preadv into reused tensors, 1 thread per process", OWN
    ),
    "memcpy": Entry("memcpy", "raw:Memcpy", "copies into memory that was written before", "nothing written"),
    "shardpoint": Entry(
        "Shardpoint", "shardpoint:Sync", "Checkpointer.save; Checkpointer.resume", OWN, syncs_itself=True
    ),
    "shardpoint_async": Entry(
        "Shardpoint async", "shardpoint:Async", "Checkpointer(async_save=True)", OWN, syncs_itself=True
    ),
    "torch_save": Entry(
        "torch.save", "single_file:TorchSave", "each rank its own shards; loads with mmap=True, then copies", AFTERWARDS
    ),
    "safetensors": Entry(
        "safetensors",
        "single_file:Safetensors",
        "save_file, each rank its own shards; loads with load_file, then copies",
        AFTERWARDS,
    ),
    "dcp_1": Entry(
        "DCP, 1 thread",
        "dcp:Dcp",
        "FileSystemWriter(thread_count=1, sync_files=True), cached plans",
        FILES_OWN,
        arguments={"num_threads": 1},
    ),
    "dcp_2": Entry(
        "DCP, 2 threads",
        "dcp:Dcp",
        "FileSystemWriter(thread_count=2, sync_files=True), cached plans",
        FILES_OWN,
        arguments={"num_threads": 2},
    ),
    "dcp_hf": Entry(
        "DCP, Hugging Face consolidated",
        "dcp:DcpHuggingFace",
        "HuggingFaceStorageWriter(save_distributed=True, enable_consolidation=True), 2 threads for each half; "
        "tensors only",
        AFTERWARDS,
    ),
    "dcp_async_cached": Entry(
        "DCP async, blocking stager",
        "dcp:DcpAsync",
        "async_save in a thread; DefaultStager kept from save to save, unpinned, not shared, copies in the caller",
        FILES_OWN,
        arguments={"in_background": False, "shared": False, "process": False},
    ),
    "dcp_async_background": Entry(
        "DCP async, background stager",
        "dcp:DcpAsync",
        "async_save in a thread; DefaultStager kept from save to save, unpinned, not shared, copies in a thread",
        FILES_OWN,
        arguments={"in_background": True, "shared": False, "process": False},
    ),
    "dcp_async_shared": Entry(
        "DCP async, shared stager",
        "dcp:DcpAsync",
        "async_save in a thread; DefaultStager kept from save to save, unpinned, in shared memory, copies in a thread",
        FILES_OWN,
        arguments={"in_background": True, "shared": True, "process": False},
    ),
    "dcp_async_process": Entry(
        "DCP async, process",
        "dcp:DcpAsync",
        "async_save in a process; DefaultStager kept from save to save, unpinned, in shared memory, copies in a thread",
        FILES_OWN,
        arguments={"in_background": True, "shared": True, "process": True},
    ),
    "torch_checkpointing": Entry(
        "torch-checkpointing",
        "torch_ckpt:Sync",
        "CheckpointManager, sync saver, use_direct_io=False (its default fails here), 2 file threads, no resharder (it "
        "wants CUDA): it can be loaded by the same ranks only",
        AFTERWARDS,
    ),
    "torch_checkpointing_async": Entry(
        "torch-checkpointing async",
        "torch_ckpt:Async",
        "CheckpointManager, async saver: background staging into shared memory, unpinned, blocking copies, "
        "use_direct_io=False, 2 file threads, lock() around optimizer.step",
        AFTERWARDS,
    ),
    "accelerate": Entry(
        "Accelerate save_state, DDP",
        "accelerate_state:SaveState",
        "Accelerator(cpu=True), which is DDP: its FSDP is for accelerators only; rank 0 writes everything",
        AFTERWARDS,
    ),
    "colossalai_zero": Entry(
        "ColossalAI, ZeRO-2",
        "colossal:Zero",
        "0.5.0, LowLevelZeroPlugin(stage=2, precision='fp32'); save_model and save_optimizer with shard=True, as "
        "ColossalChat calls them; in an environment of its own",
        AFTERWARDS,
        job="colossalai",
    ),
    "colossalai_ddp": Entry(
        "ColossalAI, DDP",
        "colossal:Ddp",
        "0.5.0, TorchDDPPlugin; save_model and save_optimizer with shard=True, as ColossalChat calls them; in an "
        "environment of its own",
        AFTERWARDS,
        job="colossalai",
    ),
}


def prepare(rank: Rank, *, name: str, home: str) -> str:
    """Make a contender ready on this rank; the second time it stands already.

    Returns:
        The version of the module that it is from, if it says one.
    """
    if name not in rank.contenders:
        entry = ENTRIES[name]
        module, kind = entry.where.split(":")
        folder = Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        make = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), kind)
        rank.contenders[name] = make(rank, folder, **entry.arguments)
    return name
