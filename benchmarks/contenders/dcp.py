"""`torch.distributed.checkpoint`: sync, into Hugging Face files, and async."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from benchmarks.contenders import AsyncContender, Contender
from benchmarks.rank import Rank
from benchmarks.subject import Subject


def state_dict_of(subject: Subject) -> dict[str, Any]:
    """Return what DCP's documentation tells a training loop to save."""
    if subject.optimizer is None:
        return {"model": get_model_state_dict(subject.model)}
    model, optimizer = get_state_dict(subject.model, subject.optimizer)
    return {"model": model, "optimizer": optimizer}


class Dcp(Contender):
    """`dcp.save` and `dcp.load` on a filesystem.

    Args:
        num_threads: of each rank's writer.
    """

    def __init__(self, rank: Rank, home: Path, *, num_threads: int) -> None:
        super().__init__(rank, home)
        self._num_threads = num_threads

    def save(self, index: int) -> Path:
        """Collect the state dict and save it."""
        path = self.home / str(index)
        writer = FileSystemWriter(path, sync_files=True, thread_count=self._num_threads)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        save(state_dict_of(self.subject), storage_writer=writer, planner=planner)
        return path

    def load(self, path: Path) -> None:
        """Load in place and install."""
        state = state_dict_of(self.subject)
        load(state, storage_reader=FileSystemReader(path))
        if self.subject.optimizer is not None:
            set_state_dict(
                self.subject.model,
                self.subject.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        else:
            set_model_state_dict(self.subject.model, state["model"])


class DcpHuggingFace(Contender):
    """`dcp.save` into safetensors shards, consolidated into whole tensors at once."""

    def save(self, index: int) -> Path:
        """Save all weights and moments as one flat dict of DTensors: this writer takes nothing else."""
        path = self.home / str(index)
        state = state_dict_of(self.subject)
        tensors = dict(state["model"])
        for name, moments in state["optimizer"]["state"].items():
            tensors |= {f"{name}.{kind}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
        writer = HuggingFaceStorageWriter(
            str(path), thread_count=2, save_distributed=True, enable_consolidation=True, thread_count_consolidation=2
        )
        save(tensors, storage_writer=writer)
        return path


class DcpAsync(AsyncContender):
    """`dcp.async_save`, with a stager that is kept from save to save.

    Args:
        rank: the rank.
        home: a directory of its own.
        in_background: stage in a thread.
        shared: stage into shared memory.
        process: write in a process, not in a thread.
    """

    def __init__(self, rank: Rank, home: Path, *, in_background: bool, shared: bool, process: bool) -> None:
        super().__init__(rank, home)
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=in_background,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._group: Any = dist.new_group(backend="gloo")  # the training uses the other one meanwhile
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None

    def start(self, index: int) -> Path:
        """Begin a save; with a background stager it returns before the copies are made."""
        path = self.home / str(index)
        response: Any = async_save(
            state_dict_of(self.subject),
            storage_writer=FileSystemWriter(path, sync_files=True, thread_count=1),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged, self._written = response.staging_completion, response.upload_completion
        else:
            self._staged, self._written = None, response
        return path

    def wait_staged(self) -> None:
        """Wait for the stager."""
        if self._staged is not None:
            self._staged.result()

    def wait_written(self) -> None:
        """Wait for the writer."""
        if self._written is not None:
            self._written.result()

    def written(self) -> bool:
        """Ask the writer."""
        return self._written is None or self._written.done()

    def close(self) -> None:
        """End the stager."""
        self._stager.close()
