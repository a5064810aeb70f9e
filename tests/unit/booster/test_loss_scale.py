"""Does a loss scale move as its options say, and do steps, clipping and checkpoints follow it?

What is trained is compared with torch's own `GradScaler` under autocast.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from shardpoint import Booster, Checkpointer, DistCoordinator, TrainState, load_checkpoint, save_checkpoint
from shardpoint.booster import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from shardpoint.booster import booster as booster_module
from shardpoint.booster.loss_scale import LossScale, ScaleOptions
from shardpoint.errors import MismatchError, UsageError
from shardpoint.events import Event
from tests.training import bits

OVERFLOW = 1e5  # more than float16 holds


def scales(options: ScaleOptions, steps: str) -> list[float]:
    """Return the scale after each step; "x" is one whose gradients overflowed."""
    scale, found = LossScale(options), []
    for step in steps:
        scale.update(overflowed=step == "x")
        found.append(scale.scale)
    return found


@pytest.mark.parametrize(
    "options, steps, expected",
    [
        ({"hysteresis": 1}, "xx..", [8, 4, 4, 8]),
        ({"hysteresis": 0}, "x.", [8, 8]),
        ({}, "x.x.x", [16, 16, 8, 8, 4]),
        ({}, "x..x.x", [16, 16, 32, 32, 32, 16]),
        ({"growth_interval": 1, "growth_factor": 3}, "..", [48, 64]),
        ({"hysteresis": 1, "backoff_factor": 0.125}, "xxx", [2, 1, 1]),
        ({"hysteresis": 1, "min_scale": 0, "max_scale": None, "growth_interval": 1}, "xxxxx........",
         [8, 4, 2, 1, 0.5, 1, 2, 4, 8, 16, 32, 64, 128]),
    ],
)  # fmt: skip
def test_the_scale_moves_as_its_options_say(options: dict[str, Any], steps: str, expected: list[float]) -> None:
    small: dict[str, Any] = {"initial_scale": 16, "growth_interval": 2, "max_scale": 64}
    assert scales(ScaleOptions(**(small | options)), steps) == expected


@pytest.mark.parametrize(
    "options",
    [{"initial_scale": 0}, {"initial_scale": math.inf}, {"min_scale": 2**17}, {"max_scale": 4}, {"min_scale": -1},
     {"growth_factor": 1}, {"backoff_factor": 1}, {"backoff_factor": 0}, {"growth_interval": 0}, {"hysteresis": -1}],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    made: list[Any] = [LowLevelZeroPlugin, GeminiPlugin, functools.partial(HybridParallelPlugin, 1)]
    for make in made:
        given: dict[str, Any] = {"initial_scale": 2**16, "precision": "fp16"} | options
        with pytest.raises(UsageError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            make(**given)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def boosted(seed: int = 0, booster: Booster | None = None, **options: Any) -> tuple[Any, Any, Booster]:
    booster = booster or Booster(mixed_precision="fp16")
    model = mlp(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    model, optimizer, *_ = booster.boost(model, optimizer)
    return model, optimizer, booster


def loss_of(model: nn.Module, step: int, overflows: bool = False) -> torch.Tensor:  # noqa: FBT002
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(2, 4, generator=generator) * (OVERFLOW if overflows else 1)
    return functional.cross_entropy(model(rows).float(), torch.tensor([step % 3, 1]))


def go_on(lived: tuple[Any, Any, Booster], steps: range, overflows: tuple[int, ...] = ()) -> None:
    model, optimizer, booster = lived
    for step in steps:
        booster.backward(loss_of(model, step, step in overflows), optimizer)
        optimizer.step()
        optimizer.zero_grad()


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    found: list[torch.Tensor] = [*model.parameters()]
    for parameter in model.parameters():
        found += [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, torch.Tensor)]
    return [bits(tensor) for tensor in found]


def test_the_boosters_fp16_is_torchs_autocast_and_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booster_module, "_AUTOCAST_SCALE", ScaleOptions(growth_interval=3, hysteresis=1))
    model, optimizer, booster = boosted()
    twin = mlp()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    seen = []
    for step in range(9):
        with torch.autocast("cpu", dtype=torch.float16):
            twin_loss = loss_of(twin, step, step == 4)
        loss = loss_of(model, step, step == 4)
        assert bits(loss) == bits(twin_loss) or step == 4
        scaler.scale(twin_loss).backward()
        booster.backward(loss, optimizer)
        if step % 2:
            scaler.unscale_(twin_optimizer)
            expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            target = model if step % 4 == 1 else optimizer
            torch.testing.assert_close(booster.clip_grad_norm_(target, 0.1), expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(booster.clip_grad_norm_(target, 1.0), torch.tensor(0.1), rtol=1e-4, atol=0)
        scaler.step(twin_optimizer)
        scaler.update()
        optimizer.step()
        for one in (optimizer, twin_optimizer):
            one.zero_grad()
        seen.append(booster.loss_scale(optimizer))
        assert seen[-1] == scaler.get_scale()
    assert seen == [2.0**power for power in (16, 16, 17, 17, 16, 16, 16, 17, 17)]
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-7)


def test_without_clipping_it_is_torchs_to_the_bit() -> None:
    model, optimizer, booster = boosted()
    twin = mlp()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(5):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(twin, step)
        scaler.scale(loss).backward()
        scaler.step(twin_optimizer)
        scaler.update()
        twin_optimizer.zero_grad()
    go_on((model, optimizer, booster), range(5))
    assert states(model, optimizer) == states(twin, twin_optimizer)


def test_without_fp16_nothing_is_scaled() -> None:
    for booster in (Booster(), Booster(mixed_precision="bf16"), Booster(plugin=LowLevelZeroPlugin())):
        _, optimizer, _ = boosted(booster=booster)
        assert booster.loss_scale(optimizer) == 1.0
        assert not optimizer._optimizer_step_pre_hooks


OPTIMIZERS = [
    cls for name in sorted(dir(torch.optim))
    if inspect.isclass(cls := getattr(torch.optim, name)) and issubclass(cls, torch.optim.Optimizer)
    and name not in {"Optimizer", "LBFGS", "SparseAdam"}
]  # fmt: skip


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_that_is_left_out_changes_nothing(cls: Callable[..., torch.optim.Optimizer]) -> None:
    taken = inspect.signature(cls).parameters
    for how in ("", "foreach", "fused"):
        if how and how not in taken:
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
        optimizer = cls(model.parameters(), lr=0.1, weight_decay=0.1, **{how: True} if how else {}) if (
            "weight_decay" in taken) else cls(model.parameters(), lr=0.1)  # fmt: skip
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        booster = Booster(mixed_precision="fp16")
        booster.boost(model, optimizer, lr_scheduler=scheduler)
        for step in range(4):
            before = states(model, optimizer)
            booster.backward(loss_of(model, step, step in {0, 2}), optimizer)
            optimizer.step()
            scheduler.step()  # warns where it does not see a step before
            assert (states(model, optimizer) == before) == (step in {0, 2}), (how, step)
            optimizer.zero_grad()


def test_what_does_not_fit_a_scale_is_refused() -> None:
    model, optimizer, booster = boosted()
    optimizer.step()  # without gradients there is nothing to unscale
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=r"booster\.backward\(loss, optimizer\)"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: 0.0)
    booster.backward(loss_of(model, 0), optimizer)
    booster.clip_grad_norm_(model, 1.0)
    with pytest.raises(UsageError, match="clip after the last backward"):
        booster.backward(loss_of(model, 1), optimizer)
    optimizer.zero_grad()  # without a step: what comes next is unscaled all the same
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()
    plain = mlp()
    loss_of(plain, 1).backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-3)
    low = mlp().half()
    with pytest.raises(UsageError, match=r"float16.*master weights"):
        Booster(plugin=LowLevelZeroPlugin(precision="fp16", master_weights=False)).boost(
            low, torch.optim.SGD(low.parameters(), lr=0.1)
        )


@pytest.mark.parametrize(
    "plugin",
    [LowLevelZeroPlugin, GeminiPlugin, functools.partial(HybridParallelPlugin, 1)],
    ids=["zero", "gemini", "tp"],
)
def test_a_plugin_clips_what_is_unscaled(plugin: Any) -> None:
    model, optimizer, booster = boosted(
        booster=Booster(plugin=plugin(precision="fp16", initial_scale=16, max_norm=0.1))
    )
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
    norms = torch.stack([parameter.grad.full_tensor().norm() for parameter in model.parameters()])
    torch.testing.assert_close(norms.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


def test_gradients_are_summed_under_one_scale() -> None:
    model, optimizer, booster = boosted(booster=Booster(plugin=TorchDDPPlugin(), mixed_precision="fp16"))
    alone = boosted()
    with booster.no_sync(model, optimizer):
        booster.backward(loss_of(model, 0), optimizer)
    booster.backward(loss_of(model, 1), optimizer)
    alone[2].backward(loss_of(alone[0], 0) + loss_of(alone[0], 1), alone[1])
    optimizer.step()
    alone[1].step()
    torch.testing.assert_close(list(model.parameters()), list(alone[0].parameters()))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpointer_finds_the_scale_with_the_optimizer(tmp_path: Path, asynchronous: bool) -> None:
    whole, other = boosted(), boosted(seed=5)
    go_on(whole, range(3), overflows=(1,))
    saved = whole[2].loss_scale(whole[1])
    assert saved < 2.0**16
    with Checkpointer(tmp_path, async_save=asynchronous) as checkpointer:
        pending = checkpointer.save(TrainState(model=whole[0], optimizer=whole[1]), epoch=0, step=3, batch_size=2)
        go_on(whole, range(3, 6), overflows=(3,))
        assert pending is not None
        pending.result()
        checkpointer.resume(TrainState(model=other[0], optimizer=other[1]))
    assert other[2].loss_scale(other[1]) == saved
    go_on(other, range(3, 6), overflows=(3,))
    assert other[2].loss_scale(other[1]) == whole[2].loss_scale(whole[1]) == saved / 2
    assert states(*other[:2]) == states(*whole[:2])


def test_a_scaler_of_ones_own_has_no_place_beside_the_boosters(tmp_path: Path) -> None:
    model, optimizer, _ = boosted()
    state = TrainState(model=model, optimizer=optimizer, grad_scaler=torch.amp.GradScaler("cpu"))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match="leave grad_scaler out"):
        checkpointer.save(state, epoch=0, step=1, batch_size=2)


def test_a_change_of_precision_is_an_error_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr("shardpoint.ckpt_io.log_event", events.append)
    fp16, bf16 = boosted(), boosted(booster=Booster(mixed_precision="bf16"))
    for name, lived in (("fp16", fp16), ("bf16", bf16)):
        go_on(lived, range(2))
        save_checkpoint(tmp_path / name, lived[2], lived[0], lived[1], None, 0, 2, 2, DistCoordinator())
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(TrainState(model=bf16[0], optimizer=bf16[1]), epoch=0, step=2, batch_size=2)
        target = boosted()
        state = TrainState(model=target[0], optimizer=target[1])
        with pytest.raises(MismatchError, match=r"grad_scaler\.json") as caught:
            checkpointer.resume(state)
        assert "start the loss scale afresh" in caught.value.missing[0]
    load_checkpoint(tmp_path / "bf16" / "epoch-0_step-2", target[2], target[0], target[1], None)
    assert [event.kind for event in events] == ["scale_afresh"]
    assert target[2].loss_scale(target[1]) == 2.0**16
    assert states(*target[:2]) == states(*bf16[:2])
    back = boosted(booster=Booster(mixed_precision="bf16"))
    load_checkpoint(tmp_path / "fp16" / "epoch-0_step-2", back[2], back[0], back[1], None)
    assert states(*back[:2]) == states(*fp16[:2])
    assert len(events) == 1
