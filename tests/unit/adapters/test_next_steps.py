"""Are the next steps of every optimizer, after a resume into a fresh one, those of a run that was never interrupted?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState
from tests.optimizers import Masters, Nested
from tests.training import OPTIMIZERS, bits, net, on_disk, same_bits, train, weights

KINDS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], torch.dtype]] = {
    name: (make, torch.float32) for name, make in OPTIMIZERS.items()
} | {
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.05), torch.float32),
    "nested": (Nested, torch.float32),
    "masters": (Masters, torch.bfloat16),
    "adamw_bf16": (OPTIMIZERS["adamw"], torch.bfloat16),
}


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_next_three_steps(kind: str, steps_before: int, tmp_path: Path) -> None:
    make, dtype = KINDS[kind]
    states = []
    for seed in (0, 5):
        model = net(seed, dtype)
        states.append(TrainState(model=model, optimizer=make(model.parameters())))
    one, two = states
    assert one.optimizer is not None
    assert two.optimizer is not None
    train(one.model, one.optimizer, range(steps_before), dtype)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(one, epoch=0, step=steps_before, batch_size=4)
        checkpointer.resume(two)
    assert train(one.model, one.optimizer, range(3, 6), dtype) == train(two.model, two.optimizer, range(3, 6), dtype)
    assert same_bits(weights(one.model), weights(two.model))


def test_masters_are_stored_in_their_own_dtype(tmp_path: Path) -> None:
    model = net(0, torch.bfloat16)
    optimizer = Masters(model.parameters())
    train(model, optimizer, range(3), torch.bfloat16)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=3, batch_size=4)
    stored = on_disk(tmp_path / "epoch-0_step-3" / "optimizer")
    master = optimizer.state[model.get_parameter("head.weight")]["master"]
    assert stored["head.weight.master"].dtype is torch.float32
    assert torch.equal(stored["head.weight.master"], master)
    assert not torch.equal(master, master.bfloat16().float()), "the masters know more than the weights"


def test_lbfgs_keeps_its_history(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, torch.optim.LBFGS]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def stepped(model: nn.Module, optimizer: torch.optim.LBFGS) -> list[Any]:
        batch = torch.linspace(-1, 1, 12).reshape(4, 3)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = (model(batch) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [bits(parameter) for parameter in model.parameters()]

    one, two = made(0), made(4)
    stepped(*one)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=one[0], optimizer=one[1]), epoch=0, step=3, batch_size=4)
        checkpointer.resume(TrainState(model=two[0], optimizer=two[1]))
    assert stepped(*two) == stepped(*one)
