"""What two ranks check of checkpoints that go to torch's DCP and come from it; started by `test_dcp_on_ranks.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.distributed.fsdp import fully_shard

from shardpoint import Checkpointer, RunState, TrainState, load
from shardpoint.integrations.dcp import export_dcp, import_dcp
from tests.distributed.reporting import run_and_report
from tests.training import OPTIMIZERS, on_disk, optimizer_state, same_bits, weights

RANK = 0
NAME = "epoch-0_step-2"


def state_of(seed: int) -> TrainState:
    """Rows that two ranks cannot halve, and a rank with an empty shard."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return TrainState(model=model, optimizer=OPTIMIZERS["adamw"](model.parameters()))


def go_on(state: TrainState, steps: range) -> list[float]:
    assert state.optimizer is not None
    losses = []
    for step in steps:
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + RANK))
        loss = state.model(batch).square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    return weights(state.model) | optimizer_state(state.model, state.optimizer)


def by_torch(state: TrainState, *, flat: bool) -> tuple[dict[str, Any], StateDictOptions]:
    assert state.optimizer is not None
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(state.model, state.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}, options


def from_torch(out: Path, *, flat: bool) -> None:
    state, other = state_of(0), state_of(9)
    go_on(state, range(2))
    save_dcp(by_torch(state, flat=flat)[0], checkpoint_id=out / "dcp")
    assert len(list((out / "dcp").glob("*.distcp"))) == 2
    if RANK == 0:
        import_dcp(out / "dcp", out / "root", epoch=0, step=2, batch_size=4, optimizer_class="AdamW")
    dist.barrier()
    before = everything(state)
    assert same_bits(on_disk(out / "root" / NAME / "modeling"), weights(state.model))
    with Checkpointer(out / "root") as checkpointer:
        assert checkpointer.resume(other) == RunState(0, 2, 8)
    assert same_bits(everything(other), before)
    assert go_on(other, range(2, 5)) == go_on(state, range(2, 5))


def to_torch(out: Path, *, flat: bool) -> None:
    state, other = state_of(0), state_of(9)
    go_on(state, range(2))
    with Checkpointer(out / "root") as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
    if RANK == 0:  # other ranks wait: an export is the work of one process
        export_dcp(out / "root" / NAME, out / "dcp", flatten_optimizer=flat)
    dist.barrier()
    target, options = by_torch(other, flat=flat)
    load_dcp(target, checkpoint_id=out / "dcp")
    assert other.optimizer is not None
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
        options=options,
    )
    assert same_bits(everything(other), everything(state))
    assert go_on(other, range(2, 5)) == go_on(state, range(2, 5))


def nested_from_torch(out: Path) -> None:
    from_torch(out, flat=False)


def flat_from_torch(out: Path) -> None:
    from_torch(out, flat=True)


def nested_to_torch(out: Path) -> None:
    to_torch(out, flat=False)


def flat_to_torch(out: Path) -> None:
    to_torch(out, flat=True)


def weights_go_into_a_plain_model(out: Path) -> None:
    """What two ranks had is loaded whole, on each rank alone, from what the check before it imported."""
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    load(out.parent / "nested_from_torch" / "root", TrainState(model=plain))
    assert same_bits(weights(plain), on_disk(out.parent / "nested_from_torch" / "root" / NAME / "modeling"))


CHECKS = (nested_from_torch, flat_from_torch, nested_to_torch, flat_to_torch, weights_go_into_a_plain_model)


def checks() -> dict[str, Callable[[Path], None]]:
    """Return the checks by name."""
    return {check.__name__: check for check in CHECKS}


def main() -> None:
    global RANK  # noqa: PLW0603 - the checks are functions of the rank that runs them
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    run_and_report(checks(), lambda name: Path(sys.argv[1]) / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
