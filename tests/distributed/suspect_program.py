"""What ranks check of saves whose state looks wrong; started by `test_suspects.py`, with two ranks and with four."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardpoint import Checkpointer, PendingSave, RunState, SaveResult, TrainState
from shardpoint.adapters.tensors import local_tensor
from shardpoint.engine import examining, load_model
from shardpoint.errors import UsageError
from shardpoint.events import Event
from shardpoint.manifest import Suspect, decode_manifest
from tests.distributed.reporting import run_and_report
from tests.training import bits, on_disk, weights

RANK = 0
WIDTH = 300  # a square of floats is more than a window of 64 KiB, and more than what is copied at once


def ddp_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3))
    model = nn.parallel.DistributedDataParallel(inner, broadcast_buffers=False)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))


def step(state: TrainState, number: int) -> None:
    assert state.optimizer is not None
    batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * number + RANK)) + RANK
    state.model(batch).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def parameter(state: TrainState, name: str) -> nn.Parameter:
    model = state.model.module if isinstance(state.model, nn.parallel.DistributedDataParallel) else state.model
    assert isinstance(model, nn.Module)
    return model.get_parameter(name)


def flip_bit(tensor: torch.Tensor, index: int) -> None:
    """Flip the lowest bit of one value of this rank's part, in place; a second time puts it back."""
    local_tensor(tensor).view(-1).view(torch.int32)[index] ^= 1


def save(checkpointer: Checkpointer, state: TrainState, number: int) -> SaveResult:
    pending = checkpointer.save(state, epoch=0, step=number, batch_size=1)
    assert pending is not None
    return pending.result()


def told(suspect: Suspect | None) -> Any:
    """Return (kind, name, state, ranks of each version) of each finding."""
    assert suspect is not None
    assert suspect.num_findings == len(suspect.findings)
    return [(f.kind, f.fqn, f.state, [h.ranks for h in f.holders]) for f in suspect.findings]


def on_manifest(root: Path, number: int) -> Suspect | None:
    return decode_manifest((root / f"epoch-0_step-{number}" / "shardpoint.json").read_bytes()).suspect


# ---- two ranks


def ddp_one_bit(out: Path) -> None:
    """One bit of one weight of rank 1 differs: named on every rank, and a resume goes back to what is healthy."""
    for behind in (False, True):
        root, events = out / str(behind), list[Event]()
        state = ddp_state()
        with Checkpointer(root, async_save=behind, check_replicas="full", listener=events.append) as checkpointer:
            step(state, 1)
            assert save(checkpointer, state, 1).suspect is None  # though the statistics of BatchNorm differ
            means: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(means, bits(weights(state.model)["1.running_mean"]))
            assert means[0] != means[1]
            saved = weights(state.model)
            step(state, 2)
            if RANK == 1:
                flip_bit(parameter(state, "0.weight"), 12_345)
                flip_bit(parameter(state, "2.bias"), 1)
            result = save(checkpointer, state, 2)
            expected = [("replicas_differ", name, None, [[0], [1]]) for name in ("0.weight", "2.bias")]
            assert told(result.suspect) == expected
            assert result.suspect is not None
            assert [f.num_bytes for f in result.suspect.findings] == [WIDTH * WIDTH * 4, 3 * 4]
            assert on_manifest(root, 2) == result.suspect
            other = ddp_state(7)
            assert checkpointer.resume(TrainState(model=other.model, optimizer=other.optimizer)) == RunState(0, 1, 1)
            # What the two ranks have after it is what rank 0 saved: buffers too.
            buffers = on_disk(root / "epoch-0_step-1" / "modeling")
            assert bits(weights(other.model)["0.weight"]) == bits(saved["0.weight"])
            assert bits(weights(other.model)["1.running_mean"]) == bits(buffers["1.running_mean"])
        kinds = [event.kind for event in events if event.kind not in ("loaded", "swept")]
        assert kinds == (["committed", "committed", "suspect", "passed_over_suspect"] if RANK == 0 else []), kinds


def ddp_forced_and_nothing_else_there(out: Path) -> None:
    from shardpoint.adapters.c10d import open_comm

    events = list[Event]()
    state = ddp_state()
    with torch.no_grad():
        parameter(state, "0.bias")[0] = float(RANK)
    with Checkpointer(out, listener=events.append) as checkpointer:
        for number in (1, 2):
            assert told(save(checkpointer, state, number).suspect) == [("replicas_differ", "0.bias", None, [[0], [1]])]
        assert checkpointer.resume(ddp_state(3)) == RunState(0, 2, 2)
        with torch.no_grad():
            parameter(state, "0.bias")[0] = 5.0
        assert save(checkpointer, state, 3).suspect is None
        assert save(checkpointer, state, 2).suspect is None  # replaces the suspect one
        assert checkpointer.resume(ddp_state(3)) == RunState(0, 2, 2)
        with torch.no_grad():
            parameter(state, "0.bias")[0] = float(RANK)
        assert save(checkpointer, state, 4).suspect is not None
        other = ddp_state(4)
        load_model(other.model, out / "epoch-0_step-4", comm=open_comm())
        assert bits(parameter(other, "0.bias")) == bits(on_disk(out / "epoch-0_step-4" / "modeling")["0.bias"])
        assert checkpointer.resume(other) == RunState(0, 2, 2)
    kinds = [event.kind for event in events]
    assert (kinds.count("resumed_suspect"), kinds.count("passed_over_suspect")) == ((1, 1) if RANK == 0 else (0, 0))


def ddp_sampled(out: Path) -> None:
    """A sample finds what differs everywhere at once, and one bit in one of the next saves; each names what it read."""
    for behind in (False, True):
        state = ddp_state()
        with Checkpointer(out / str(behind), async_save=behind) as checkpointer:
            step(state, 1)
            if RANK == 1:
                flip_bit(parameter(state, "0.weight"), 40_000)
            found = [save(checkpointer, state, number).suspect for number in range(12)]
            suspects = [suspect for suspect in found if suspect is not None]
            assert 0 < len(suspects) < len(found)  # the weights are 360 kB: six windows
            for one in suspects:
                assert told(one) == [("replicas_differ", "0.weight", None, [[0], [1]])]
                assert one.findings[0].num_bytes in (65536, WIDTH * WIDTH * 4 - 5 * 65536)
            assert state.optimizer is not None
            with torch.no_grad():
                state.optimizer.state[parameter(state, "0.weight")]["exp_avg"].mul_(1 + RANK)
            drifted = save(checkpointer, state, 99).suspect
            assert drifted is not None
            assert ("replicas_differ", "0.weight", "exp_avg", [[0], [1]]) in told(drifted)


def ddp_off_and_ranks_that_do_not_agree(out: Path) -> None:
    state = ddp_state()
    if RANK == 1:
        flip_bit(parameter(state, "0.weight"), 0)
    with Checkpointer(out, check_replicas="off") as checkpointer:
        assert save(checkpointer, state, 1).suspect is None
    with Checkpointer(out, check_replicas="off" if RANK else "full") as checkpointer:
        try:
            save(checkpointer, state, 2)
        except UsageError as error:
            assert "asked for different saves" in str(error)  # noqa: PT017 - on every rank alike
        else:
            raise AssertionError("the ranks check differently, and nobody said so")


def ddp_changed_once_released(out: Path) -> None:
    """Behind the training the comparison is over before a step may run: later changes are no finding."""
    compared = examining.Examination.compare

    def late(self: examining.Examination, *args: Any, **options: Any) -> bool:
        time.sleep(0.3 * RANK)  # not for ordering: a step that did not wait would be seen all the more often
        return compared(self, *args, **options)

    state = ddp_state()
    step(state, 0)
    with (
        patch.object(examining.Examination, "compare", late),
        Checkpointer(out, async_save=True, check_replicas="full") as checkpointer,
    ):
        pending: list[PendingSave] = []
        for number in range(1, 4):
            one = checkpointer.save(state, epoch=0, step=number, batch_size=1)
            assert one is not None
            pending.append(one)
            step(state, number)  # waits
            if RANK == 1:
                one.staged()
                flip_bit(parameter(state, "0.weight"), 5)
                flip_bit(parameter(state, "0.weight"), 5)
        assert [one.result().suspect for one in pending] == [None] * 3


def ddp_a_role_that_one_rank_does_not_write(out: Path) -> None:
    """Of a single tensor of less than a block one rank writes all: the other compares it all the same, and says so."""
    torch.manual_seed(0)
    tiny = TrainState(model=nn.parallel.DistributedDataParallel(nn.Linear(5, 5, bias=False)))
    with Checkpointer(out, async_save=True) as checkpointer:
        found = []
        for number, change in enumerate((0.0, 1.0)):
            with torch.no_grad():
                parameter(tiny, "weight")[0, 0] += change * RANK
            pending = checkpointer.save({"large": ddp_state(), "tiny": tiny}, epoch=0, step=number, batch_size=1)
            assert pending is not None
            pending.staged()
            found.append(pending.result().suspect)
        assert found[0] is None
        assert told(found[1]) == [("replicas_differ", "weight", None, [[0], [1]])]


def ddp_values_that_are_not_finite(out: Path) -> None:
    """Each value is counted once, whoever wrote it; replicas that are NaN alike do not differ."""
    state = ddp_state()
    step(state, 1)
    with torch.no_grad():
        parameter(state, "0.weight").view(-1)[[0, 7, WIDTH * WIDTH - 1]] = torch.tensor([torch.nan, -torch.inf, 1e38])
        parameter(state, "2.weight").fill_(torch.inf)
    with Checkpointer(out, check_replicas="full") as checkpointer:
        suspect = save(checkpointer, state, 1).suspect
    assert suspect is not None
    found = {(f.kind, f.fqn): (f.num_bytes, f.holders[0].num_ranks) for f in suspect.findings}
    assert found == {("not_finite", "0.weight"): (8, 1), ("not_finite", "2.weight"): (WIDTH * 3 * 4, 1)}


# ---- four ranks


def hsdp_one_replica(out: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for behind in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
        state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01))
        step(state, 1)
        with Checkpointer(out / str(behind), async_save=behind, check_replicas="full") as checkpointer:
            assert save(checkpointer, state, 1).suspect is None
            weight, bias = parameter(state, "0.weight"), parameter(state, "1.bias")
            assert isinstance(weight, DTensor)
            # Rank 3 holds the second half, as rank 1 does. The bias is small: it goes to the coordinator.
            if RANK == 3:
                flip_bit(weight, 77)
            if RANK == 2:
                flip_bit(bias, 3)
            result = save(checkpointer, state, 2)
            assert told(result.suspect) == [
                ("replicas_differ", "0.weight", None, [[1], [3]]),
                ("replicas_differ", "1.bias", None, [[0], [2]]),
            ]
            if RANK == 3:
                flip_bit(weight, 77)
            if RANK == 2:
                flip_bit(bias, 3)
                local_tensor(bias)[1] = torch.nan
            if RANK == 0:
                local_tensor(bias)[1] = torch.nan
            result = save(checkpointer, state, 3)
            assert result.suspect is not None
            (finding,) = result.suspect.findings
            assert (finding.kind, finding.fqn, finding.num_bytes) == ("not_finite", "1.bias", 4)
            assert checkpointer.resume(state) == RunState(0, 1, 1)


def ddp_of_four(out: Path) -> None:
    state = ddp_state()
    if RANK == 2:
        flip_bit(parameter(state, "0.weight"), 9)
    with Checkpointer(out, check_replicas="full") as checkpointer:
        assert told(save(checkpointer, state, 1).suspect) == [("replicas_differ", "0.weight", None, [[0, 1, 3], [2]])]


def plain_models(out: Path) -> None:
    """Nothing keeps these alike, and the lowest rank's are stored: a difference is told, of parameters only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model.get_parameter("1.weight").fill_(float(RANK % 2))
        model.get_buffer("1.running_mean").fill_(float(RANK))
    with Checkpointer(out) as checkpointer:
        result = save(checkpointer, TrainState(model=model), 1)
    assert told(result.suspect) == [("replicas_differ", "1.weight", None, [[0, 2], [1, 3]])]


TWO = (
    ddp_one_bit,
    ddp_forced_and_nothing_else_there,
    ddp_sampled,
    ddp_off_and_ranks_that_do_not_agree,
    ddp_changed_once_released,
    ddp_a_role_that_one_rank_does_not_write,
    ddp_values_that_are_not_finite,
)
FOUR = (hsdp_one_replica, ddp_of_four, plain_models)


def checks(world_size: int) -> dict[str, Callable[[Path], None]]:
    """Return the checks of so many ranks, by name."""
    return {check.__name__: check for check in (TWO if world_size == 2 else FOUR)}


def main() -> None:
    global RANK  # noqa: PLW0603 - the checks are functions of the rank that runs them
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    run_and_report(checks(dist.get_world_size()), lambda name: Path(sys.argv[1]) / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
