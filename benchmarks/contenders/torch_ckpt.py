"""torch-checkpointing: sync and async."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig, CheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.contenders import AsyncContender, Contender
from benchmarks.contenders.dcp import state_dict_of
from benchmarks.rank import Rank


def _manager(save: CheckpointSaverConfig) -> Any:
    # Without a resharder: with one, 0.1.1 gathers metadata through a tensor on "cuda", whatever the process group is.
    return CheckpointManager(
        CheckpointManager.Config(
            save=save,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
    )


class Sync(Contender):
    """A manager with a sync saver."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        self._manager = _manager(
            SyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(file_write_max_threads=2))
        )

    def save(self, index: int) -> Path:
        """Collect the state dict and save it."""
        path = self.home / str(index)
        self._manager.save(str(path), state_dict_of(self.subject))
        return path

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()


class Async(AsyncContender):
    """A manager with an async saver, which writes in a process of its own."""

    def __init__(self, rank: Rank, home: Path) -> None:
        super().__init__(rank, home)
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        writer = CheckpointWriterConfig(file_write_max_threads=2)
        self._manager = _manager(AsyncCheckpointSaverConfig(writer_config=writer, staging_config=staging))
        self._written: Future[Any] | None = None

    def start(self, index: int) -> Path:
        """Begin a save; the copies are made in a thread."""
        path = self.home / str(index)
        self._written = self._manager.save(str(path), state_dict_of(self.subject))
        return path

    def wait_staged(self) -> None:
        """Take the lock that its documentation puts around `optimizer.step`."""
        with self._manager.lock():
            pass

    def wait_written(self) -> None:
        """Wait for the writer."""
        if self._written is not None:
            self._written.result()

    def written(self) -> bool:
        """Ask the writer."""
        return self._written is None or self._written.done()

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()
