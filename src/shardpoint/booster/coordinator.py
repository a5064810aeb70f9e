"""Who is the master, and how ranks wait for one another: `DistCoordinator`, with ColossalAI's contract."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from shardpoint.booster import launch
from shardpoint.errors import DistributedError, Failure, PeerError, UsageError

P = ParamSpec("P")
T = TypeVar("T")

_NOTICE_BYTES = 4096


class DistCoordinator:
    """Answer questions about this rank, and order work between ranks.

    It holds no state: every answer is read when it is asked for. So a coordinator made before
    `torch.distributed.init_process_group` (or without it, in one process) is right before and after, and two of them
    always agree; the original, a singleton that caches at construction, needs an initialised group first and keeps a
    stale rank when the group is made anew. Before initialisation the launcher's `RANK` and `WORLD_SIZE` are the answer,
    and methods that wait for other ranks first join the group that the launcher describes.

    A `process_group` is asked in its own terms: the master of a group is *its* rank 0, whatever that one's global rank.

    Examples:
        >>> coordinator = DistCoordinator()
        >>> coordinator.is_master()
        True
        >>> coordinator.print_on_master("hello")
        hello
    """

    @property
    def rank(self) -> int:
        """This process's global rank.

        Raises:
            UsageError: the launcher's variables contradict themselves.
        """
        return launch.rank_and_world()[0]

    @property
    def world_size(self) -> int:
        """The number of ranks.

        Raises:
            UsageError: the launcher's variables contradict themselves.
        """
        return launch.rank_and_world()[1]

    @property
    def local_rank(self) -> int:
        """This process's rank within its node (the original says -1 where it does not know; this raises).

        Raises:
            UsageError: there are several ranks and no launcher said which of them share a node.
        """
        return launch.local_rank()

    def is_master(self, process_group: dist.ProcessGroup | None = None) -> bool:
        """Tell whether this process is rank 0 of the group (of all ranks by default); False outside the group."""
        return _position(process_group)[0] == 0

    def is_node_master(self) -> bool:
        """Tell whether this process is the first of its node.

        Raises:
            UsageError: as for `local_rank`.
        """
        return self.local_rank == 0

    def is_last_process(self, process_group: dist.ProcessGroup | None = None) -> bool:
        """Tell whether this process is the last rank of the group; False outside the group."""
        rank, world_size = _position(process_group)
        return rank is not None and rank == world_size - 1

    def print_on_master(self, msg: str, process_group: dist.ProcessGroup | None = None) -> None:
        """Print a message on the group's rank 0, and flush it."""
        if self.is_master(process_group):
            print(msg, flush=True)  # noqa: T201 - printing is what was asked for

    def print_on_node_master(self, msg: str) -> None:
        """Print a message on the first rank of every node, and flush it.

        Raises:
            UsageError: as for `local_rank`.
        """
        if self.is_node_master():
            print(msg, flush=True)  # noqa: T201 - printing is what was asked for

    @contextmanager
    def priority_execution(
        self, executor_rank: int = 0, process_group: dist.ProcessGroup | None = None
    ) -> Iterator[None]:
        """Run the body on one rank first, and on the others when it has succeeded there.

        When the body fails on the executor, it raises its own error there, and the others raise a `PeerError` that
        names it *instead of running the body*: what they would build on (a download, a cache) is not there. When the
        body fails on another rank, that rank alone raises: nobody waits for it here.

        Args:
            executor_rank: who goes first, as a rank of the group.
            process_group: the ranks that take part; all by default.

        Raises:
            UsageError: there is no such rank in the group, or this process is not in the group (it would run the body
                unguarded).
            PeerError: the executor's body failed.
            DistributedError: the executor died in the body, or the group's timeout is over.

        Collective:
            Every rank of the group, one broadcast. The others wait at most as long as the group's timeout.

        Examples:
            >>> with DistCoordinator().priority_execution():
            ...     tokens = [1, 2, 3]
        """
        rank, world_size = _join(process_group)
        if rank is None:
            raise UsageError("priority_execution: this process is not in the process_group that was given")
        if not 0 <= executor_rank < world_size:
            raise UsageError(f"priority_execution: executor_rank={executor_rank}, but the group has {world_size} ranks")
        if world_size == 1:
            yield
            return
        if rank != executor_rank:
            failure = _receive_notice(executor_rank, process_group)
            if failure is not None:
                message = f"rank {executor_rank} failed in priority_execution: {failure.type}: {failure.message}"
                raise PeerError(message, failures={executor_rank: failure})
            yield
            return
        try:
            yield
        except BaseException as error:
            # Order: the others hear of it before this rank unwinds; otherwise they wait for a rank that is leaving.
            try:
                _send_notice(Failure.of(error), executor_rank, process_group)
            except Exception as undelivered:  # noqa: BLE001 - the first error must reach the caller, whatever this one is
                error.add_note(f"and the other ranks could not be told: {undelivered}")
            raise
        _send_notice(None, executor_rank, process_group)

    def destroy(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Destroy a process group (the default one, and all others with it, by default); nothing if there is none.

        Order: let go of DDP models first (leave the function that holds them, as `examples/sft.py` does). On gloo a DDP
        module that is freed after its group was destroyed can hang: it waits for gloo's thread with the GIL held
        (torch 2.13; 11 of 26 runs hung, none of 40 in this order).
        """
        if launch.is_distributed():
            dist.destroy_process_group(process_group)

    def block_all(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Wait until every rank of the group is here.

        Ranks outside the group return at once.

        Collective:
            Every rank of the group, one barrier.
        """
        rank, world_size = _join(process_group)
        if rank is not None and world_size > 1:
            dist.barrier(group=process_group)

    def on_master_only(
        self, process_group: dist.ProcessGroup | None = None
    ) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
        """Make a decorator that runs the function on the group's rank 0 only; elsewhere a call returns None.

        Who the master is is asked at each call, so a module may decorate its functions before the ranks have joined.

        Examples:
            >>> @DistCoordinator().on_master_only()
            ... def double(value: int) -> int:
            ...     return 2 * value
            >>> double(4)
            8
        """

        def decorate(function: Callable[P, T]) -> Callable[P, T | None]:
            @functools.wraps(function)
            def run(*args: P.args, **kwargs: P.kwargs) -> T | None:
                return function(*args, **kwargs) if self.is_master(process_group) else None

            return run

        return decorate


def _position(process_group: dist.ProcessGroup | None) -> tuple[int | None, int]:
    """Return this process's rank in the group (None outside it) and the group's size."""
    if process_group is None:
        return launch.rank_and_world()
    rank = dist.get_rank(process_group)  # -1 outside the group
    return (rank, dist.get_world_size(process_group)) if rank >= 0 else (None, 0)


def _join(process_group: dist.ProcessGroup | None) -> tuple[int | None, int]:
    if process_group is None and launch.rank_and_world()[1] > 1:
        launch.join_ranks()
    return _position(process_group)


def _send_notice(failure: Failure | None, executor_rank: int, process_group: dist.ProcessGroup | None) -> None:
    # Fixed size: the receivers cannot know how long the news is. Text is cut so that it fits after JSON's escapes too.
    fields = None if failure is None else [failure.type[:200], failure.message[:1000], failure.traceback[-2000:]]
    text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
    if len(text) > _NOTICE_BYTES and fields is not None:
        text = json.dumps([fields[0], ascii(fields[1])[:1000], ""]).encode()
    notice = torch.frombuffer(bytearray(text.ljust(_NOTICE_BYTES)), dtype=torch.uint8).to(_group_device(process_group))
    dist.broadcast(notice, group=process_group, group_src=executor_rank)


def _receive_notice(executor_rank: int, process_group: dist.ProcessGroup | None) -> Failure | None:
    notice = torch.zeros(_NOTICE_BYTES, dtype=torch.uint8, device=_group_device(process_group))
    try:
        dist.broadcast(notice, group=process_group, group_src=executor_rank)
    except RuntimeError as error:
        message = f"priority_execution: rank {executor_rank} ended without a word, or took too long: {error}"
        raise DistributedError(message) from error
    fields = json.loads(bytes(notice.tolist()))
    return None if fields is None else Failure(*fields)


def _group_device(process_group: dist.ProcessGroup | None) -> torch.device:
    if "cpu:" in dist.get_backend_config(process_group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None else torch.device("cpu")
