"""Are parameters of lower precision held in float32, the same objects, and never with a state of lower precision?"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from shardpoint import Booster
from shardpoint.booster import LowLevelZeroPlugin, masters
from shardpoint.errors import UsageError


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)).bfloat16()
    model[1].requires_grad_(requires_grad=False)
    return model


def test_what_is_trained_is_held_in_float32_and_stays_the_same_object(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, logger="shardpoint"):
        masters.hold(model)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert {name for name, one in after.items() if one.dtype == torch.float32} == {
        f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(one.bfloat16(), values[name]) for name, one in after.items())
    assert "4 trainable parameters (first 0.weight)" in caplog.text
    caplog.clear()
    masters.hold(model)
    assert not caplog.text


def test_a_state_of_lower_precision_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UsageError, match=r"0\.weight is torch\.bfloat16 and has optimizer state: boost before"):
        Booster(plugin=LowLevelZeroPlugin()).boost(model, optimizer)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
