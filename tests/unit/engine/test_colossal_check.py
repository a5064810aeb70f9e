"""Do ranks that hold different parts of a model come to one list of what does not fit?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint.comm import Comm, in_process_comms
from shardpoint.engine.colossal import open_colossal
from shardpoint.engine.colossal_check import check_fit
from shardpoint.errors import MismatchError
from shardpoint.storage import LocalStore
from tests.compat.colossal_layout import write_checkpoint, write_weights
from tests.unit.comm.threads import run_threads


def booster(plugin: str) -> Any:
    return SimpleNamespace(plugin=type(plugin, (), {"__module__": "colossalai.booster"})())


HYBRID = booster("HybridParallelPlugin")


def layers(*names: str, width: int = 3) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(3, width, bias=False) for name in names})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    whole = layers("first", "second", "third")
    optimizer = torch.optim.AdamW(whole.parameters())
    sum(parameter.sum() for parameter in whole.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    write_checkpoint(tmp_path / "epoch-0_step-1", whole, optimizer, None, 0, 1)
    return tmp_path


def compared(root: Path, stages: list[nn.Module], optimizers: list[Any] | None = None) -> list[Any]:
    def rank_main(comm: Comm) -> Any:
        source = open_colossal(LocalStore(root), "epoch-0_step-1")
        optimizer = None if optimizers is None else optimizers[comm.rank]
        try:
            return check_fit(source, comm, HYBRID, stages[comm.rank], optimizer, None)
        except MismatchError as error:
            return error

    return run_threads(in_process_comms(len(stages)), rank_main)


def test_stages_fit_together(root: Path) -> None:
    assert compared(root, [layers("first"), layers("second", "third")]) == [["F32"], ["F32"]]


def test_every_rank_hears_of_what_any_rank_found(root: Path) -> None:
    found = compared(root, [layers("second", width=4), layers("first", "fourth")])
    assert [error.missing for error in found] == [["fourth.weight"]] * 2
    assert [error.unexpected for error in found] == [["third.weight"]] * 2
    assert [error.mismatched for error in found] == [["second.weight: stored F32 [3, 3], the model has F32 [4, 3]"]] * 2


@pytest.mark.parametrize(
    "plugin, stored, missing, unexpected",
    [
        ("HybridParallelPlugin", ["a.weight"], [], []),
        ("HybridParallelPlugin", ["a.weight", "b.weight"], [], []),
        ("HybridParallelPlugin", ["b.weight"], [], []),
        ("TorchDDPPlugin", ["a.weight", "b.weight"], [], []),
        ("TorchDDPPlugin", ["a.weight"], ["b.weight"], []),
        ("GeminiPlugin", ["a.weight"], [], []),
        ("GeminiPlugin", ["a.weight", "b.weight"], [], ["b.weight"]),
        ("GeminiPlugin", ["b.weight"], ["a.weight"], ["b.weight"]),
    ],
)
def test_tied_weights_as_each_plugin_takes_them(
    plugin: str, stored: list[str], missing: list[str], unexpected: list[str], tmp_path: Path
) -> None:
    model = layers("a", "b")
    model.get_submodule("b").weight = model.get_submodule("a").weight
    path = tmp_path / "epoch-0_step-1"
    write_checkpoint(path, model, None, None, 0, 1)
    write_weights(path / "modeling", {name: model.state_dict()[name] for name in stored}, num_files=1)
    (path / "modeling" / "pytorch_model-00002.bin").unlink()
    source, comm = open_colossal(LocalStore(tmp_path), path.name), in_process_comms(1)[0]
    if not missing and not unexpected:
        assert check_fit(source, comm, booster(plugin), model, None, None) == ["F32"]
        return
    with pytest.raises(MismatchError) as caught:
        check_fit(source, comm, booster(plugin), model, None, None)
    assert (caught.value.missing, caught.value.unexpected) == (missing, unexpected)


def test_moments_are_compared_by_number(root: Path) -> None:
    stages = [layers("first", "second", "third") for _ in range(2)]
    other = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False)])
    optimizers = [torch.optim.AdamW(stages[0].parameters()), torch.optim.AdamW(other.parameters())]
    found = compared(root, stages, optimizers)
    assert [len(error.mismatched) for error in found] == [2, 2]
    assert "parameter 1 [exp_avg]: stored [3, 3], the parameter at this place is [3, 2]" in found[0].mismatched[0]
    groups = [torch.optim.AdamW([{"params": [one]} for one in stages[0].parameters()])] * 2
    assert "build the groups as they were" in compared(root, stages, groups)[1].mismatched[0]


def test_states_of_another_kind_of_shape_are_left_to_their_optimizer(root: Path) -> None:
    path = root / "epoch-0_step-1" / "optimizer" / "pytorch_optim-00001.bin"
    states = torch.load(path, weights_only=True)
    states[0]["exp_avg_sq_row"] = torch.zeros(5)
    torch.save(states, path)
    stage = layers("first", "second", "third")
    assert compared(root, [stage], [torch.optim.AdamW(stage.parameters())]) == [["F32"]]
