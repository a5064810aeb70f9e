"""Can a run that ColossalChat saved go on natively, and is what does not fit refused before anything is changed?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Booster, load_checkpoint
from shardpoint.errors import (
    CorruptionError,
    ManifestError,
    MismatchError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
    UnsupportedFormatError,
)
from tests.compat.colossal_layout import write_checkpoint, write_weights
from tests.training import bits, net, optimizer_state, same_bits, train, weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def made(seed: int, lr: float = 0.05) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.8, 0.95))
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer, Any]:
    model, optimizer, scheduler = made(1)
    for number in range(3):
        train(model, optimizer, range(number, number + 1))
        scheduler.step()
    path = tmp_path / "epoch-1_step-3"
    write_checkpoint(path, model, optimizer, scheduler, 1, 3)
    return path, model, optimizer, scheduler


def test_a_run_goes_on_to_the_last_bit(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    path, model, optimizer, scheduler = saved
    booster = Booster()
    other, other_optimizer, other_scheduler = made(7, lr=0.9)
    other, other_optimizer, *_ = booster.boost(other, other_optimizer)
    assert load_checkpoint(path, booster, other, other_optimizer, other_scheduler) == (1, 3, 96)
    assert same_bits(weights(other), weights(model))
    assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))
    assert other_scheduler.state_dict() == scheduler.state_dict()
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for number in range(3, 6):
        train(model, optimizer, range(number, number + 1))
        train(other, other_optimizer, range(number, number + 1))
    assert same_bits(weights(other), weights(model))


def test_parts_load_alone(saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]) -> None:
    path, model, optimizer, _ = saved
    booster = Booster()
    other, other_optimizer, _ = made(7)
    other, other_optimizer, *_ = booster.boost(other, other_optimizer)
    before = {name: tensor.clone() for name, tensor in weights(other).items()}
    assert load_checkpoint(path, booster, None, other_optimizer, None) == (1, 3, 96)
    assert same_bits(weights(other), before)
    assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))
    assert load_checkpoint(path, None, None, None, None) == (1, 3, 96)


def test_it_is_told_that_nothing_can_be_verified(
    saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, *_ = saved
    with caplog.at_level("WARNING", logger="shardpoint"):
        load_checkpoint(path, Booster(), made(7)[0], None, None)
    assert "it has no manifest" in caplog.text


def test_tied_weights_that_are_stored_twice(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, other = Tied(), Tied()
    path = tmp_path / "epoch-0_step-1"
    write_checkpoint(path, model, None, None, 0, 1)
    load_checkpoint(path, Booster(), other, None, None)
    assert bits(other.head.weight) == bits(model.embed.weight)
    stored = model.state_dict()
    stored["head.weight"] = stored["head.weight"] + 1
    write_weights(path / "modeling", stored)
    before = bits(other.head.weight)
    with pytest.raises(MismatchError, match="are stored with different values"):
        load_checkpoint(path, Booster(), other, None, None)
    assert bits(other.head.weight) == before


def test_weights_that_are_views_of_one_storage(tmp_path: Path) -> None:
    model, other = net(1), net(2)
    stored = model.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in stored.values() if tensor.is_floating_point()])
    start = 0
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            stored[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    path = tmp_path / "epoch-0_step-1"
    write_checkpoint(path, model, None, None, 0, 1)
    write_weights(path / "modeling", stored)
    load_checkpoint(path, Booster(), other, None, None)
    assert same_bits(weights(other), weights(model))
    stored["embed.weight"] = stored["embed.weight"].t().contiguous().t()
    write_weights(path / "modeling", stored)
    with pytest.raises(UnsupportedFormatError, match=r"embed\.weight is not stored element after element"):
        load_checkpoint(path, Booster(), other, None, None)


def test_states_of_a_tied_weight_that_two_stages_stored(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, other = Tied(), Tied()
    for one in (model, other):
        one.add_module("tail", nn.Linear(6, 1, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.get_submodule("tail")(model.head(model.embed(torch.arange(6)))).square().mean().backward()
    optimizer.step()
    path = tmp_path / "epoch-0_step-1"
    write_checkpoint(path, model, optimizer, None, 0, 1)
    # The first stage has the embedding, the last one the head and what follows it: both store states of number 0.
    last = path / "optimizer" / "pytorch_optim-00002.bin"
    states = optimizer.state_dict()["state"]
    torch.save(states, last)
    booster = Booster()
    other, other_optimizer, *_ = booster.boost(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    load_checkpoint(path, booster, other, other_optimizer, None)
    loaded = optimizer_state(other, other_optimizer)
    assert same_bits(loaded, optimizer_state(model, optimizer))
    torch.save(states | {0: states[0] | {"exp_avg": states[0]["exp_avg"] + 1}}, last)
    with pytest.raises(MismatchError, match=r"the states of parameter 0 in .* differ"):
        load_checkpoint(path, booster, other, other_optimizer, None)
    assert same_bits(optimizer_state(other, other_optimizer), loaded)


def rename(path: Path) -> None:
    model = net(1)
    tensors = model.state_dict()
    tensors["head.wait"] = tensors.pop("head.weight")
    write_weights(path / "modeling", tensors)


def reshape(path: Path) -> None:
    tensors = net(1).state_dict()
    tensors["head.weight"] = torch.zeros(1, 6)
    write_weights(path / "modeling", tensors)


def double(path: Path) -> None:
    write_weights(path / "modeling", net(1).double().state_dict())


def cut(path: Path) -> None:
    file = path / "modeling" / "pytorch_model-00002.bin"
    file.write_bytes(file.read_bytes()[:-300])


def lose(path: Path) -> None:
    (path / "modeling" / "pytorch_model-00002.bin").unlink()


def no_optimizer(path: Path) -> None:
    for file in (path / "optimizer").iterdir():
        file.unlink()


def two_indexes(path: Path) -> None:
    (path / "modeling" / "model.safetensors.index.json").write_text("{}")


def no_end(path: Path) -> None:
    (path / "running_states.json").unlink()


class Attack:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("executed",))


def attack(path: Path) -> None:
    torch.save({"head.weight": Attack()}, path / "modeling" / "pytorch_model-00002.bin")


def attack_the_scheduler(path: Path) -> None:
    torch.save(Attack(), path / "lr_scheduler")


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (rename, MismatchError, r"head\.wait"),
        (reshape, MismatchError, r"head\.weight.*\[1, 6\]"),
        (double, MismatchError, "F64"),
        (cut, CorruptionError, r"pytorch_model-00002\.bin"),
        (lose, CorruptionError, r"pytorch_model-00002\.bin"),
        (no_optimizer, NotFoundError, "optimizer=None"),
        (two_indexes, ManifestError, "several indexes"),
        (no_end, TornCheckpointError, "epoch-1_step-3"),
        (attack, UnsupportedFormatError, "would execute"),
        (attack_the_scheduler, UnsupportedFormatError, "would execute"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
    saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, *_ = saved
    damage(path)
    booster = Booster()
    model, optimizer, scheduler = made(7)
    model, optimizer, *_ = booster.boost(model, optimizer)
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(error, match=message):
        load_checkpoint(path, booster, model, optimizer, scheduler)
    assert same_bits(weights(model), before)
    assert not optimizer.state
    assert scheduler.state_dict() == made(7)[2].state_dict()
    assert "executed" not in capsys.readouterr().out


def reversed_order(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(model.parameters())[::-1], lr=0.05)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=0.05)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "build, message",
    [
        (reversed_order, "the parameters are in another order"),
        (two_groups, "build the groups as they were"),
        (momentum, "another optimizer"),
    ],
)
def test_another_optimizer_is_refused(
    build: Callable[[nn.Module], torch.optim.Optimizer],
    message: str,
    saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any],
) -> None:
    path, *_ = saved
    booster, model = Booster(), net(7)
    model, optimizer, *_ = booster.boost(model, build(model))
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(MismatchError, match=message):
        load_checkpoint(path, booster, model, optimizer, None)
    assert same_bits(weights(model), before)
    assert not optimizer.state


def test_zero_counts_only_what_is_trained(tmp_path: Path) -> None:
    model, optimizer, _ = made(1)
    train(model, optimizer, range(2))
    trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for parameter in trained.param_groups[0]["params"]:
        if parameter in optimizer.state:
            trained.state[parameter] = optimizer.state[parameter]
    path = tmp_path / "epoch-0_step-2"
    write_checkpoint(path, model, trained, None, 0, 2)
    booster, other = Booster(), net(7)
    other, other_optimizer, *_ = booster.boost(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    load_checkpoint(path, booster, other, other_optimizer, None)
    assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))


def test_what_only_looks_like_it_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "epoch-0_step-1"
    (path / "modeling").mkdir(parents=True)
    (path / "running_states.json").write_text(json.dumps({"epoch": 0, "step": 1, "sample_start_index": 1}))
    with pytest.raises(TornCheckpointError):
        load_checkpoint(path, Booster(), net(0), None, None)


@pytest.mark.parametrize("part", ["modeling/pytorch_model", "optimizer/pytorch_optim"])
@pytest.mark.parametrize("change", ["more", "fewer"])
def test_an_index_that_its_files_contradict(
    part: str, change: str, saved: tuple[Path, nn.Module, torch.optim.Optimizer, Any]
) -> None:
    path = saved[0] / f"{part}.bin.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    if change == "more":
        index["weight_map"]["another"] = index["weight_map"][first]
    else:
        del index["weight_map"][first]
    path.write_text(json.dumps(index))
    model, optimizer, _ = made(4)
    before = weights(model)
    with pytest.raises(TruncatedError, match="differ"):
        load_checkpoint(saved[0], Booster(), model, optimizer, None)
    assert same_bits(weights(model), before)
    assert not optimizer.state


def test_the_16_bit_weights_of_a_run_in_mixed_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, scheduler = made(1)
    train(model, optimizer, range(3))
    rounded = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights(model).items()
    }
    path = tmp_path / "epoch-0_step-3"
    write_checkpoint(path, model, optimizer, scheduler, 0, 3)
    write_weights(path / "modeling", rounded)
    other, other_optimizer, other_scheduler = made(7)
    booster = Booster()
    other, other_optimizer, *_ = booster.boost(other, other_optimizer)
    with caplog.at_level("WARNING", logger="shardpoint"):
        load_checkpoint(path, booster, other, other_optimizer, other_scheduler)
    assert same_bits(weights(other), {name: rounded[name].to(tensor.dtype) for name, tensor in weights(model).items()})
    assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))
    assert "BF16 to F32) are stored in 16 bits" in caplog.text
    low = net(2).bfloat16()
    write_weights(path / "modeling", weights(model))
    with pytest.raises(MismatchError, match=r"stored F32 .* the target wants BF16"):
        load_checkpoint(path, booster, low, None, None)
