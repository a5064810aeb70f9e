"""Does a state that looks wrong mark its checkpoint, does a healthy one stay unmarked, and which one is resumed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, RunState, SaveResult, TrainState, load_checkpoint
from shardpoint.adapters.collect import Collected
from shardpoint.adapters.names import name_tensors
from shardpoint.adapters.state import RunState as Position
from shardpoint.booster import Booster
from shardpoint.catalog import open_path, training_checkpoints, verify
from shardpoint.comm import Comm, in_process_comms
from shardpoint.engine import SaveRequest, StructureCache, save
from shardpoint.engine.evidence import MAX_FINDINGS
from shardpoint.errors import UsageError
from shardpoint.events import Event
from shardpoint.manifest import Finding, Holders
from shardpoint.storage import BufferPool, LocalStore
from tests.training import flip
from tests.unit.comm.threads import run_threads

WIDTH = 160  # a square of floats is more than what is copied at once


class Masked(nn.Module):
    """A large and a small weight, a mask of -inf, and a statistic that became NaN: buffers may hold anything."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(WIDTH, WIDTH)
        self.small = nn.Linear(WIDTH, 2, dtype=torch.bfloat16)
        self.count = nn.Parameter(torch.tensor([2**31 - 1, -1], dtype=torch.int32), requires_grad=False)
        self.register_buffer("mask", torch.full((WIDTH, WIDTH), -torch.inf).triu(1))
        self.register_buffer("statistic", torch.tensor([torch.nan]))


def made(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = Masked()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return TrainState(model=model, optimizer=optimizer)


def tensor_of(state: TrainState, fqn: str, name: str | None) -> torch.Tensor:
    parameter = state.model.get_parameter(fqn)
    if name is None:
        return parameter.data
    assert state.optimizer is not None
    value = state.optimizer.state[parameter][name]
    assert isinstance(value, torch.Tensor)
    return value


def saved(checkpointer: Checkpointer, state: TrainState, number: int) -> SaveResult:
    pending = checkpointer.save(state, epoch=0, step=number, batch_size=1)
    assert pending is not None
    return pending.result()


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "fqn,name,value,num_bytes",
    [
        ("large.weight", None, torch.nan, 4),
        ("large.weight", None, -torch.inf, 4),
        ("large.bias", None, torch.inf, 4),
        ("small.weight", None, torch.nan, 2),
        ("large.weight", "exp_avg", torch.inf, 4),
        ("large.bias", "exp_avg_sq", -torch.nan, 4),
        ("small.bias", "exp_avg", torch.nan, 2),
    ],
)
def test_a_value_that_is_not_finite_is_named(
    fqn: str, name: str | None, value: float, num_bytes: int, behind: bool, tmp_path: Path
) -> None:
    events: list[Event] = []
    state = made()
    with Checkpointer(tmp_path, async_save=behind, listener=events.append) as checkpointer:
        assert saved(checkpointer, state, 1).suspect is None
        tensor_of(state, fqn, name).view(-1)[-1] = value
        suspect = saved(checkpointer, state, 2).suspect
        assert suspect is not None
        part = "modeling" if name is None else "optimizer"
        expected = Finding("not_finite", part, fqn, name, [Holders([0], 1)], num_bytes)
        assert (suspect.num_findings, suspect.findings) == (1, [expected])
        assert checkpointer.resume(made(1)) == RunState(0, 1, 1)
    _, committed = open_path(tmp_path / "epoch-0_step-2")
    assert committed.manifest is not None
    assert committed.manifest.suspect == suspect
    assert verify(LocalStore(tmp_path), committed).ok
    assert [info.is_healthy for info in training_checkpoints(LocalStore(tmp_path))] == [True, False]
    told = [event for event in events if "suspect" in event.kind]
    assert [event.kind for event in told] == ["suspect", "passed_over_suspect"]
    assert all(f"{part}: {fqn}" in event.message for event in told)


def test_a_forced_load_takes_a_suspect_one(tmp_path: Path) -> None:
    state, other = made(), made(1)
    with Checkpointer(tmp_path) as checkpointer:
        saved(checkpointer, state, 1)
        tensor_of(state, "large.bias", None)[0] = torch.nan
        saved(checkpointer, state, 2)
    assert load_checkpoint(tmp_path / "epoch-0_step-2", Booster(), other.model, other.optimizer, None) == (0, 2, 2)
    assert tensor_of(other, "large.bias", None)[0].isnan()


def test_the_order_of_trust(tmp_path: Path) -> None:
    """Healthy ones first, the last committed first; then suspect ones likewise. Corrupt ones are passed over."""
    events: list[Event] = []
    state = made()
    bias = tensor_of(state, "large.bias", None)
    with Checkpointer(tmp_path, listener=events.append) as checkpointer:
        for number, value in enumerate((torch.nan, 1.0, 2.0, torch.nan, torch.inf), start=1):
            bias[0] = value
            saved(checkpointer, state, number)
        order = []
        for number in (3, 2, 5, 4, 1):
            run = checkpointer.resume(made(1))
            assert run is not None
            order.append(run.step)
            flip(next((tmp_path / f"epoch-0_step-{number}" / "modeling").glob("*.safetensors")))
    assert order == [3, 2, 5, 4, 1]
    told = [(event.kind, event.key.rpartition("-")[2]) for event in events if "_suspect" in event.kind]
    passed_over = [("passed_over_suspect", name) for name in "54"]
    # What is corrupt by now is still newer, and still suspect.
    last = [("passed_over_suspect", "5"), ("resumed_suspect", "4")], [*passed_over, ("resumed_suspect", "1")]
    assert told == [*passed_over, *passed_over, ("resumed_suspect", "5"), *last[0], *last[1]]


def test_findings_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    model = nn.ParameterList([nn.Parameter(torch.full((2,), torch.nan)) for _ in range(MAX_FINDINGS + 8)])
    with Checkpointer(tmp_path) as checkpointer:
        suspect = saved(checkpointer, TrainState(model=model), 1).suspect
    assert suspect is not None
    assert suspect.num_findings == MAX_FINDINGS + 8
    assert [finding.fqn for finding in suspect.findings] == [str(number) for number in range(MAX_FINDINGS)]
    assert str(suspect).endswith(f"; and {MAX_FINDINGS + 5} more")


def test_a_setting_that_is_none(tmp_path: Path) -> None:
    wrong: Any = "some"
    with pytest.raises(UsageError, match="check_replicas must be one of"):
        Checkpointer(tmp_path, check_replicas=wrong)


# ---- rounds, on ranks that are threads


class Told:
    """A comm that notes the rounds."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.topics: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def agree(self, topic: str, *args: Any) -> bytes:
        self.topics.append(topic)
        return self._comm.agree(topic, *args)


@pytest.mark.parametrize("world_size", [2, 5])
def test_only_replicas_that_differ_cost_a_round(world_size: int, tmp_path: Path) -> None:
    topics: dict[int, list[str]] = {}
    models = [nn.Linear(3, 3) for _ in range(world_size)]
    for model in models:
        model.load_state_dict(models[0].state_dict())

    def rank_main(comm: Comm) -> SaveResult:
        def collect() -> Collected:
            collected = Collected(comm.rank)
            collected.add_model(name_tensors(models[comm.rank]), "modeling", "adapter")
            return collected

        told: Any = Told(comm)
        request = SaveRequest("x", collect, Position(0, 1, 1), check_replicas="full")
        result = save(LocalStore(tmp_path), told, request, StructureCache(), pool=BufferPool(2**21))
        topics[comm.rank] = told.topics
        return result

    assert [result.suspect for result in run_threads(in_process_comms(world_size, fanout=2), rank_main)] == (
        [None] * world_size
    )
    usual = ["save: structure", "save: tables", "save: open", "save: commit"]
    assert list(topics.values()) == [usual] * world_size
    with torch.no_grad():
        models[-1].bias[0] += 1
    expected = [Holders(list(range(world_size - 1)), world_size - 1), Holders([world_size - 1], 1)]
    for result in run_threads(in_process_comms(world_size, fanout=2), rank_main):
        assert result.suspect.findings == [Finding("replicas_differ", "modeling", "bias", None, expected, 12)]
    assert list(topics.values()) == [[*usual, "save: replicas"]] * world_size
