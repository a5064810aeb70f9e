"""Do the four functions keep ColossalChat's contract in one process, with our Booster and with a foreign one?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Booster, DistCoordinator, load_checkpoint, load_json, save_checkpoint, save_json
from shardpoint.errors import (
    AlreadyExistsError,
    ChecksumError,
    FencedError,
    ManifestError,
    MismatchError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
    UnsupportedFormatError,
    UsageError,
)
from tests.training import bits, flip, net, same_bits, train, weights

NAME = "epoch-1_step-500"


def made(seed: int) -> tuple[Booster, nn.Module, torch.optim.Optimizer, Any]:
    model = net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    booster = Booster()
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, None, None, scheduler)
    return booster, model, optimizer, scheduler


def save(root: Path, parts: tuple[Any, nn.Module, Any, Any], **changes: Any) -> None:
    booster, model, optimizer, scheduler = parts
    arguments = {
        "save_dir": root,
        "booster": booster,
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
        "epoch": 1,
        "step": 500,
        "batch_size": 32,
        "coordinator": DistCoordinator(),
    }
    save_checkpoint(**(arguments | changes))


def test_the_usage_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    booster, model, optimizer, lr_scheduler = made(0)
    coordinator = DistCoordinator()
    train(model, optimizer, range(3))
    # ---- the example, word by word
    save_checkpoint(save_dir="./checkpoints", booster=booster, model=model, optimizer=optimizer,
                    lr_scheduler=lr_scheduler, epoch=1, step=500, batch_size=32, coordinator=coordinator)  # fmt: skip
    epoch, step, sample_start = load_checkpoint(load_dir="./checkpoints/epoch-1_step-500", booster=booster, model=model,
                                                optimizer=optimizer, lr_scheduler=lr_scheduler)  # fmt: skip
    # ----
    assert (epoch, step, sample_start) == (1, 500, 16000)
    states = (tmp_path / "checkpoints" / NAME / "running_states.json").read_bytes()
    assert states == b'{\n    "epoch": 1,\n    "step": 500,\n    "sample_start_index": 16000\n}'
    expected = train(model, optimizer, range(3, 6))
    other = made(4)
    load_checkpoint(f"checkpoints/{NAME}", *other)
    assert train(other[1], other[2], range(3, 6)) == expected
    assert same_bits(weights(other[1]), weights(model))


def test_parts_that_are_none_are_skipped(tmp_path: Path) -> None:
    parts = made(0)
    train(parts[1], parts[2], range(2))
    save(tmp_path, parts)
    booster, model, optimizer, scheduler = made(3)
    before = weights(model)
    random = torch.get_rng_state()
    assert load_checkpoint(tmp_path / NAME, None, None, None, None) == (1, 500, 16000)
    assert load_checkpoint(tmp_path / NAME, booster, None, None, None) == (1, 500, 16000)
    assert load_checkpoint(tmp_path / NAME, booster, None, None, scheduler) == (1, 500, 16000)
    assert same_bits(weights(model), before)
    assert not optimizer.state
    load_checkpoint(tmp_path / NAME, booster, model, None, None)
    assert same_bits(weights(model), weights(parts[1]))
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    load_checkpoint(tmp_path / NAME, booster, None, optimizer, None)
    assert len(optimizer.state) == len(parts[2].state)
    assert train(model, optimizer, range(2, 4)) == train(parts[1], parts[2], range(2, 4))


def test_what_was_saved_without_is_missed(tmp_path: Path) -> None:
    booster, model, optimizer, scheduler = made(0)
    save(tmp_path, (booster, model, None, None))
    with pytest.raises(MismatchError) as caught:
        load_checkpoint(tmp_path / NAME, booster, model, optimizer, scheduler)
    assert [name.partition(" ")[0] for name in caught.value.missing] == ["optimizer", "lr_scheduler.json"]
    load_checkpoint(tmp_path / NAME, booster, model, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"epoch": -2},
        {"step": True},
        {"batch_size": 0},
        {"booster": object()},
        {"coordinator": object()},
    ],
)
def test_wrong_arguments(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        save(tmp_path / "root", made(0), **changes)
    assert not (tmp_path / "root").exists()


def test_the_coordinators_master_must_be_rank_0(tmp_path: Path) -> None:
    class Elsewhere:
        def is_master(self) -> bool:
            return False

    with pytest.raises(UsageError, match="rank 0"):
        save(tmp_path, made(0), coordinator=Elsewhere())


def test_places_that_are_not_checkpoints(tmp_path: Path) -> None:
    parts = made(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        save(tmp_path / "file", parts)
    with pytest.raises(UsageError):
        load_checkpoint(tmp_path / "file", *parts)
    with pytest.raises(NotFoundError, match="shardpoint ls"):
        load_checkpoint(tmp_path / "nothing", *parts)
    (tmp_path / NAME / "modeling").mkdir(parents=True)
    with pytest.raises(TornCheckpointError):
        load_checkpoint(tmp_path / NAME, *parts)
    with pytest.raises(AlreadyExistsError):
        save(tmp_path, parts)
    with pytest.raises(UsageError, match="booster"):
        load_checkpoint(tmp_path / NAME, None, *parts[1:])


def test_a_root_that_was_deleted_is_a_new_one_and_a_lost_one_an_error(tmp_path: Path) -> None:
    import shutil

    parts = made(0)
    save(tmp_path / "root", parts)
    shutil.rmtree(tmp_path / "root")
    save(tmp_path / "root", parts)
    (mine,) = (tmp_path / "root" / ".shardpoint").glob("inc-*")
    mine.rename(mine.with_name(f"fenced-{mine.name.removeprefix('inc-')}"))
    with pytest.raises(FencedError):
        save(tmp_path / "root", parts, step=501)


# ---- JSON


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "states.json"
    save_json({"name": "Grüße 世界", "n": [1, None]}, path)
    assert path.read_bytes() == '{\n    "name": "Grüße 世界",\n    "n": [\n        1,\n        null\n    ]\n}'.encode()
    assert load_json(str(path)) == {"name": "Grüße 世界", "n": [1, None]}
    with pytest.raises(UsageError):
        save_json({"x": object()}, path)
    with pytest.raises(NotFoundError):
        save_json({}, tmp_path / "nowhere" / "x.json")
    with pytest.raises(NotFoundError):
        load_json(tmp_path / "nothing.json")
    assert load_json(path)["name"] == "Grüße 世界"
    assert [entry.name for entry in tmp_path.iterdir()] == ["states.json"]
    path.write_bytes(b'{"a": ')
    with pytest.raises(ManifestError):
        load_json(path)


# ---- another library's Booster


class ForeignBooster:
    """Writes what ColossalAI writes, by torch.save, as it pleases."""

    def __init__(self, fail_in: str = "") -> None:
        self.fail_in = fail_in
        self.loaded: list[str] = []

    def _put(self, value: Any, path: Path) -> None:
        if self.fail_in in {path.parent.name, path.name}:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        torch.save(value, path)

    def save_model(self, model: nn.Module, checkpoint: str, shard: bool = False) -> None:  # noqa: FBT002 - ColossalAI's
        assert shard
        directory = Path(checkpoint) / "deep" / "deeper"
        directory.mkdir(parents=True)
        self._put(model.state_dict(), Path(checkpoint) / "pytorch_model-00001.bin")
        (directory / "notes.txt").write_text("x")

    def load_model(self, model: nn.Module, checkpoint: str) -> None:
        self.loaded.append("model")
        model.load_state_dict(torch.load(Path(checkpoint) / "pytorch_model-00001.bin"))

    def save_optimizer(self, optimizer: torch.optim.Optimizer, checkpoint: str, shard: bool = False) -> None:  # noqa: FBT002 - ColossalAI's
        assert shard
        Path(checkpoint).mkdir()
        self._put(optimizer.state_dict(), Path(checkpoint) / "pytorch_optim-00001.bin")

    def load_optimizer(self, optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
        self.loaded.append("optimizer")
        optimizer.load_state_dict(torch.load(Path(checkpoint) / "pytorch_optim-00001.bin"))

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
        self._put({"last_epoch": lr_scheduler.last_epoch}, Path(checkpoint))

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
        self.loaded.append("lr_scheduler")
        lr_scheduler.last_epoch = torch.load(checkpoint)["last_epoch"]


def test_a_foreign_booster_round_trips(tmp_path: Path) -> None:
    _, model, optimizer, scheduler = made(0)
    train(model, optimizer, range(2))
    save(tmp_path, (ForeignBooster(), model, optimizer, scheduler))
    names = {path.name for path in (tmp_path / NAME).iterdir()}
    assert names == {"modeling", "optimizer", "lr_scheduler", "running_states.json", "shardpoint.json"}
    other = made(3)
    booster = ForeignBooster()
    assert load_checkpoint(tmp_path / NAME, booster, *other[1:]) == (1, 500, 16000)
    assert booster.loaded == ["model", "optimizer", "lr_scheduler"]
    assert same_bits(weights(other[1]), weights(model))
    assert load_checkpoint(tmp_path / NAME, None, None, None, None) == (1, 500, 16000)
    assert load_checkpoint(tmp_path / NAME, made(1)[0], None, None, None) == (1, 500, 16000)


@pytest.mark.parametrize("part", ["modeling", "optimizer", "lr_scheduler"])
def test_a_foreign_save_is_all_or_nothing(part: str, tmp_path: Path) -> None:
    _, model, optimizer, scheduler = made(0)
    save(tmp_path, (ForeignBooster(), model, optimizer, scheduler))
    before = {path: path.read_bytes() for path in (tmp_path / NAME).rglob("*") if path.is_file()}
    train(model, optimizer, range(2))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, (ForeignBooster(fail_in=part), model, optimizer, scheduler))
    assert {path: path.read_bytes() for path in (tmp_path / NAME).rglob("*") if path.is_file()} == before
    assert not list((tmp_path / ".shardpoint").rglob("attempt-*"))
    save(tmp_path, (ForeignBooster(), model, optimizer, scheduler))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("path", ["modeling/pytorch_model-00001.bin", "lr_scheduler", "modeling/deep/deeper/notes.txt"])
def test_a_foreign_checkpoint_is_verified_before_it_is_loaded(path: str, damage: str, tmp_path: Path) -> None:
    parts = made(0)
    save(tmp_path, (ForeignBooster(), *parts[1:]))
    file = tmp_path / NAME / path
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    booster = ForeignBooster()
    with pytest.raises(ChecksumError if damage == "flip" else TruncatedError) as caught:
        load_checkpoint(tmp_path / NAME, booster, *parts[1:])
    assert caught.value.key == path
    assert not booster.loaded


def test_native_and_foreign_are_not_mixed_up(tmp_path: Path) -> None:
    parts = made(0)
    save(tmp_path / "native", parts)
    save(tmp_path / "foreign", (ForeignBooster(), *parts[1:]))
    booster = ForeignBooster()
    with pytest.raises(UnsupportedFormatError, match="Shardpoint's own Booster"):
        load_checkpoint(tmp_path / "native" / NAME, booster, *parts[1:])
    assert not booster.loaded
    before = {name: bits(tensor) for name, tensor in weights(parts[1]).items()}
    none = None
    for wanted in (parts[1:], (parts[1], none, none), (none, parts[2], none), (none, none, parts[3])):
        with pytest.raises(UnsupportedFormatError, match="another library"):
            load_checkpoint(tmp_path / "foreign" / NAME, parts[0], *wanted)
    with pytest.raises(UnsupportedFormatError, match="another library"):
        parts[0].load_model(parts[1], tmp_path / "foreign" / NAME / "modeling")
    assert {name: bits(tensor) for name, tensor in weights(parts[1]).items()} == before


def test_a_foreign_booster_misses_what_was_saved_without(tmp_path: Path) -> None:
    _, model, optimizer, scheduler = made(0)
    save(tmp_path, (ForeignBooster(), model, None, None))
    booster = ForeignBooster()
    with pytest.raises(NotFoundError, match="no optimizer"):
        load_checkpoint(tmp_path / NAME, booster, model, optimizer, scheduler)
    assert not booster.loaded
    assert json.loads((tmp_path / NAME / "running_states.json").read_text())["step"] == 500
