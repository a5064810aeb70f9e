"""Is every difference an error that names it, and is what was allowed left or converted, and told?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState, load
from shardpoint.errors import ChecksumError, MismatchError, ResumeMismatchError, UsageError
from shardpoint.events import Event
from tests.training import bits, flip, same_bits, weights

Optimizer = Callable[[Any], torch.optim.Optimizer]


def made(
    *names: str, seed: int = 0, dtype: torch.dtype = torch.float32, sizes: dict[str, int] | None = None
) -> TrainState:
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear((sizes or {}).get(name, 5), 3) for name in names}).to(dtype)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))


def step(state: TrainState) -> TrainState:
    assert state.optimizer is not None
    state.optimizer.zero_grad()
    for number, parameter in enumerate(state.model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1)
    state.optimizer.step()
    return state


def saved(root: Path, state: TrainState) -> TrainState:
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
    return state


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    found = weights(state.model)
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


def resume(root: Path, state: TrainState, events: list[Event] | None = None, **allowed: Any) -> Any:
    listener = (lambda _: None) if events is None else events.append
    with Checkpointer(root, listener=listener) as checkpointer:
        return checkpointer.resume(state, **allowed)


def test_a_new_head_is_refused_by_name_and_allowed_by_pattern(tmp_path: Path) -> None:
    state, other = saved(tmp_path, step(made("body"))), step(made("body", "head", seed=3))
    before = everything(other)
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path, other)
    assert "modeling: head.weight" in caught.value.missing
    assert "optimizer: head.weight is in the optimizer, but in no group of the checkpoint" in caught.value.missing
    assert "allow_missing" in str(caught.value)
    with pytest.raises(MismatchError, match=r"allow_missing pattern 'haed\.\*' matches no name of the target"):
        resume(tmp_path, other, allow_missing=["haed.*"])
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path, other, allow_missing=["*.weight"])
    assert caught.value.missing == [
        "optimizer: head.bias is in the optimizer, but in no group of the checkpoint",
        "modeling: head.bias",
    ]
    assert same_bits(everything(other), before)
    events: list[Event] = []
    run = resume(tmp_path, other, events, allow_missing=["head.*"])
    assert {"modeling: head.weight", "modeling: head.bias"} < set(run.missing)
    assert any(event.kind == "allowed" and "head.bias" in event.message for event in events)
    after = everything(other)
    assert same_bits({k: v for k, v in after.items() if k.startswith("head")},
                     {k: v for k, v in before.items() if k.startswith("head")})  # fmt: skip
    assert same_bits({k: v for k, v in after.items() if k.startswith("body")}, everything(state))


def test_what_the_state_leaves_out(tmp_path: Path) -> None:
    state, other = saved(tmp_path, step(made("body", "head"))), made("body", seed=3)
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path, other, allow_unexpected=["head.weight"])
    assert {"modeling: head.bias", "optimizer: head.bias [exp_avg]"} < set(caught.value.unexpected)
    assert not any("head.weight" in line for line in caught.value.unexpected)
    run = resume(tmp_path, other, allow_unexpected=["head.*"])
    assert {"modeling: head.bias", "optimizer: head.bias [exp_avg]"} < set(run.unexpected)
    assert same_bits(everything(other), {k: v for k, v in everything(state).items() if k.startswith("body")})


def test_a_pattern_that_no_name_matches_is_told(tmp_path: Path) -> None:
    saved(tmp_path, step(made("body")))
    events: list[Event] = []
    run = resume(tmp_path, made("body"), events, allow_missing=["hed.*", "body.*"], allow_unexpected=["old.*"])
    assert (run.missing, run.unexpected, run.cast) == ((), (), ())
    told = [event.message for event in events if event.kind == "idle_pattern"]
    assert len(told) == 2
    assert "'hed.*'" in told[0]
    assert "'old.*'" in told[1]


@pytest.mark.parametrize("wrong", [{"allow_missing": "head.*"}, {"allow_unexpected": [3]}])
def test_patterns_that_are_none(tmp_path: Path, wrong: Any) -> None:
    saved(tmp_path, made("body"))
    with pytest.raises(UsageError, match="give a list of patterns"):
        resume(tmp_path, made("body"), **wrong)
    with pytest.raises(UsageError, match="give a list of patterns"):
        load(tmp_path, made("body"), **wrong)


@pytest.mark.parametrize("allowed", [{}, {"allow_missing": ["*"], "allow_unexpected": ["*"], "allow_cast": True}])
def test_shapes_and_whole_parts_are_never_allowed_to_differ(tmp_path: Path, allowed: Any) -> None:
    saved(tmp_path, step(made("body")))
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path, made("body", sizes={"body": 4}), **allowed)
    assert "modeling: body.weight: stored F32 [3, 5], the target wants F32 [3, 4]" in caught.value.mismatched
    state = made("body")
    bare = tmp_path / "bare"
    saved(bare, TrainState(model=state.model))
    with pytest.raises(MismatchError, match="would start the optimizer afresh"):
        resume(bare, state, **allowed)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_are_converted_when_asked_and_optimizer_states_never(tmp_path: Path, wanted: torch.dtype) -> None:
    state, other = saved(tmp_path, step(made("body"))), made("body", seed=3)
    other.model.to(wanted)
    with pytest.raises(MismatchError, match=r"modeling: body\.weight: stored F32 \[3, 5\], the target wants"):
        resume(tmp_path, other)
    events: list[Event] = []
    run = resume(tmp_path, other, events, allow_cast=True)
    assert len(run.cast) == 2
    assert any(event.kind == "allowed" and "body.weight: F32 to" in event.message for event in events)
    for name, tensor in weights(state.model).items():
        assert bits(other.model.get_parameter(name)) == bits(tensor.to(wanted)), name
    assert other.optimizer is not None
    for parameter in other.model.parameters():
        assert other.optimizer.state[parameter]["exp_avg"].dtype is torch.float32
    third = made("body", seed=4)
    third.model.to(wanted)
    assert load(tmp_path, TrainState(model=third.model), allow_cast=True).cast == run.cast


def test_only_floating_point_is_converted(tmp_path: Path) -> None:
    def holder(dtype: torch.dtype) -> TrainState:
        model = nn.Module()
        model.register_buffer("kept", torch.arange(5).to(dtype))
        return TrainState(model=model)

    for number, (stored, wanted) in enumerate(
        [
            (torch.float32, torch.int32),
            (torch.int64, torch.int32),
            (torch.complex64, torch.float32),
            (torch.int64, torch.float32),
            (torch.float32, torch.bool),
            (torch.float32, torch.float8_e8m0fnu),
        ]
    ):
        saved(tmp_path / str(number), holder(stored))
        with pytest.raises(MismatchError, match="modeling: kept: stored"):
            resume(tmp_path / str(number), holder(wanted), allow_cast=True)
    saved(tmp_path / "complex", holder(torch.complex128))
    state = holder(torch.complex64)
    assert resume(tmp_path / "complex", state, allow_cast=True).cast == ("modeling: kept: C128 to C64",)
    assert torch.equal(state.model.get_buffer("kept"), torch.arange(5).to(torch.complex64))


def test_damage_shows_where_weights_are_converted(tmp_path: Path) -> None:
    saved(tmp_path, TrainState(model=made("body").model))
    (file,) = (tmp_path / "epoch-0_step-1" / "modeling").glob("*.safetensors")
    flip(file)
    with pytest.raises(ChecksumError):
        resume(tmp_path, TrainState(model=made("body", dtype=torch.float64).model), allow_cast=True)


def grouped(model: nn.Module, *groups: tuple[str, ...]) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    return torch.optim.AdamW(
        [{"params": [parameters[n] for n in g], "weight_decay": 0.1 * i} for i, g in enumerate(groups)], lr=0.1
    )


BODY, HEAD = ("body.weight", "body.bias"), ("head.weight", "head.bias")


def test_parameters_are_matched_by_name_in_any_order(tmp_path: Path) -> None:
    state, other = made("body", "head"), made("body", "head", seed=3)
    state.optimizer = grouped(state.model, BODY, HEAD)
    other.optimizer = grouped(other.model, HEAD[::-1], BODY[::-1])
    saved(tmp_path, step(state))
    resume(tmp_path, other)
    assert same_bits(everything(other), everything(state))
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.0]
    step(state)
    step(other)
    assert same_bits(everything(other), everything(state))


def test_a_parameter_in_another_group(tmp_path: Path) -> None:
    state, other = made("body", "head"), made("body", "head", seed=3)
    state.optimizer = grouped(state.model, (*BODY, "head.bias"), ("head.weight",))
    other.optimizer = grouped(other.model, BODY, HEAD)
    saved(tmp_path, step(state))
    with pytest.raises(MismatchError, match="param group 1 joins parameters of the stored groups"):
        resume(tmp_path, other)
    run = resume(tmp_path, other, allow_missing=["head.bias"])
    assert run.missing == ("optimizer: head.bias is in param group 1, and was in the stored group 0",)
    assert same_bits(everything(other), everything(state)), "its state comes by its name all the same"
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.0, 0.1]


def test_a_group_of_new_parameters_keeps_its_options(tmp_path: Path) -> None:
    state, other = saved(tmp_path, step(made("body"))), made("body", "head", seed=3)
    other.optimizer = grouped(other.model, BODY, HEAD)
    other.optimizer.param_groups[1]["lr"] = 0.7
    resume(tmp_path, other, allow_missing=["head.*"], lazy_optimizer=True)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.1, 0.7]
    assert state.optimizer is not None
    assert other.optimizer.param_groups[0]["weight_decay"] == state.optimizer.param_groups[0]["weight_decay"]
    assert not other.optimizer.state.get(other.model.get_parameter("head.bias"))


# ---- grad scalers


def scaled(scale: float = 2.0**10, *, enabled: bool = True) -> TrainState:
    return TrainState(
        model=nn.Linear(2, 2),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=enabled),
    )


def test_a_grad_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    state, other = scaled(), scaled(4.0)
    optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
    for _ in range(4):
        state.grad_scaler.scale(state.model(torch.ones(1, 2)).sum()).backward()
        state.grad_scaler.step(optimizer)
        state.grad_scaler.update()
    saved(tmp_path, state)
    assert state.grad_scaler.state_dict() != other.grad_scaler.state_dict()
    resume(tmp_path, other)
    assert other.grad_scaler.state_dict() == state.grad_scaler.state_dict()
    assert other.grad_scaler.get_scale() == 2.0**11
    saved(tmp_path / "disabled", scaled(enabled=False))
    resume(tmp_path / "disabled", scaled(enabled=False))


def test_a_grad_scaler_that_only_one_side_has(tmp_path: Path) -> None:
    saved(tmp_path / "with", scaled())
    saved(tmp_path / "without", TrainState(model=nn.Linear(2, 2)))
    with pytest.raises(MismatchError) as caught:
        resume(tmp_path / "with", TrainState(model=nn.Linear(2, 2)))
    assert caught.value.unexpected == ["grad_scaler.json"]
    with pytest.raises(MismatchError, match="would start the loss scale afresh"):
        resume(tmp_path / "without", scaled())
    with pytest.raises(MismatchError, match="the target's is disabled"):
        resume(tmp_path / "with", scaled(enabled=False))
    load(tmp_path / "with", TrainState(model=nn.Linear(2, 2)))


def test_a_grad_scaler_that_does_not_take_its_state_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, scaled())
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda *_: None)
    with pytest.raises(ResumeMismatchError, match=r"grad_scaler\.json: scale was 1024\.0 and is 4\.0"):
        resume(tmp_path, scaled(4.0))
