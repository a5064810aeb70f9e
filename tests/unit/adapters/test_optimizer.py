"""Is an optimizer's state found by parameter, and is what hides or cannot be stored refused?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardpoint.adapters.names import name_tensors
from shardpoint.adapters.optimizer import check_supported, read_optimizer, target_optimizer
from shardpoint.errors import UsageError
from shardpoint.manifest import RawTensor
from tests.training import net, train


def test_the_document_and_the_tensors() -> None:
    model = net(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.8, 0.9))
    train(model, optimizer, range(2))
    document, tensors = read_optimizer(optimizer, name_tensors(model), "optimizer")
    assert document["class"] == "AdamW"
    (group,) = document["groups"]
    assert group["params"] == [name for name, _ in model.named_parameters()]
    assert group["options"]["betas"] == (0.8, 0.9)
    assert {(t.fqn, t.state) for t in tensors if t.fqn == "head.bias"} == {
        ("head.bias", "exp_avg"),
        ("head.bias", "exp_avg_sq"),
    }
    assert "frozen" not in document["states"]
    step = document["states"]["head.bias"]["step"]
    assert step == RawTensor("F32", (), torch.tensor(2.0).numpy().tobytes())


def test_a_parameter_that_the_model_does_not_have() -> None:
    model = net(0)
    stranger = nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.SGD([*model.parameters(), stranger], lr=0.1)
    with pytest.raises(UsageError, match=r"optimizer: parameter \d+ of group 0 \(shape \[3, 4\]\) is not in the model"):
        read_optimizer(optimizer, name_tensors(model), "optimizer")
    with pytest.raises(UsageError, match="not in the model"):
        target_optimizer(optimizer, name_tensors(model), "optimizer", {"groups": [], "states": {}}, [])


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "AcceleratedOptimizer"])
def test_optimizers_that_hide_their_state(name: str) -> None:
    kind: Any = type(name, (torch.optim.SGD,), {})
    with pytest.raises(UsageError, match=name):
        check_supported(kind(net(0).parameters(), lr=0.1))


def test_what_is_no_optimizer() -> None:
    with pytest.raises(UsageError, match=r"not a torch\.optim\.Optimizer"):
        check_supported(object())  # type: ignore[arg-type]


def test_state_that_cannot_be_stored() -> None:
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.frozen]["seen"] = {1, 2}
    with pytest.raises(UsageError, match=r"state 'seen' of frozen is a set"):
        read_optimizer(optimizer, name_tensors(model), "optimizer")


def test_state_under_a_key_that_is_no_parameter() -> None:
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state: dict[Any, Any] = optimizer.state
    state["global"] = {"x": 1}
    with pytest.raises(UsageError, match="no parameters of its groups"):
        read_optimizer(optimizer, name_tensors(model), "optimizer")
