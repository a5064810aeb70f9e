"""Does a run that ColossalChat saved go on with our Booster, and is what does not fit refused?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Booster, load_checkpoint
from shardpoint.errors import (
    CheckpointError,
    MismatchError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
    UnsupportedFormatError,
)
from tests.compat.colossal_layout import write_checkpoint, write_optimizer, write_weights
from tests.training import net, optimizer_state, same_bits, train, weights

NAME = "epoch-1_step-500"


def made(seed: int, **options: Any) -> tuple[Booster, nn.Module, torch.optim.Optimizer, Any]:
    model = net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    booster = Booster()
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, None, None, scheduler)
    return booster, model, optimizer, scheduler


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer, Any]:
    _, model, optimizer, scheduler = made(0)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    write_checkpoint(tmp_path / NAME, model, optimizer, scheduler, 1, 500)
    return tmp_path / NAME, model, optimizer, scheduler


def test_a_run_goes_on_bit_for_bit(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, model, optimizer, scheduler = saved
    other = made(4)
    with caplog.at_level(logging.WARNING, logger="shardpoint"):
        assert load_checkpoint(path, *other) == (1, 500, 16000)
    assert any("no manifest" in record.message for record in caplog.records)
    assert same_bits(weights(other[1]), weights(model))
    assert same_bits(optimizer_state(other[1], other[2]), optimizer_state(model, optimizer))
    assert other[3].state_dict() == scheduler.state_dict()
    assert train(other[1], other[2], range(3, 6)) == train(model, optimizer, range(3, 6))


def test_the_counters_alone(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    assert load_checkpoint(saved[0], None, None, None, None) == (1, 500, 16000)


def refused(path: Path, parts: tuple[Any, nn.Module, Any, Any], kind: type[CheckpointError], match: str) -> None:
    before = weights(parts[1])
    with pytest.raises(kind, match=match):
        load_checkpoint(path, *parts)
    assert same_bits(weights(parts[1]), before)
    assert parts[2] is None or not parts[2].state


def test_another_order_of_parameters_is_refused(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    booster, model = Booster(), net(4)
    optimizer = torch.optim.AdamW(list(reversed(list(model.parameters()))), lr=0.05)
    boosted, optimizer, *_ = booster.boost(model, optimizer)
    refused(saved[0], (booster, boosted, optimizer, None), MismatchError, "another order")


def test_another_number_of_groups_is_refused(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    booster, model = Booster(), net(4)
    first, *rest = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=0.05)
    boosted, optimizer, *_ = booster.boost(model, optimizer)
    refused(saved[0], (booster, boosted, optimizer, None), MismatchError, "build the groups")


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)], ids=["sgd", "adam"]
)
def test_another_optimizer_is_refused(make: Any, saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    booster, model = Booster(), net(4)
    boosted, optimizer, *_ = booster.boost(model, make(model.parameters()))
    refused(saved[0], (booster, boosted, optimizer, None), MismatchError, "another optimizer|Adam is not AdamW")


def test_another_scheduler_is_refused(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    booster, model, optimizer, _ = made(4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    refused(saved[0], (booster, model, optimizer, scheduler), MismatchError, "another scheduler")


def test_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    parts = made(0)
    stored = parts[1].state_dict()
    stored["head.weight"] = torch.zeros(2, 5)
    stored["head.bias"] = stored["head.bias"].to(torch.bfloat16)
    write_checkpoint(tmp_path / NAME, parts[1], None, None, 1, 500)
    write_weights(tmp_path / NAME / "modeling", stored)
    booster, model, *_ = made(4)
    with pytest.raises(MismatchError) as caught:
        load_checkpoint(tmp_path / NAME, booster, model, None, None)
    assert [line.partition(": stored")[0].rpartition(": ")[2] for line in caught.value.mismatched] == [
        "head.weight",
        "head.bias",
    ]


def test_states_numbered_over_trained_parameters_alone(tmp_path: Path) -> None:
    _, model, optimizer, scheduler = made(0)
    train(model, optimizer, range(2))
    write_checkpoint(tmp_path / NAME, model, None, scheduler, 1, 500)
    # ZeRO leaves frozen parameters out of its numbers.
    trained = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for parameter, state in optimizer.state.items():
        trained.state[parameter] = state
    write_optimizer(tmp_path / NAME / "optimizer", trained.state_dict())
    other = made(4)
    load_checkpoint(tmp_path / NAME, other[0], other[1], other[2], None)
    assert same_bits(optimizer_state(other[1], other[2]), optimizer_state(model, optimizer))


def test_hybrid_adam_counts_in_integers(tmp_path: Path) -> None:
    _, model, optimizer, _ = made(0)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["state"] = {number: values | {"step": int(values["step"])} for number, values in state["state"].items()}
    kept = ("lr", "betas", "eps", "weight_decay", "params", "initial_lr")
    state["param_groups"] = [
        {key: group[key] for key in kept} | {"bias_correction": True} for group in state["param_groups"]
    ]
    write_checkpoint(tmp_path / NAME, model, None, None, 1, 500)
    write_optimizer(tmp_path / NAME / "optimizer", state)
    other = made(4)
    load_checkpoint(tmp_path / NAME, *other[:3], None)
    assert train(other[1], other[2], range(2, 4)) == train(model, optimizer, range(2, 4))


class Tied(nn.Module):
    def __init__(self, *, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("stored", ["both", "copies", "one"])
def test_tied_weights(stored: str, tmp_path: Path) -> None:
    model = Tied(tie=True)
    tensors = dict(model.state_dict())
    if stored == "copies":
        tensors["head.weight"] = tensors["head.weight"].clone()
    elif stored == "one":
        del tensors["head.weight"]
    write_checkpoint(tmp_path / NAME, model, None, None, 1, 500)
    write_weights(tmp_path / NAME / "modeling", tensors, num_files=1)
    target, booster = Tied(tie=True), Booster()
    load_checkpoint(tmp_path / NAME, booster, target, None, None)
    assert same_bits(weights(target), weights(model))
    apart = Tied(tie=False)
    if stored == "one":
        with pytest.raises(MismatchError):
            load_checkpoint(tmp_path / NAME, booster, apart, None, None)
    else:
        load_checkpoint(tmp_path / NAME, booster, apart, None, None)
        assert same_bits(weights(apart), weights(model))


def test_weights_that_are_tied_in_the_target_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / NAME, Tied(tie=False), None, None, 1, 500)
    with pytest.raises(MismatchError, match="untie"):
        load_checkpoint(tmp_path / NAME, Booster(), Tied(tie=True), None, None)


def test_what_is_missing_or_cut(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    path = saved[0]
    shard = path / "optimizer" / "pytorch_optim-00002.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refused(path, made(4), TruncatedError, "pytorch_optim-00002.bin")
    shard.unlink()
    refused(path, made(4), TruncatedError, "pytorch_optim-00002.bin")
    shard.write_bytes(data)
    index = path / "modeling" / "pytorch_model.bin.index.json"
    text = index.read_text()
    index.write_text(json.dumps(json.loads(text) | {"weight_map": {"x": "../../x.bin"}}))
    refused(path, made(4), TruncatedError, "not there")
    index.write_text(text)
    (path / "lr_scheduler").unlink()
    refused(path, made(4), NotFoundError, "lr_scheduler")
    (path / "running_states.json").unlink()
    refused(path, made(4), TornCheckpointError, "never committed")


class Executed:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_nothing_is_executed(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"last_epoch": Executed()}, saved[0] / "lr_scheduler")
    refused(saved[0], made(4), UnsupportedFormatError, "execute")
    assert "executed" not in capsys.readouterr().out
