from __future__ import annotations

import pytest
import torch.distributed as dist

from shardpoint.booster import DistCoordinator
from shardpoint.errors import UsageError


def test_one_process_needs_no_torch_distributed() -> None:
    coordinator = DistCoordinator()
    assert (coordinator.rank, coordinator.world_size, coordinator.local_rank) == (0, 1, 0)
    assert coordinator.is_master()
    assert coordinator.is_node_master()
    assert coordinator.is_last_process()
    coordinator.block_all()
    coordinator.destroy()
    with coordinator.priority_execution():
        pass
    assert not dist.is_initialized()


def test_the_launcher_counts_before_the_ranks_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = DistCoordinator()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (coordinator.rank, coordinator.world_size, coordinator.local_rank) == (3, 4, 1)
    assert not coordinator.is_master()
    assert not coordinator.is_node_master()
    assert coordinator.is_last_process()


def test_torch_distributed_counts_once_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    coordinator = DistCoordinator()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    assert (coordinator.rank, coordinator.world_size) == (0, 1)
    assert coordinator.is_master(dist.group.WORLD)
    assert coordinator.is_last_process(dist.group.WORLD)
    coordinator.destroy()
    assert not dist.is_initialized()
    coordinator.destroy()


def test_the_node_is_unknown_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    coordinator = DistCoordinator()
    with pytest.raises(UsageError, match="LOCAL_RANK"):
        coordinator.is_node_master()
    with pytest.raises(UsageError, match="LOCAL_RANK"):
        coordinator.print_on_node_master("x")


@pytest.mark.parametrize("task, expected", [("1", 1), ("0", None)])
def test_slurm_counts_only_for_the_task_itself(
    task: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_PROCID", task)
    monkeypatch.setenv("SLURM_LOCALID", task)
    if expected is None:  # spawned by task 0, whose variables it inherited
        with pytest.raises(UsageError):
            _ = DistCoordinator().local_rank
    else:
        assert DistCoordinator().local_rank == expected


@pytest.mark.parametrize("rank, world_size", [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0")])
def test_a_contradictory_launcher_is_refused(rank: str, world_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UsageError):
        _ = DistCoordinator().rank


def test_joining_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="MASTER_ADDR, MASTER_PORT"):
        DistCoordinator().block_all()


def test_printing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = DistCoordinator()
    coordinator.print_on_master("one")
    coordinator.print_on_node_master("two")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    coordinator.print_on_master("three")
    coordinator.print_on_node_master("four")
    assert capsys.readouterr().out == "one\ntwo\n"


def test_on_master_only_asks_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    @DistCoordinator().on_master_only()
    def double(value: int, *, plus: int = 0) -> int:
        """Double it."""
        return 2 * value + plus

    assert double(3, plus=1) == 7
    assert (double.__name__, double.__doc__) == ("double", "Double it.")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert double(3) is None


def test_priority_execution_passes_errors_and_refuses_ranks_that_are_not() -> None:
    coordinator = DistCoordinator()
    with pytest.raises(KeyError), coordinator.priority_execution():
        raise KeyError
    with pytest.raises(UsageError, match="executor_rank=1"), coordinator.priority_execution(executor_rank=1):
        pytest.fail("the body must not run")
