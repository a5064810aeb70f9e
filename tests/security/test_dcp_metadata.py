"""Does a stranger's DCP checkpoint run nothing, and does one that lies end in an error before memory is asked for?"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from shardpoint.errors import CheckpointError, ManifestError, TruncatedError, UnsupportedFormatError
from shardpoint.integrations.dcp import import_dcp
from shardpoint.integrations.dcp_metadata import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    state = {"model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3)}, "step": 3}
    save_dcp(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def rewritten(directory: Path, change: Callable[[Metadata], object]) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


class Runs:
    """An object that runs a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_an_honest_one_is_read(directory: Path) -> None:
    found = read_metadata(directory)
    assert {key: (entry.dtype, entry.shape, entry.path) for key, entry in found.items()} == {
        "model.weight": (torch.float32, (2, 3), ("model", "weight")),
        "model.bias": (torch.float32, (3,), ("model", "bias")),
        "step": (None, (), ("step",)),
    }


@pytest.mark.parametrize(
    "function,name",
    [
        (os.system, r"posix\.system"),
        (eval, r"builtins\.eval"),
        (getattr, r"builtins\.getattr"),
        (subprocess.Popen, r"subprocess\.Popen"),
        (torch.load, r"torch\.serialization\.load"),
        (torch.hub.load, r"torch\.hub\.load"),
        (io.open, r"_?io\.open"),
    ],
)
def test_nothing_that_it_names_is_run(directory: Path, function: Any, name: str) -> None:
    ran = directory / "ran"
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data["evil"] = Runs(function, f"touch {ran}")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedFormatError, match=name):
        read_metadata(directory)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["serialization.load", "Size.__new__", "_C", "os", "float32.__class__"])
def test_names_in_torch_are_not_all_known(directory: Path, name: str) -> None:
    (directory / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(UnsupportedFormatError, match="none of DCP's classes"):
        read_metadata(directory)


def test_torchs_own_classes_are_not_touched(directory: Path) -> None:
    """A pickle may set attributes of whatever it names; what it gets is not torch's class."""
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata"
    patch = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"
    patch += b"N}\x8c\x05stamp\x8c\x04evils\x86b."  # BUILD with (None, {"stamp": "evil"})
    (directory / ".metadata").write_bytes(patch)
    with pytest.raises(CheckpointError):
        read_metadata(directory)
    assert not hasattr(Metadata, "stamp")


def test_a_large_number_in_a_small_file_takes_no_memory(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")  # LONG_BINPUT 2**31 - 1
    with pytest.raises(ManifestError):
        read_metadata(directory)


def _info(metadata: Metadata, key: str = "model.weight") -> tuple[Any, Any]:
    return next((index, info) for index, info in metadata.storage_data.items() if index.fqn == key)


def moved(**changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        index, info = _info(metadata)
        metadata.storage_data[index] = replace(info, **changes)

    return change


def chunked(*chunks: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...] = (2, 3)) -> Any:
    def change(metadata: Metadata) -> None:
        entry: Any = metadata.state_dict_metadata["model.weight"]
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in chunks]
        _, info = _info(metadata)
        for offsets, _ in chunks:
            metadata.storage_data[MetadataIndex("model.weight", torch.Size(offsets))] = info

    return change


def outside(path: str) -> Callable[[Metadata], None]:
    return moved(relative_path=path)


@pytest.mark.parametrize(
    "change,error",
    [
        pytest.param(outside("../secret"), ManifestError, id="a_path_that_leads_out"),
        pytest.param(outside("/etc/passwd"), ManifestError, id="an_absolute_path"),
        pytest.param(outside("a/b"), ManifestError, id="a_directory"),
        pytest.param(outside(".."), ManifestError, id="the_parent"),
        pytest.param(outside("absent"), TruncatedError, id="a_file_that_is_not_there"),
        pytest.param(moved(length=10**9), TruncatedError, id="beyond_the_file"),
        pytest.param(moved(offset=-1), ManifestError, id="before_the_file"),
        pytest.param(moved(offset=True), ManifestError, id="no_number"),
        pytest.param(moved(transform_descriptors=["zstd"]), UnsupportedFormatError, id="transformed"),
        pytest.param(chunked(((0, 0), (1, 3))), ManifestError, id="a_hole"),
        pytest.param(chunked(((0, 0), (1, 3)), ((0, 0), (1, 3))), ManifestError, id="twice"),
        pytest.param(chunked(((0, 0), (2, 2)), ((0, 1), (2, 1))), ManifestError, id="an_overlap"),
        pytest.param(chunked(((1, 0), (2, 3))), ManifestError, id="beyond_the_tensor"),
        pytest.param(chunked(((0,), (6,))), ManifestError, id="other_dims"),
        pytest.param(chunked(((0, 0), (2**20, 2**20)), size=(2**20, 2**20)), ManifestError, id="four_terabytes"),
        pytest.param(lambda metadata: metadata.storage_data.clear(), ManifestError, id="no_places"),
        pytest.param(lambda metadata: setattr(metadata, "storage_data", 7), ManifestError, id="places_of_no_kind"),
        pytest.param(
            lambda metadata: setattr(metadata.state_dict_metadata["model.weight"], "size", None),
            ManifestError,
            id="no_shape",
        ),
    ],
)
def test_one_that_lies_is_an_error(
    directory: Path, change: Callable[[Metadata], object], error: type[Exception]
) -> None:
    (directory.parent / "secret").write_bytes(b"\0" * 4096)
    rewritten(directory, change)
    with pytest.raises(error):
        read_metadata(directory)


@pytest.mark.parametrize("length", [0, 1, 2, 50, 500])
def test_a_cut_one_is_an_error(directory: Path, length: int) -> None:
    os.truncate(directory / ".metadata", length)
    with pytest.raises(ManifestError):
        read_metadata(directory)


def test_every_flipped_byte_is_read_or_refused(directory: Path) -> None:
    """Whatever the damage: an error of ours, or the records."""
    data = (directory / ".metadata").read_bytes()
    for position in range(len(data)):
        (directory / ".metadata").write_bytes(data[:position] + bytes([data[position] ^ 0x15]) + data[position + 1 :])
        try:
            read_metadata(directory)
        except CheckpointError:
            continue


def deflated(directory: Path, key: str, values: torch.Tensor) -> None:
    """Replace a tensor's archive by one with these values, deflated, as no writer of DCP's makes it."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(values, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    path = directory / "__0_0.distcp"
    begin = path.stat().st_size
    path.write_bytes(path.read_bytes() + packed.getvalue())
    changes = {"offset": begin, "length": len(packed.getvalue())}

    def change(metadata: Metadata) -> None:
        index, info = _info(metadata, key)
        metadata.storage_data[index] = replace(info, **changes)

    rewritten(directory, change)


@pytest.mark.parametrize(
    "values",
    [pytest.param(torch.arange(6.0).reshape(2, 3), id="true"), pytest.param(torch.zeros(10**7), id="a_bomb")],
)
def test_a_deflated_record_is_refused(directory: Path, tmp_path: Path, values: torch.Tensor) -> None:
    """Torch would inflate it, to whatever size it says."""
    deflated(directory, "model.weight", values)
    assert read_metadata(directory)["model.weight"].shape == (2, 3)
    with pytest.raises(UnsupportedFormatError, match=r"model\.weight in __0_0\.distcp of .* has the compressed record"):
        import_dcp(directory, tmp_path / "root", epoch=0, step=1, batch_size=1, optimizer_class=None)
    assert not list((tmp_path / "root").glob("epoch-*"))


def test_an_info_of_torchs_is_what_the_test_thinks() -> None:
    assert {"relative_path", "offset", "length", "transform_descriptors"} <= set(_StorageInfo.__dataclass_fields__)
