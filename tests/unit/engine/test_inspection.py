"""Does a look into a checkpoint give what raw safetensors give, read little more, and say what it verified?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardpoint import Checkpointer, ReadResult, TensorInfo, TrainState, open_checkpoint
from shardpoint.errors import (
    ChecksumError,
    NotFoundError,
    TornCheckpointError,
    TruncatedError,
    UsageError,
)
from tests.training import OPTIMIZERS, bits, flip, net, on_disk, train

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

NAME = "epoch-0_step-1"
FILE = f"{NAME}/modeling/model-00001-of-00001.safetensors"


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("rows", torch.randn(1024, 96).to(torch.bfloat16))
        self.register_buffer("eighths", torch.randn(64, 8).to(torch.float8_e4m3fn))
        self.register_buffer("complex128", torch.randn(7, 3, dtype=torch.complex128))
        self.register_buffer("complex32", torch.randn(7, 3).to(torch.complex32))
        self.register_buffer("number", torch.tensor(7, dtype=torch.int64))
        self.register_buffer("empty", torch.randn(0, 3))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = Holder()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
    return tmp_path / NAME, dict(model.named_buffers())


def test_whole_tensors_are_exact_and_verified(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = saved
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.name == NAME
        assert {info.name: info for info in checkpoint.tensors} == {
            name: TensorInfo("modeling", name, tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()
        }
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert isinstance(found, ReadResult)
            assert found.verified
            assert found.tensor.dtype == tensor.dtype
            assert bits(found.tensor) == bits(tensor), name
            assert found.read_bytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", ["rows", "eighths", "complex128", "complex32"])
@pytest.mark.parametrize(
    "rows, index",
    [
        ((2, 5), (slice(2, 5),)),
        ((0, 0), (slice(0, 0),)),
        ((-3, -1), (slice(-3, -1),)),
        ((slice(1, 6), slice(1, 3)), (slice(1, 6), slice(1, 3))),
        ((slice(None), slice(2, None)), (slice(None), slice(2, None))),
        ((slice(None, 4), slice(-2, None)), (slice(None, 4), slice(-2, None))),
        ((slice(1, 2),), (slice(1, 2),)),
    ],
)
def test_slices_are_those_of_torch(
    name: str, rows: Any, index: Any, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, expected = saved
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read(name, rows=rows)
    assert bits(found.tensor) == bits(expected[name][index].clone())
    assert not found.verified


def test_a_slice_reads_little_more_than_it_is(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = saved
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("rows", rows=(500, 516))
        assert bits(found.tensor) == bits(expected["rows"][500:516])
        assert found.read_bytes <= 1.1 * 16 * 96 * 2
        assert not found.verified
        assert checkpoint.read("rows", rows=(0, 1024)).verified  # all of it


def test_optimizer_states_have_their_names(tmp_path: Path) -> None:
    model = net(0)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=1, batch_size=1)
    raw = on_disk(tmp_path / NAME / "optimizer")
    for path in (tmp_path / NAME, tmp_path / NAME / "optimizer", tmp_path / NAME / "modeling"):
        with open_checkpoint(path) as checkpoint:
            for name, tensor in raw.items():
                found = checkpoint.read(name, part="optimizer")
                assert found.verified
                assert torch.equal(found.tensor, tensor)
            assert checkpoint.read("head.weight").verified


@pytest.mark.parametrize("indexed", [True, False])
def test_a_hugging_face_directory(indexed: bool, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(64, 3), "b": torch.randn(5).to(torch.float16)}
    directory = tmp_path / "hub"
    directory.mkdir()
    if indexed:
        for number, (name, tensor) in enumerate(tensors.items()):
            save_file({name: tensor}, directory / f"model-{number}.safetensors")
        weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, directory / "model.safetensors")
    with open_checkpoint(directory) as checkpoint:
        assert {info.name for info in checkpoint.tensors} == set(tensors)
        for name, tensor in tensors.items():
            found = checkpoint.read(name)
            assert torch.equal(found.tensor, tensor)
            assert not found.verified, "a file without a manifest has no checksum"
        assert torch.equal(checkpoint.read("a.weight", rows=(3, 9)).tensor, tensors["a.weight"][3:9])
    if not indexed:
        with open_checkpoint(directory / "model.safetensors") as checkpoint:
            assert torch.equal(checkpoint.read("b").tensor, tensors["b"])


def test_names_that_are_not_there(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with open_checkpoint(saved[0]) as checkpoint:
        with pytest.raises(NotFoundError, match=r"no tensor 'complex12' in 'modeling'.*similar names: complex128"):
            checkpoint.read("complex12")
        with pytest.raises(NotFoundError, match=r"no part 'optimizer': it has \['modeling'\]"):
            checkpoint.read("rows", part="optimizer")
    with pytest.raises(NotFoundError):
        open_checkpoint(saved[0].parent / "nothing")
    torn = saved[0].parent / "torn"
    torn.mkdir()
    with pytest.raises((NotFoundError, TornCheckpointError)):
        open_checkpoint(torn)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("rows", (0, 1025)),
        ("rows", (5, 4)),
        ("rows", (-2000, 4)),
        ("rows", (0.0, 4)),
        ("rows", ()),
        ("rows", 5),
        ("rows", [0, 5]),
        ("rows", (1, 2, 3)),
        ("rows", (slice(0, 4, 2),)),
        ("rows", (slice(0, 4), 3)),
        ("rows", (slice(0, 4), slice(0, 97))),
        ("rows", (slice(0, 4), slice(0, 4), slice(0, 1))),
        ("number", (0, 1)),
    ],
)
def test_rows_that_are_none(name: str, rows: Any, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with open_checkpoint(saved[0]) as checkpoint, pytest.raises(UsageError, match=f"of tensor {name} of shape"):
        checkpoint.read(name, rows=rows)


def test_a_closed_checkpoint_has_no_open_file_and_reads_nothing(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    def opened() -> int:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(link.suffix == ".safetensors" for link in links)

    before = opened()
    checkpoint = open_checkpoint(saved[0])
    checkpoint.read("rows")
    assert opened() == before + 1
    checkpoint.close()
    checkpoint.close()
    assert opened() == before
    with pytest.raises(UsageError, match="was closed"):
        checkpoint.read("rows")


def lose(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm, kind", [(flip, ChecksumError), (lose, TruncatedError), (shorten, TruncatedError)])
def test_damage_is_found(
    harm: Callable[[Path], None], kind: type[Exception], saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, expected = saved
    file = path.parent / FILE
    harm(file)
    failed: dict[str, Exception] = {}
    with open_checkpoint(path) as checkpoint:
        for name in expected:
            try:
                checkpoint.read(name)
            except kind as error:
                failed[name] = error
    if harm is flip:
        (found,) = failed.values()
        assert isinstance(found, ChecksumError)
        assert found.key.startswith("modeling/model-00001-of-00001.safetensors#")
        assert not found.target_modified
    else:
        assert failed.keys() == expected.keys()


def test_pruned_while_it_is_open(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with open_checkpoint(saved[0]) as checkpoint:
        shutil.rmtree(saved[0])
        with pytest.raises(NotFoundError, match="pruned or replaced"):
            checkpoint.read("rows")
