"""Do all ranks agree on how a save ended, when one of them is interrupted or disagrees while others still write?"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from shardpoint.adapters.collect import Collected
from shardpoint.adapters.names import name_tensors
from shardpoint.adapters.state import RunState
from shardpoint.catalog import verify
from shardpoint.comm import Comm, SoloComm, in_process_comms
from shardpoint.commit import committed_checkpoints
from shardpoint.engine import SaveAttempt, SaveRequest, SaveResult, StructureCache, save
from shardpoint.errors import CommitUnknownError, DistributedError, PeerError, StorageError, UsageError
from shardpoint.planning import PartNaming
from shardpoint.storage import BufferPool, LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.training import on_disk
from tests.unit.comm.threads import run_threads

plans_module: Any = importlib.import_module("shardpoint.engine.plans")


def save_on(
    root: Path,
    faults: dict[int, list[Fault]],
    step: int,
    collect: Callable[[Collected], None] = lambda _: None,
    world_size: int = 2,
) -> list[Any]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(step)

    def rank_main(comm: Comm) -> SaveResult:
        def gather() -> Collected:
            collected = Collected(comm.rank)
            collected.add_model(name_tensors(model), "modeling", "adapter")
            collected.rank_documents[f"rng/rank-{comm.rank:05d}.json"] = b"{}"
            collect(collected)
            return collected

        request = SaveRequest(f"step-{step}", gather, RunState(0, step, step))
        store = FaultyStore(LocalStore(root), faults.get(comm.rank, []))
        return save(store, comm, request, StructureCache(), pool=BufferPool(2**21))

    return run_threads(in_process_comms(world_size, fanout=2), rank_main)


def visible(root: Path) -> list[str]:
    store = LocalStore(root)
    assert not [entry for entry in root.glob("step-*") if not (entry / "shardpoint.json").exists()]
    return [item.name for item in committed_checkpoints(store)]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_coordinator_is_interrupted_while_another_rank_still_writes(tmp_path: Path) -> None:
    assert all(isinstance(outcome, SaveResult) for outcome in save_on(tmp_path, {}, 1))
    swept = threading.Event()

    def wait() -> None:
        assert swept.wait(20)

    # Rank 1 is held in its write until the coordinator has deleted the attempt.
    faults = {
        0: [
            Fault("write", "*/attempt-step-2*", nth=2, action="call", then=interrupt),
            Fault("remove_tree", "*/attempt-step-2*", action="call", then=swept.set),
        ],
        1: [Fault("write_document", "*rank-00001*", action="call", then=wait)],
    }
    first, second = save_on(tmp_path, faults, 2)
    assert type(first) is KeyboardInterrupt
    assert type(second) is PeerError
    assert second.failures[0].type == "KeyboardInterrupt"
    assert visible(tmp_path) == ["step-1"]
    assert all(isinstance(outcome, SaveResult) for outcome in save_on(tmp_path, {}, 2))
    assert visible(tmp_path) == ["step-1", "step-2"]
    assert on_disk(tmp_path / "step-2" / "modeling")["weight"].unique().item() == 2


# The coordinator's own first write and close are those of the header, in another round.
@pytest.mark.parametrize(
    "rank, op, nth",
    [(0, "write", 2), (0, "sync", 1), (0, "close", 2), (0, "write_document", 1), (1, "write_document", 1)],
)
def test_a_rank_fails_while_it_writes(rank: int, op: str, nth: int, tmp_path: Path) -> None:
    save_on(tmp_path, {}, 1)
    pattern = "*rank-0000*" if op == "write_document" else "*/modeling/*"
    outcomes = save_on(tmp_path, {rank: [Fault(op, pattern, nth=nth)]}, 2)
    assert [type(outcome) for outcome in outcomes] == [PeerError, PeerError]
    assert [list(outcome.failures) for outcome in outcomes] == [[rank], [rank]]
    assert str(outcomes[0]) == str(outcomes[1])
    assert isinstance(outcomes[rank].__cause__, StorageError)
    assert visible(tmp_path) == ["step-1"]
    assert not list((tmp_path / ".shardpoint").rglob("attempt-*"))


def test_an_interruption_in_the_middle_of_the_commit_is_not_called_a_failure(tmp_path: Path) -> None:
    def after_the_rename() -> None:
        if (tmp_path / "step-1").exists():
            raise KeyboardInterrupt

    faults = [Fault("sync_directory", "", nth=nth, action="call", then=after_the_rename) for nth in range(1, 9)]
    first, second = save_on(tmp_path, {0: faults}, 1)
    assert type(first) is CommitUnknownError
    assert type(second) is CommitUnknownError
    (found,) = committed_checkpoints(LocalStore(tmp_path))
    assert found.manifest is not None
    assert found.manifest.checkpoint_id == first.attempt_id == second.attempt_id


def test_documents_that_must_be_equal(tmp_path: Path) -> None:
    def differ(collected: Collected) -> None:
        collected.documents["lr_scheduler.json"] = str(collected.rank).encode()

    outcomes = save_on(tmp_path, {}, 1, differ)
    assert [type(outcome) for outcome in outcomes] == [UsageError, UsageError]
    assert "lr_scheduler.json differs between ranks" in str(outcomes[0])
    assert visible(tmp_path) == []


def test_the_cache_sees_a_changed_model(tmp_path: Path) -> None:
    cache, pool = StructureCache(), BufferPool(2**21)

    def once(model: nn.Module, step: int) -> list[Any]:
        def gather() -> Collected:
            collected = Collected(0)
            collected.add_model(name_tensors(model), "modeling", "adapter")
            return collected

        comm = in_process_comms(1)[0]
        return [
            save(LocalStore(tmp_path), comm, SaveRequest(f"s{step}", gather, RunState(0, step, 0)), cache, pool=pool)
        ]

    once(nn.Linear(2, 2), 1)
    once(nn.Linear(2, 2), 2)
    once(nn.Linear(2, 3), 3)  # the same names
    once(nn.Linear(2, 2).double(), 4)
    stored = [on_disk(tmp_path / f"s{step}" / "modeling")["weight"] for step in (1, 2, 3, 4)]
    assert [tuple(tensor.shape) for tensor in stored] == [(2, 2), (2, 2), (3, 2), (2, 2)]
    assert stored[3].dtype == torch.float64


def test_ranks_that_lay_files_out_differently_commit_nothing(tmp_path: Path) -> None:
    def other_names(collected: Collected) -> None:
        if collected.rank == 1:
            collected.naming["modeling"] = PartNaming("model", variant="fp32")

    outcomes = save_on(tmp_path, {}, 1, other_names)
    assert [type(outcome) for outcome in outcomes] == [PeerError, PeerError]
    assert "lays out the files differently" in outcomes[0].failures[1].message
    assert visible(tmp_path) == []


def test_what_ranks_wrote_comes_up_the_tree_whole_and_in_order(tmp_path: Path) -> None:
    outcomes = save_on(tmp_path, {}, 1, world_size=8)
    assert all(isinstance(outcome, SaveResult) for outcome in outcomes), outcomes
    manifest = json.loads((tmp_path / "step-1" / "shardpoint.json").read_bytes())
    own = [file["path"] for file in manifest["files"] if file["path"].startswith("rng/")]
    assert own == [f"rng/rank-{rank:05d}.json" for rank in range(8)]
    (committed,) = committed_checkpoints(LocalStore(tmp_path))
    assert verify(LocalStore(tmp_path), committed).ok


@pytest.mark.parametrize("stray", [1, 3])
def test_a_rank_that_voted_on_another_attempt_is_noticed_through_the_tree(
    stray: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SaveAttempt._write

    def confused(*arguments: Any) -> Any:
        written = write(*arguments)
        ranks = list(written.attempts.values())
        return msgspec.structs.replace(written, attempts={"of yesterday": stray}) if ranks == [stray] else written

    monkeypatch.setattr(SaveAttempt, "_write", confused)
    errors = save_on(tmp_path, {}, 1, world_size=5)
    assert [type(error) for error in errors] == [DistributedError] * 5
    assert all(f"{{{stray}: 'of yesterday'}}" in str(error) for error in errors)
    assert visible(tmp_path) == []


def test_a_byte_without_a_writer_is_noticed_through_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SaveAttempt._write

    def forgetful(*arguments: Any) -> Any:
        written = write(*arguments)
        return msgspec.structs.replace(written, partials=b"") if written.partials else written

    monkeypatch.setattr(SaveAttempt, "_write", forgetful)
    errors = save_on(tmp_path, {}, 1, world_size=5)
    assert [type(error) for error in errors] == [DistributedError] * 5
    assert all("modeling: weight: 0 of 16 bytes" in str(error) for error in errors)
    assert visible(tmp_path) == []


def test_a_structure_that_was_saved_before_is_not_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    for name in ("plan_files", "owned_items"):
        make = getattr(plans_module, name)

        def count(*arguments: Any, name: str = name, make: Any = make) -> Any:
            planned.append(name)
            return make(*arguments)

        monkeypatch.setattr(plans_module, name, count)
    cache = StructureCache()

    def once(step: int, model: nn.Module) -> SaveResult:
        def gather() -> Collected:
            collected = Collected(0)
            collected.add_model(name_tensors(model), "modeling", "adapter")
            return collected

        return save(
            LocalStore(tmp_path), SoloComm(), SaveRequest(f"step-{step}", gather), cache, pool=BufferPool(2**21)
        )

    once(1, nn.Linear(2, 2))
    assert sorted(planned) == ["owned_items", "plan_files"]
    once(2, nn.Linear(2, 2))
    assert sorted(planned) == ["owned_items", "plan_files"]
    once(3, nn.Linear(2, 3))
    assert sorted(planned) == ["owned_items", "owned_items", "plan_files", "plan_files"]
