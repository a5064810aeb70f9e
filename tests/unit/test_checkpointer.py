"""Does a training loop get back exactly what it saved, or a clear error, in one process?"""

from __future__ import annotations

import json
import logging
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, Every, Latest, RunState, TrainState
from shardpoint.data import StatefulDistributedSampler
from shardpoint.errors import (
    AlreadyExistsError,
    ChecksumError,
    CorruptionError,
    FencedError,
    MismatchError,
    RootBusyError,
    StorageError,
    TruncatedError,
    UnsupportedFormatError,
    UsageError,
)
from shardpoint.events import Event
from shardpoint.manifest import FORMAT_MAJOR, MANIFEST_NAME, decode_manifest, encode_manifest
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.training import OPTIMIZERS, Net, bits, flip, net, on_disk, optimizer_state, same_bits, train, weights

BATCH = 8


def made(seed: int, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> TrainState:
    model = net(seed, dtype)
    stepped = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(stepped, [2, 2, 5])
    return TrainState(model=model, optimizer=stepped, lr_scheduler=scheduler)


def step(state: TrainState, steps: range, dtype: torch.dtype = torch.float32) -> list[float]:
    assert state.optimizer is not None
    losses = []
    for number in steps:
        losses += train(state.model, state.optimizer, range(number, number + 1), dtype)
        state.lr_scheduler.step()
    return losses


def contents(state: TrainState) -> dict[str, Any]:
    """Return everything that a load could change, as bytes."""
    assert state.optimizer is not None
    found = {name: bits(tensor) for name, tensor in weights(state.model).items()}
    found |= {f"opt.{k}": bits(v) for k, v in optimizer_state(state.model, state.optimizer).items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    rng = (random.getstate(), torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()))  # noqa: NPY002
    return {"tensors": found, "groups": repr(groups), "lr": repr(state.lr_scheduler.state_dict()), "rng": rng}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_next_steps_are_the_same_to_the_last_bit(optimizer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = made(0, optimizer, dtype)
    step(state, range(3), dtype)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=1, step=3, batch_size=BATCH)
    saved = contents(state)["tensors"], optimizer_state(state.model, state.optimizer)  # type: ignore[arg-type]
    expected = step(state, range(3, 6), dtype)
    other = made(7, optimizer, dtype)
    step(other, range(20, 22), dtype)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(other) == RunState(1, 3, 3 * BATCH)
    assert contents(other)["tensors"] == saved[0]
    assert other.optimizer is not None
    assert same_bits(optimizer_state(other.model, other.optimizer), saved[1])
    assert step(other, range(3, 6), dtype) == expected
    assert contents(other)["tensors"] == contents(state)["tensors"]
    assert contents(other)["groups"] == contents(state)["groups"]


def test_files_hold_what_the_live_objects_hold(tmp_path: Path) -> None:
    state = made(0)
    step(state, range(2))
    assert state.optimizer is not None
    with Checkpointer(tmp_path) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=2, batch_size=BATCH, metrics={"loss": float("nan")})
        assert pending is not None
        assert pending.done()
        result = pending.result()
    directory = Path(result.path)
    assert directory == tmp_path / "epoch-0_step-2"
    assert same_bits(on_disk(directory / "modeling"), weights(state.model))
    states = optimizer_state(state.model, state.optimizer)
    assert same_bits(on_disk(directory / "optimizer"), {k: v for k, v in states.items() if v.dim() > 0})
    assert json.loads((directory / "running_states.json").read_text()) == {
        "epoch": 0,
        "step": 2,
        "sample_start_index": 16,
    }
    assert not any("scratch" in name for name in on_disk(directory / "modeling"))
    for path in directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert path.suffix in {".json", ".safetensors"}
            assert not data.startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"))
            with pytest.raises(
                (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, UnicodeDecodeError)
            ):
                pickle.loads(data)


def test_saving_neither_steps_nor_changes_anything(tmp_path: Path) -> None:
    state = made(0)
    before = contents(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=0, batch_size=BATCH)
        assert contents(state) == before
        assert state.optimizer is not None
        assert not state.optimizer.state
        step(state, range(2))
        before = contents(state)
        checkpointer.save(state, epoch=0, step=2, batch_size=BATCH)
    assert contents(state) == before


def test_before_the_first_step_and_parameters_without_state(tmp_path: Path) -> None:
    fresh = made(0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(fresh, epoch=0, step=0, batch_size=BATCH)
        used = made(3)
        step(used, range(2))
        assert checkpointer.resume(used) == RunState(0, 0, 0)
    assert used.optimizer is not None
    assert not used.optimizer.state
    assert step(used, range(3)) == step(fresh, range(3))
    assert used.model.get_parameter("unused") not in used.optimizer.state


def test_several_groups_in_another_order(tmp_path: Path) -> None:
    def grouped(model: Net, *, turned: bool) -> TrainState:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
        if turned:
            groups = [{"params": group["params"][::-1]} for group in reversed(groups)]
        return TrainState(model=model, optimizer=torch.optim.AdamW(groups, lr=0.05))

    state, other = grouped(net(0), turned=False), grouped(net(5), turned=True)
    assert state.optimizer is not None
    assert other.optimizer is not None
    train(state.model, state.optimizer, range(3))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=3, batch_size=1)
        checkpointer.resume(other)
    assert other.optimizer.param_groups[1]["weight_decay"] == 0.1
    assert other.optimizer.param_groups[0]["lr"] == 0.02
    assert train(state.model, state.optimizer, range(3, 6)) == train(other.model, other.optimizer, range(3, 6))
    assert same_bits(weights(state.model), weights(other.model))


def test_bf16_parameters_with_fp32_state(tmp_path: Path) -> None:
    def with_masters(seed: int) -> TrainState:
        model = net(seed, torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter] = {"master": torch.randn(parameter.shape), "count": torch.tensor(2**40 + seed)}
        return TrainState(model=model, optimizer=optimizer)

    state, other = with_masters(1), with_masters(2)
    assert state.optimizer is not None
    assert other.optimizer is not None
    other.optimizer.state.clear()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=0, batch_size=1)
        checkpointer.resume(other)
    found = optimizer_state(other.model, other.optimizer)
    assert same_bits(found, optimizer_state(state.model, state.optimizer))
    assert found["head.bias.master"].dtype == torch.float32
    assert found["head.bias.count"].item() == 2**40 + 1


def test_random_state_is_restored_last(tmp_path: Path) -> None:
    class Greedy:  # draws while it is restored
        def state_dict(self) -> dict[str, int]:
            return {"position": 3}

        def load_state_dict(self, state: dict[str, int]) -> None:
            assert state == {"position": 3}
            torch.rand(100)
            random.random()

    model = net(0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, sampler=Greedy()), epoch=0, step=1, batch_size=1)
        expected = random.random(), np.random.rand(), torch.rand(3).tolist(), torch.randn(3).tolist()  # noqa: NPY002
        random.seed(9)
        np.random.seed(9)  # noqa: NPY002
        torch.manual_seed(9)
        checkpointer.resume(TrainState(model=net(4), sampler=Greedy()))
        assert (random.random(), np.random.rand(), torch.rand(3).tolist(), torch.randn(3).tolist()) == expected  # noqa: NPY002


def test_the_sampler_goes_on(tmp_path: Path) -> None:
    def sampler() -> StatefulDistributedSampler:
        return StatefulDistributedSampler(range(20), num_replicas=1, rank=0, shuffle=True, seed=3)

    one = sampler()
    one.set_epoch(2)
    one.set_start_index(8)
    expected = list(one)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=net(0), sampler=one), epoch=2, step=1, batch_size=8)
        two = sampler()
        checkpointer.resume(TrainState(model=net(1), sampler=two))
    assert list(two) == expected


def test_a_plateau_scheduler_keeps_its_infinities(tmp_path: Path) -> None:
    def plateau(seed: int) -> TrainState:
        model = net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler)

    state, other = plateau(0), plateau(1)
    other.lr_scheduler.step(3.0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=0, batch_size=1)
        checkpointer.resume(other)
    assert other.lr_scheduler.best == float("inf")
    assert other.lr_scheduler.state_dict() == state.lr_scheduler.state_dict()


# ---- what does not fit


def deviate(state: TrainState) -> TrainState:
    """Make a target that differs in every way."""
    model = net(3)
    model.embed = nn.Linear(4, 5)  # another shape
    model.head = model.head.to(torch.float64)  # another dtype
    model.extra = nn.Linear(2, 2)  # missing
    del model.frozen  # unexpected
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.1)  # groups
    return TrainState(model=model, optimizer=optimizer, lr_scheduler=None, sampler=state.lr_scheduler)


def test_a_mismatch_lists_everything_and_changes_nothing(tmp_path: Path) -> None:
    state = made(0)
    step(state, range(2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
        other = deviate(state)
        assert other.optimizer is not None
        before = {name: bits(tensor) for name, tensor in weights(other.model).items()}
        rng, groups = torch.get_rng_state().tolist(), repr(other.optimizer.state_dict()["param_groups"])
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(other)
    error = caught.value
    assert {"modeling: extra.weight", "modeling: extra.bias", "data"} <= set(error.missing)
    assert {"modeling: frozen", "lr_scheduler.json"} <= set(error.unexpected)
    text = "\n".join(error.mismatched)
    assert "modeling: embed.weight: stored F32 [5, 3], the target wants F32 [5, 4]" in text
    assert "modeling: head.weight: stored F32 [1, 5], the target wants F64 [1, 5]" in text
    assert "optimizer: the parameters of stored group 0 are in several groups now" in text
    assert "optimizer: extra.weight is in the optimizer, but in no group of the checkpoint" in error.missing
    assert "optimizer: frozen is in a param group of the checkpoint, but in no rank's optimizer" in error.unexpected
    assert {name: bits(tensor) for name, tensor in weights(other.model).items()} == before
    assert (torch.get_rng_state().tolist(), repr(other.optimizer.state_dict()["param_groups"])) == (rng, groups)
    assert not other.optimizer.state


def test_another_class_of_scheduler_is_an_error(tmp_path: Path) -> None:
    state = made(0)
    assert state.optimizer is not None
    state.lr_scheduler = torch.optim.lr_scheduler.StepLR(state.optimizer, 3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        state.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(state.optimizer, 0.5)
        before = repr(state.lr_scheduler.state_dict())
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(state)
    assert caught.value.mismatched == ["lr_scheduler.json: the state of StepLR, the target is ExponentialLR"]
    assert repr(state.lr_scheduler.state_dict()) == before


def test_schedulers_inside_a_scheduler_are_matched_too(tmp_path: Path) -> None:
    state = made(0)
    optimizer = state.optimizer
    assert optimizer is not None
    kinds = torch.optim.lr_scheduler
    state.lr_scheduler = kinds.ChainedScheduler([kinds.StepLR(optimizer, 3), kinds.ExponentialLR(optimizer, 0.5)])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        for others in ([kinds.StepLR(optimizer, 3)], [kinds.StepLR(optimizer, 3), kinds.ConstantLR(optimizer)]):
            state.lr_scheduler = kinds.ChainedScheduler(others)
            before = repr(state.lr_scheduler.state_dict())
            with pytest.raises(MismatchError, match=r"the state of ChainedScheduler\(StepLR, ExponentialLR\)"):
                checkpointer.resume(state)
            assert repr(state.lr_scheduler.state_dict()) == before


def test_a_sampler_over_other_data_changes_nothing(tmp_path: Path) -> None:
    state = made(0)
    state.sampler = StatefulDistributedSampler(range(10))
    state.sampler.set_start_index(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        other = made(1)
        other.sampler = StatefulDistributedSampler(range(11))
        before = {name: bits(tensor) for name, tensor in weights(other.model).items()}
        with pytest.raises(MismatchError, match="num_samples=10"):
            checkpointer.resume(other)
    assert {name: bits(tensor) for name, tensor in weights(other.model).items()} == before


def test_what_only_one_side_has_is_an_error(tmp_path: Path) -> None:
    state = made(0)
    step(state, range(1))
    with Checkpointer(tmp_path / "full") as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(TrainState(model=net(1)))
        assert set(caught.value.unexpected) == {"optimizer", "lr_scheduler.json"}
    with Checkpointer(tmp_path / "bare") as checkpointer:
        checkpointer.save(TrainState(model=net(1)), epoch=0, step=1, batch_size=1)
        before = contents(state)
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(state)
        assert [name.partition(" ")[0] for name in caught.value.missing] == ["optimizer", "lr_scheduler.json"]
        assert contents(state) == before


def test_another_optimizer_is_a_mismatch(tmp_path: Path) -> None:
    state, other = made(0, "adamw"), made(1, "sgd_momentum")
    step(state, range(1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        with pytest.raises(MismatchError, match="the state of AdamW, the target is SGD"):
            checkpointer.resume(other)


def test_extra_states_come_back_and_must_match(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> dict[str, Any]:
            return {"calls": self.calls, "scale": torch.tensor([1.5, 2.5])}

        def set_extra_state(self, state: Any) -> None:
            self.calls, self.scale = state["calls"], state["scale"]

    first, second = Counting(2, 2), Counting(2, 2)
    one, two = nn.Sequential(first, nn.Linear(2, 2)), nn.Sequential(second, nn.Linear(2, 2))
    first.calls = 5
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=one), epoch=0, step=0, batch_size=1)
        checkpointer.resume(TrainState(model=two))
        assert second.calls == 5
        assert torch.equal(second.scale, torch.tensor([1.5, 2.5]))
        plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(TrainState(model=plain))
        assert caught.value.unexpected == ["modeling: extra state of 0"]
        moved = nn.Sequential(nn.Linear(2, 2), Counting(2, 2))
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(TrainState(model=moved))
        assert caught.value.missing == ["modeling: extra state of 1"]


# ---- roles


def test_roles(tmp_path: Path) -> None:
    roles = {"actor": made(0), "critic": made(1, "sgd_momentum")}
    for state in roles.values():
        step(state, range(2))
    with Checkpointer(tmp_path) as checkpointer:
        pending = checkpointer.save(roles, epoch=0, step=2, batch_size=4)
        assert pending is not None
        directory = Path(pending.result().path)
        assert {path.name for path in directory.iterdir()} == {
            "actor",
            "critic",
            "rng",
            "running_states.json",
            MANIFEST_NAME,
        }
        for name, state in roles.items():
            assert same_bits(on_disk(directory / name / "modeling"), weights(state.model))
        others = {"critic": made(8, "sgd_momentum"), "actor": made(9)}
        assert checkpointer.resume(others) == RunState(0, 2, 8)
        for name, state in roles.items():
            assert contents(state)["tensors"] == contents(others[name])["tensors"]
        before = contents(others["actor"])
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume({"actor": others["actor"], "reward": made(1)})
        assert caught.value.missing == ["role 'reward'"]
        assert caught.value.unexpected[0] == "role 'critic'"
        assert contents(others["actor"]) == before
        with pytest.raises(MismatchError, match="role ''"):
            checkpointer.resume(others["actor"])


@pytest.mark.parametrize("roles", [{}, {"a/b": None}, {"..": None}, {"rng": None}, {"": None}])
def test_role_names(roles: dict[str, Any], tmp_path: Path) -> None:
    state = {name: TrainState(model=net(0)) for name in roles}
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError):
        checkpointer.save(state, epoch=0, step=0, batch_size=1)


# ---- damage

KINDS = {
    "weights": ("modeling/model-00001-of-00001.safetensors", ChecksumError),
    "optimizer": ("optimizer/optimizer-00001-of-00001.safetensors", ChecksumError),
    "groups": ("optimizer/param_groups.json", ChecksumError),
    "scheduler": ("lr_scheduler.json", ChecksumError),
    "position": ("running_states.json", ChecksumError),
    "rng": ("rng/rank-00000.json", ChecksumError),
    "manifest": (MANIFEST_NAME, CorruptionError),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_flipped_byte_is_named_and_an_earlier_checkpoint_taken(kind: str, tmp_path: Path) -> None:
    path, error = KINDS[kind]
    state = made(0)
    told: list[Event] = []
    with Checkpointer(tmp_path, listener=told.append) as checkpointer:
        for number in (1, 2):
            step(state, range(number, number + 1))
            checkpointer.save(state, epoch=0, step=number, batch_size=1)
            if number == 1:
                first = contents(state)
        flip(tmp_path / "epoch-0_step-2" / path)
        other = made(5)
        assert checkpointer.resume(other) == RunState(0, 1, 1)
        assert contents(other) == first
    fell_back = [event for event in told if event.kind == "fell_back"]
    assert [(event.key, event.level) for event in fell_back] == [("epoch-0_step-2", logging.WARNING)]
    assert path in fell_back[0].message
    if path.endswith(".safetensors"):  # the last byte is the last tensor's
        assert "tensor " in fell_back[0].message
    flip(tmp_path / "epoch-0_step-1" / path)
    before = contents(other)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(error) as caught:
        checkpointer.resume(other)
    assert path in caught.value.key
    if kind not in {"weights", "optimizer"}:
        assert not caught.value.target_modified
        assert contents(other) == before
    else:
        assert caught.value.target_modified
        assert "#" in caught.value.key


@pytest.mark.parametrize("damage", ["short", "gone"])
@pytest.mark.parametrize("kind", ["weights", "optimizer", "scheduler"])
def test_a_missing_or_short_file_is_found_before_the_target_changes(kind: str, damage: str, tmp_path: Path) -> None:
    state = made(0)
    step(state, range(2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
    path = tmp_path / "epoch-0_step-2" / KINDS[kind][0]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    other = made(5)
    before = contents(other)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TruncatedError) as caught:
        checkpointer.resume(other)
    assert caught.value.key == KINDS[kind][0]
    assert not caught.value.target_modified
    assert contents(other) == before


def test_a_newer_format_ends_the_resume(tmp_path: Path) -> None:
    state = made(0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
    newer(tmp_path / "epoch-0_step-2")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UnsupportedFormatError):
        checkpointer.resume(state)


def newer(checkpoint: Path) -> None:
    """Make a manifest one of the next major version, as that release would write it."""
    path = checkpoint / MANIFEST_NAME
    manifest = decode_manifest(path.read_bytes())
    path.write_bytes(encode_manifest(msgspec.structs.replace(manifest, version=(FORMAT_MAJOR + 1, 0))))


# ---- which one, and what stays


def test_the_newest_is_the_one_committed_last(tmp_path: Path) -> None:
    state = made(0)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (9, 3):
            checkpointer.save(state, epoch=0, step=number, batch_size=1)
        assert checkpointer.resume(state) == RunState(0, 3, 3)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    state = made(0)
    with Checkpointer(tmp_path) as checkpointer:
        first = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
        step(state, range(1))
        second = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert first is not None
        assert second is not None
        assert second.result().sequence == first.result().sequence + 2
        assert same_bits(on_disk(tmp_path / "epoch-0_step-1" / "modeling"), weights(state.model))
        assert checkpointer.resume(state) == RunState(0, 1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shardpoint", "epoch-0_step-1", "epoch-0_step-2"]


def test_policies_and_foreign_directories(tmp_path: Path) -> None:
    foreign = tmp_path / "epoch-0_step-1"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep me")
    (tmp_path / "notes").mkdir()
    state = made(0)
    with Checkpointer(tmp_path, save=[Every(steps=2)], keep=[Latest(2)]) as checkpointer:
        saved = [number for number in range(1, 9) if checkpointer.save(state, epoch=0, step=number, batch_size=1)]
        assert saved == [2, 4, 6, 8]
        assert checkpointer.save(state, epoch=0, step=9, batch_size=1, force=True) is not None
        with pytest.raises(AlreadyExistsError):
            checkpointer.save(state, epoch=0, step=1, batch_size=1, force=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".shardpoint", "epoch-0_step-1", "epoch-0_step-8", "epoch-0_step-9", "notes"]
    assert (foreign / "mine.txt").read_text() == "keep me"


def test_a_failed_save_leaves_the_one_before(tmp_path: Path) -> None:
    state = made(0)
    store = FaultyStore(LocalStore(tmp_path), [Fault("write", "*/attempt-epoch-0_step-2*/modeling/*", nth=2)])
    with Checkpointer(tmp_path, store=store) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        first = contents(state)
        step(state, range(1))
        with pytest.raises(StorageError, match="injected"):
            checkpointer.save(state, epoch=0, step=2, batch_size=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".shardpoint", "epoch-0_step-1"]
        other = made(4)
        assert checkpointer.resume(other) == RunState(0, 1, 1)
        assert contents(other) == first
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
        assert checkpointer.resume(other) == RunState(0, 2, 2)


@pytest.mark.parametrize("where", ["manifest", "rename"])
def test_a_failed_publish_leaves_the_one_before(where: str, tmp_path: Path) -> None:
    faults = {
        "manifest": Fault("write_document", f"*/attempt-epoch-0_step-2*/{MANIFEST_NAME}"),
        "rename": Fault("rename", "*/attempt-epoch-0_step-2*"),
    }
    state = made(0)
    with Checkpointer(tmp_path, store=FaultyStore(LocalStore(tmp_path), [faults[where]])) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        with pytest.raises(StorageError, match="injected"):
            checkpointer.save(state, epoch=0, step=2, batch_size=1)
        assert checkpointer.resume(state) == RunState(0, 1, 1)
        checkpointer.save(state, epoch=0, step=2, batch_size=1)


def test_arguments(tmp_path: Path) -> None:
    state = TrainState(model=net(0))
    wrong: list[dict[str, Any]] = [
        {"step": -1},
        {"epoch": -1},
        {"step": True},
        {"step": 1.0},
        {"batch_size": 0},
        {"metrics": {"loss": "low"}},
        {"metrics": {3: 1.0}},
    ]
    with Checkpointer(tmp_path) as checkpointer:
        for change in wrong:
            arguments: dict[str, Any] = {"epoch": 0, "step": 1, "batch_size": 1} | change
            with pytest.raises(UsageError):
                checkpointer.save(state, **arguments)
        assert checkpointer.resume(state) is None
    assert [path.name for path in tmp_path.iterdir()] == [".shardpoint"]
    with pytest.raises(UsageError, match="closed"):
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        Checkpointer(tmp_path / "file")


def test_a_run_that_lost_its_root_saves_no_more(tmp_path: Path) -> None:
    state = TrainState(model=net(0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        control = tmp_path / ".shardpoint"
        (mine,) = control.glob("inc-*")
        mine.rename(control / f"fenced-{mine.name.removeprefix('inc-')}")  # what another run does that takes over
        with pytest.raises(FencedError):
            checkpointer.save(state, epoch=0, step=2, batch_size=1)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0_step-1"]


def test_the_root_is_free_after_close(tmp_path: Path) -> None:
    own = (
        "from shardpoint.commit import acquire_root; from shardpoint.storage import LocalStore; acquire_root(LocalStore"
    )
    program = f"{own}({str(tmp_path)!r}))"
    with Checkpointer(tmp_path):
        busy = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert RootBusyError.__name__ in busy.stderr
    subprocess.run([sys.executable, "-c", program], check=True)


def test_all_corrupt_says_so(tmp_path: Path) -> None:
    state = made(0)
    with Checkpointer(tmp_path) as checkpointer:
        for number in (1, 2):
            checkpointer.save(state, epoch=0, step=number, batch_size=1)
            flip(tmp_path / f"epoch-0_step-{number}" / "lr_scheduler.json")
        with pytest.raises(CorruptionError) as caught:
            checkpointer.resume(state)
    assert "none of the 2 checkpoints" in "".join(caught.value.__notes__)


def test_what_changed_between_two_saves_is_seen(tmp_path: Path) -> None:
    """Tensors that did not change are not looked at again; each of these changes must be noticed all the same."""
    torch.manual_seed(0)
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(4, 6)) for name in "abcdefg"})
    state = TrainState(model=model)

    def saved(number: int) -> dict[str, torch.Tensor]:
        pending = checkpointer.save(state, epoch=0, step=number, batch_size=1)
        assert pending is not None
        return on_disk(tmp_path / f"epoch-0_step-{number}" / "modeling")

    with Checkpointer(tmp_path) as checkpointer:
        assert same_bits(saved(1), weights(model))
        model["a"].data = torch.randn(4, 6)  # other memory
        model["b"].data = model["b"].data.double()
        model["c"].data = torch.randn(2, 12)
        model["d"].data = model["d"].data.view(6, 4)  # the same memory in another shape
        model["e"].data = torch.randn(6, 4).t()  # strides
        model["f"] = nn.Parameter(torch.randn(4, 6))  # another object
        del model["g"]
        assert same_bits(saved(2), weights(model))
        model["a"].data.add_(1)  # contents only
        assert same_bits(saved(3), weights(model))
        model["a"].data = model["a"].data[:1, :1].expand(4, 6)
        with pytest.raises(UsageError, match="expanded"):
            saved(4)
