"""Which ranks the launcher started, how they join, and which device this one trains on.

The launcher's contract is torchrun's environment (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, `LOCAL_RANK`).
Once torch.distributed is initialised, by whomever, it alone is asked: the environment counts only before that.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from shardpoint.errors import UsageError

# Launchers other than torchrun: (their name for the rank within the node, their name for the rank). A pair counts only
# where its rank is this process's: a process that a batch step's script spawned inherits the step's variables.
_LOCAL_RANK_PAIRS = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK"),
    ("MPI_LOCALRANKID", "PMI_RANK"),
    ("SLURM_LOCALID", "SLURM_PROCID"),
)


def is_distributed() -> bool:
    """Tell whether torch.distributed is initialised in this process."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks.

    Returns:
        torch.distributed's numbers once it is initialised; before that the launcher's; `(0, 1)` without a launcher.

    Raises:
        UsageError: the launcher's variables contradict themselves.
    """
    if is_distributed():
        return dist.get_rank(), dist.get_world_size()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if rank >= world_size:
        raise UsageError(f"the launcher's RANK={rank} and WORLD_SIZE={world_size} contradict each other")
    return rank, world_size


def local_rank() -> int:
    """Return this process's rank within its node.

    Returns:
        `LOCAL_RANK` where the launcher set it, else what Open MPI, Intel MPI or Slurm say about this very rank, else 0
        for a run of one process.

    Raises:
        UsageError: there are several ranks and no launcher said which of them share a node.
    """
    if "LOCAL_RANK" in os.environ:
        return _number("LOCAL_RANK")
    rank, world_size = rank_and_world()
    for local_name, rank_name in _LOCAL_RANK_PAIRS:
        if local_name in os.environ and os.environ.get(rank_name) == str(rank):
            return _number(local_name)
    if world_size == 1:
        return 0
    raise UsageError(
        f"rank {rank} of {world_size} cannot tell which ranks share its node: LOCAL_RANK is not in the environment; "
        "start the ranks with torchrun, or set LOCAL_RANK for each of them"
    )


def join_ranks() -> None:
    """Initialise torch.distributed, if nobody has, with the ranks that the launcher started.

    The backend is gloo, and beside it the accelerator's own where there is an accelerator. Without a launcher the group
    has one rank, and lives in this process only.

    Raises:
        UsageError: the launcher's variables are incomplete, or this torch has no distributed package.

    Collective:
        Every rank, where the launcher started several.
    """
    if not dist.is_available():
        raise UsageError("this build of torch has no torch.distributed; only Booster(plugin=None) works with it")
    if dist.is_initialized():
        return
    rank, world_size = rank_and_world()
    backend = "gloo"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.accelerator.set_device_index(local_rank() % torch.accelerator.device_count())
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    missing = sorted({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys())
    if not missing:
        dist.init_process_group(backend)
    elif world_size > 1:
        raise UsageError(
            f"RANK={rank} and WORLD_SIZE={world_size} are in the environment but not {', '.join(missing)}; start the "
            "ranks with torchrun, or call torch.distributed.init_process_group yourself"
        )
    else:
        store = dist.HashStore()  # type: ignore[attr-defined] # torch exports it at run time only
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def training_device(requested: str | torch.device | None) -> torch.device:
    """Return the device that a plugin trains on: the requested one, else the best that the process group reaches.

    Args:
        requested: the Booster's `device`; None leaves the choice to what the group's backends can reduce.
    """
    if requested is not None:
        return torch.device(requested)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and _has_own_backend(accelerator.type):
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def _has_own_backend(device_type: str) -> bool:
    # "cpu:gloo,cuda:nccl"; a group made with backend="gloo" says "cpu:gloo,cuda:gloo": whoever asked for gloo alone
    # asked for the CPU.
    backends = dict(pair.split(":", 1) for pair in dist.get_backend_config().split(",") if ":" in pair)
    return backends.get(device_type, "gloo") not in {"gloo", "undefined"}


def _number(name: str) -> int:
    text = os.environ[name]
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"the environment's {name}={text!r} is not a rank or a number of ranks")
    return value
