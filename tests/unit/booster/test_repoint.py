"""Does an optimizer's nested state follow its parameters when they are sharded, or is what cannot follow refused?"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardpoint.booster import Booster, HybridParallelPlugin, TorchFSDPPlugin
from shardpoint.errors import UsageError
from tests.optimizers import Nested


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def with_state(strange: Any) -> tuple[nn.Module, Nested]:
    """Return a model and an optimizer that has stepped, and has more state of the last bias."""
    model = mlp()
    optimizer = Nested(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[model.get_parameter("2.bias")]["strange"] = strange
    return model, optimizer


def itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


PLACE = r"the optimizer's state 'strange'"


@pytest.mark.parametrize(
    "strange,message",
    [
        ({"rows": [torch.ones(9)]}, PLACE + r"\['rows'\]\[0\] of 2\.bias has shape \[9\], the parameter \[3\]"),
        ((1, {3: deque([torch.ones(3)])}), PLACE + r"\[1\]\[3\] of 2\.bias is a deque"),
        (OrderedDict(x=torch.ones(3)), PLACE + r" of 2\.bias is a OrderedDict"),
        (itself(), PLACE + " is nested deeper than 32 levels"),
    ],
    ids=["another shape", "a deque", "another dict", "itself"],
)
def test_nested_state_that_cannot_go_along_is_refused_and_nothing_changes(strange: Any, message: str) -> None:
    model, optimizer = with_state(strange)
    held = list(model.parameters())
    with pytest.raises(UsageError, match=message):
        Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert optimizer.state[model.get_parameter("2.bias")]["strange"] is strange


def test_nested_state_of_earlier_steps_is_sharded_along() -> None:
    model, optimizer = with_state((None, torch.tensor(2.0), "x"))
    oracle, oracle_optimizer = with_state(None)
    Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    for parameter, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        momenta, history = optimizer.state[parameter]["momenta"], optimizer.state[parameter]["history"]
        assert type(history) is list
        for tensor, whole in (
            (momenta[3]["deep"], oracle_optimizer.state[theirs]["momenta"][3]["deep"]),
            (momenta["slow/~#"], oracle_optimizer.state[theirs]["momenta"]["slow/~#"]),
            (history[0], oracle_optimizer.state[theirs]["history"][0]),
        ):
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.full_tensor(), whole)
    assert optimizer.state[model.get_parameter("2.bias")]["strange"] == (None, torch.tensor(2.0), "x")


def test_hybrid_parallelism_sees_nested_state_of_earlier_steps() -> None:
    model, optimizer = with_state(None)
    for state in optimizer.state.values():
        for flat in ("a/b", "told", "strange"):
            state.pop(flat, None)
    with pytest.raises(UsageError, match=r"has state of 0\.weight already"):
        Booster(plugin=HybridParallelPlugin(tp_size=1, pp_size=1, precision="fp32")).boost(model, optimizer)
