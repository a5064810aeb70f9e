"""Are names those of the unwrapped model, whatever wraps it and whatever the user calls a submodule?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shardpoint.adapters.names import class_name, name_tensors
from tests.training import Net, net


def names(module: nn.Module) -> list[str]:
    return [named.fqn for named in name_tensors(module).tensors]


def expected(model: nn.Module) -> list[str]:
    return list(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch.compile imports what it deprecates
def test_wrappers_inside_and_outside_leave_no_trace() -> None:
    model = net(0)
    wanted = sorted(expected(model))
    assert "module.0.inner.weight" in wanted
    model.module[0] = checkpoint_wrapper(model.module[0])
    compiled: Any = torch.compile
    model.module[1] = compiled(checkpoint_wrapper(model.module[1]))
    assert sorted(names(compiled(model))) == wanted
    assert sorted(names(checkpoint_wrapper(compiled(model)))) == wanted


def test_a_user_may_call_things_as_wrappers_do() -> None:
    inner = nn.Module()
    inner.module = nn.Module()
    inner.module._orig_mod = nn.Linear(1, 1)
    inner.module.module = nn.Linear(1, 1)
    assert names(inner) == [
        "module._orig_mod.weight",
        "module._orig_mod.bias",
        "module.module.weight",
        "module.module.bias",
    ]


def test_tied_tensors_have_the_first_name_and_non_persistent_buffers_none() -> None:
    model = Net()
    model.tied = model.head
    model.again = nn.Linear(5, 1)
    model.again.weight = model.head.weight
    found = names(model)
    assert "head.weight" in found
    assert "again.bias" in found
    assert not {"again.weight", "tied.weight", "scratch"} & set(found)
    assert len(found) == len(set(found))


def test_modules_with_extra_state() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

    assert list(name_tensors(nn.Sequential(nn.Linear(1, 1), Extra(1, 1))).extra_states) == ["1"]


def test_a_class_that_is_called_fsdp_keeps_its_name() -> None:
    class FSDPLike(nn.Module):
        pass

    assert class_name(FSDPLike()) == "FSDPLike"


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardpoint.adapters import names as module
    from shardpoint.errors import UsageError

    class Old(nn.Module):
        pass

    monkeypatch.setattr(module, "FullyShardedDataParallel", Old)
    with pytest.raises(UsageError, match="FSDP2"):
        names(Old())
