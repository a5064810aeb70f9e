"""Are all roles one checkpoint, is what is frozen linked and never trusted blindly, and does one role load alone?"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, Latest, TrainState, load
from shardpoint.catalog import verify
from shardpoint.commit import find_committed
from shardpoint.engine.linking import MAX_LINKED
from shardpoint.errors import (
    CommitUnknownError,
    MismatchError,
    NotFoundError,
    ResumeMismatchError,
    StorageError,
    UsageError,
)
from shardpoint.events import Event
from shardpoint.manifest import Manifest, decode_manifest
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore
from tests.training import OPTIMIZERS, net, on_disk, same_bits, train, weights

REFERENCE = "reference/modeling/model-00001-of-00001.safetensors"
ACTOR = "actor/modeling/model-00001-of-00001.safetensors"


class Controller:
    """An adaptive KL coefficient."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def made(seed: int, model: Callable[[int], nn.Module] = net) -> dict[str, TrainState]:
    actor, critic = model(seed), model(seed + 1)
    buffer: dict[str, Any] = {"tokens": torch.arange(seed * 6).reshape(seed, 6), "rewards": [0.5] * seed}
    return {
        "actor": TrainState(
            model=actor,
            optimizer=OPTIMIZERS["adamw"](actor.parameters()),
            extras={"kl": Controller(0.25 * seed), "buffer": buffer},
        ),
        "critic": TrainState(model=critic, optimizer=OPTIMIZERS["adamw"](critic.parameters())),
        "reference": TrainState(model=model(seed + 2), frozen=True),
    }


def step(roles: dict[str, TrainState], number: int) -> None:
    for state in roles.values():
        if state.optimizer is not None:
            train(state.model, state.optimizer, range(number, number + 1))


def save(checkpointer: Checkpointer, roles: dict[str, TrainState], number: int, **options: Any) -> None:
    pending = checkpointer.save(roles, epoch=0, step=number, batch_size=4, **options)
    assert pending is not None
    pending.result()


def manifest_of(root: Path, number: int) -> Manifest:
    return decode_manifest((root / f"epoch-0_step-{number}" / "shardpoint.json").read_bytes())


def inode(root: Path, number: int, path: str) -> int:
    return (root / f"epoch-0_step-{number}" / path).stat().st_ino


def is_intact(root: Path, name: str) -> bool:
    committed = find_committed(LocalStore(root), name)
    assert committed is not None
    return verify(LocalStore(root), committed).ok


def test_every_role_comes_back(tmp_path: Path) -> None:
    roles = made(3)
    with Checkpointer(tmp_path) as checkpointer:
        step(roles, 1)
        save(checkpointer, roles, 1)
        expected = {name: weights(state.model) for name, state in roles.items()}
        fresh = made(5)
        checkpointer.resume(fresh)
    assert all(same_bits(weights(fresh[name].model), expected[name]) for name in roles)
    extras = fresh["actor"].extras
    assert extras["kl"].value == 0.75
    assert torch.equal(extras["buffer"]["tokens"], torch.arange(18).reshape(3, 6))
    assert extras["buffer"]["rewards"] == [0.5] * 3
    assert list(extras["buffer"]) == ["tokens", "rewards"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_frozen_model_is_linked_and_complete_in_each_checkpoint(tmp_path: Path, *, async_save: bool) -> None:
    roles = made(1)
    with Checkpointer(tmp_path, keep=[Latest(2)], async_save=async_save) as checkpointer:
        for number in range(1, 5):
            step(roles, number)
            save(checkpointer, roles, number)
        assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch-0_step-3", "epoch-0_step-4"]
    assert inode(tmp_path, 3, REFERENCE) == inode(tmp_path, 4, REFERENCE)
    assert inode(tmp_path, 3, ACTOR) != inode(tmp_path, 4, ACTOR)
    files = {entry.path: entry.linked for entry in manifest_of(tmp_path, 4).files}
    assert files[REFERENCE] == 3
    assert files[ACTOR] == 0
    for number in (3, 4):
        directory = tmp_path / f"epoch-0_step-{number}"
        assert is_intact(tmp_path, directory.name)
        assert same_bits(weights(roles["reference"].model), on_disk(directory / "reference" / "modeling"))


def test_a_resumed_run_links_what_the_run_before_it_wrote(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, made(1), 1)
    roles = made(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(roles)
        step(roles, 2)
        result = checkpointer.save(roles, epoch=0, step=2, batch_size=4)
    assert inode(tmp_path, 1, REFERENCE) == inode(tmp_path, 2, REFERENCE)
    assert result is not None
    size = (tmp_path / "epoch-0_step-2" / REFERENCE).stat().st_size
    assert result.result().linked_bytes == size


@pytest.mark.parametrize("async_save", [False, True])
def test_a_frozen_model_that_changed_is_written_and_told(tmp_path: Path, *, async_save: bool) -> None:
    roles, told = made(1), list[Event]()
    with Checkpointer(tmp_path, listener=told.append, async_save=async_save) as checkpointer:
        save(checkpointer, roles, 1)
        with torch.no_grad():
            roles["reference"].model.head.weight[0, 1] += 1.0  # type: ignore[index, operator, union-attr]  # a Linear
        save(checkpointer, roles, 2)
        save(checkpointer, roles, 3)
    (event,) = [event for event in told if event.kind == "frozen_changed"]
    assert "head.weight" in event.message
    assert "epoch-0_step-2" in event.message
    assert "embed" not in event.message
    assert inode(tmp_path, 1, REFERENCE) != inode(tmp_path, 2, REFERENCE) == inode(tmp_path, 3, REFERENCE)
    assert same_bits(weights(roles["reference"].model), on_disk(tmp_path / "epoch-0_step-3/reference/modeling"))
    assert not same_bits(weights(roles["reference"].model), on_disk(tmp_path / "epoch-0_step-1/reference/modeling"))


def test_one_inode_does_not_serve_for_ever(tmp_path: Path) -> None:
    roles = made(1)
    with Checkpointer(tmp_path, keep=[Latest(1)]) as checkpointer:
        counts = []
        for number in range(MAX_LINKED + 3):
            save(checkpointer, roles, number)
            (entry,) = [entry for entry in manifest_of(tmp_path, number).files if entry.path == REFERENCE]
            counts.append(entry.linked)
    assert counts == [*range(MAX_LINKED + 1), 0, 1]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_without_links_the_file_is_written(tmp_path: Path, refusal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    roles = made(1)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, roles, 1)
        monkeypatch.setattr(os, "link", refuse)
        save(checkpointer, roles, 2)
    assert inode(tmp_path, 1, REFERENCE) != inode(tmp_path, 2, REFERENCE)
    assert all(entry.linked == 0 for entry in manifest_of(tmp_path, 2).files)
    assert is_intact(tmp_path, "epoch-0_step-2")


def test_another_error_of_a_link_fails_the_save(tmp_path: Path) -> None:
    store = FaultyStore(LocalStore(tmp_path), [Fault("link", errno=errno.EIO)])
    roles = made(1)
    with Checkpointer(tmp_path, store=store) as checkpointer:
        save(checkpointer, roles, 1)
        with pytest.raises(StorageError):
            save(checkpointer, roles, 2)
        save(checkpointer, roles, 3)
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch-0_step-1", "epoch-0_step-3"]


def test_a_damaged_file_is_not_hidden_by_its_links(tmp_path: Path) -> None:
    roles = made(1)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, roles, 1)
        save(checkpointer, roles, 2)
    with (tmp_path / "epoch-0_step-1" / REFERENCE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert [is_intact(tmp_path, f"epoch-0_step-{number}") for number in (1, 2)] == [False, False]


def test_one_role_loads_alone_while_the_run_goes_on(tmp_path: Path) -> None:
    roles = made(1)
    with Checkpointer(tmp_path) as checkpointer:
        step(roles, 1)
        save(checkpointer, roles, 1)
        fresh = net(9)
        assert load(tmp_path, TrainState(model=fresh), roles=["actor"]).step == 1
        assert same_bits(weights(fresh), weights(roles["actor"].model))
        several = made(7)
        untouched = weights(several["critic"].model)
        load(tmp_path / "epoch-0_step-1", several, roles=["actor", "reference"])
        assert same_bits(weights(several["actor"].model), weights(roles["actor"].model))
        assert same_bits(weights(several["reference"].model), weights(roles["reference"].model))
        assert same_bits(weights(several["critic"].model), untouched)
        step(roles, 2)
        save(checkpointer, roles, 2)


def test_a_load_leaves_the_random_state_alone(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, made(1), 1)
    fresh = net(9)
    before = torch.random.get_rng_state()
    load(tmp_path, TrainState(model=fresh), roles=["critic"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_a_load_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="shardpoint ls"):
        load(tmp_path, made(1))
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, made(1), 1)
    with pytest.raises(UsageError, match=r"roles \['judge'\]"):
        load(tmp_path, made(1), roles=["judge"])
    with pytest.raises(UsageError, match="give a list of names"):
        load(tmp_path, made(1), roles="actor")
    with pytest.raises(UsageError, match="one TrainState cannot be filled"):
        load(tmp_path, TrainState(model=net(1)), roles=["actor", "critic"])
    with pytest.raises(MismatchError, match="judge"):
        load(tmp_path, TrainState(model=net(1)), roles=["judge"])
    other = net(1)
    state = TrainState(model=other, optimizer=OPTIMIZERS["adamw"](other.parameters()))
    with pytest.raises(MismatchError, match="optimizer"):
        load(tmp_path, state, roles=["reference"])


def test_a_missing_or_unknown_extra_is_an_error(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, made(1), 1)
        fewer, more = made(2), made(2)
        fewer["actor"].extras = {"kl": Controller(0.0)}
        more["critic"].extras = {"kl": Controller(0.0)}
        with pytest.raises(MismatchError, match="actor/extras/buffer"):
            checkpointer.resume(fewer)
        with pytest.raises(MismatchError, match="critic/extras/kl"):
            checkpointer.resume(more)
        assert fewer["actor"].extras["kl"].value == 0.0


@pytest.mark.parametrize(
    "state, message",
    [
        (lambda: TrainState(model=nn.Linear(1, 1), extras={"a/b": {}}), "an extra called 'a/b'"),
        (lambda: TrainState(model=nn.Linear(1, 1), extras={"kl": 0.1}), "give a dict, or an object with state_dict"),
        (
            lambda: TrainState(
                model=(model := nn.Linear(1, 1)), optimizer=torch.optim.SGD(model.parameters()), frozen=True
            ),
            "is frozen and has optimizer",
        ),
    ],
)
def test_a_wrong_role_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UsageError, match=message):
            checkpointer.save({"actor": state()}, epoch=0, step=1, batch_size=1)
        with pytest.raises(UsageError, match=message):
            checkpointer.save(state(), epoch=0, step=1, batch_size=1)


def test_an_extra_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    state = TrainState(model=nn.Linear(1, 1), extras={"buffer": {"rows": [object()]}})
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match="object"):
        checkpointer.save(state, epoch=0, step=1, batch_size=1)


def test_whatever_fails_all_roles_are_of_one_step(tmp_path: Path) -> None:
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}

    def live(root: Path, faults: list[Fault]) -> FaultyStore:
        """Save step 1; then, in a second life, step 2 with faults. Return the store that had them."""
        roles = made(1, tiny)
        with Checkpointer(root) as checkpointer:
            step(roles, 1)
            save(checkpointer, roles, 1)
        first.update({name: weights(state.model) for name, state in roles.items()})
        store = FaultyStore(LocalStore(root), faults)
        with Checkpointer(root, store=store) as checkpointer:
            opened.append(len(store.log))
            step(roles, 2)
            second.update({name: weights(state.model) for name, state in roles.items()})
            save(checkpointer, roles, 2)
            opened.append(len(store.log))
        return store

    opened: list[int] = []
    live(tmp_path / "whole", [])
    low, high = opened[:2]
    outcomes = set()
    for nth in range(low + 1, high + 1):
        root = tmp_path / str(nth)
        try:
            live(root, [Fault("*", nth=nth)])
        except (StorageError, CommitUnknownError):
            outcomes.add("failed")
        fresh = made(4, tiny)
        with Checkpointer(root) as checkpointer:
            run = checkpointer.resume(fresh)
        assert run is not None
        outcomes.add(f"step {run.step}")
        expected = first if run.step == 1 else second
        assert all(same_bits(weights(fresh[name].model), expected[name]) for name in fresh), f"operation {nth}"
        assert all(is_intact(root, path.name) for path in root.glob("epoch*"))
    assert outcomes == {"failed", "step 1", "step 2"}


@pytest.mark.parametrize("async_save", [False, True])
def test_nan_in_a_frozen_model_is_told_whether_its_file_is_written_or_linked(
    tmp_path: Path, *, async_save: bool
) -> None:
    roles = made(1)
    with torch.no_grad():
        roles["reference"].model.head.weight[0, 1] = torch.nan  # type: ignore[operator, union-attr]  # a Linear
    with Checkpointer(tmp_path, async_save=async_save) as checkpointer:
        for number in (1, 2):
            pending = checkpointer.save(roles, epoch=0, step=number, batch_size=4)
            assert pending is not None
            result = pending.result()
            assert bool(result.linked_bytes) == (number == 2)
            assert result.suspect is not None
            (finding,) = result.suspect.findings
            assert (finding.kind, finding.part, finding.fqn) == ("not_finite", "reference/modeling", "head.weight")
            assert finding.num_bytes == 4


def test_an_extra_that_does_not_take_its_state_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, made(1), 1)
        monkeypatch.setattr(Controller, "load_state_dict", lambda *_: None)
        with pytest.raises(ResumeMismatchError, match=r"actor/extras/kl/rank-00000.json: value was 0.25 and is 0.5"):
            checkpointer.resume(made(2))
