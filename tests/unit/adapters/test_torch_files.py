"""Are the places in files of torch.save those of the bytes, and is what has no such place refused?"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from shardpoint.adapters.torch_files import Located, locate_tensors, read_values
from shardpoint.errors import NotFoundError, TruncatedError, UnsupportedFormatError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_at_the_places(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    # Two views of one memory, one of which does not begin where it does; a number; an empty tensor.
    tensors = {"whole": whole, "row": whole[2], "number": torch.ones((), dtype=dtype), "empty": whole[:0]}
    torch.save({"flat": 3} | tensors | {7: {"deep": whole[3]}}, path)
    data = path.read_bytes()
    found = locate_tensors(str(path), "file")
    assert found.pop("flat") == 3
    deep = found.pop(7)["deep"]
    for place, tensor in [(deep, whole[3]), *((found[name], tensors[name]) for name in tensors)]:
        assert isinstance(place, Located)
        assert place.shape == tuple(tensor.shape)
        assert data[place.byte_offset : place.byte_offset + place.num_bytes] == bytes_of(tensor)


def test_a_tensor_with_strides_is_refused(tmp_path: Path) -> None:
    torch.save({"turned": torch.arange(12.0).reshape(3, 4).t()}, tmp_path / "file.bin")
    with pytest.raises(UnsupportedFormatError, match="turned is not stored element after element"):
        locate_tensors(str(tmp_path / "file.bin"), "file")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="the weights is not there"):
        locate_tensors(str(tmp_path / "nothing.bin"), "the weights")
    path = tmp_path / "file.bin"
    torch.save([torch.ones(2)], path)
    with pytest.raises(UnsupportedFormatError, match="holds a list"):
        locate_tensors(str(path), "file")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TruncatedError):
        locate_tensors(str(path), "file")


def repacked(data: bytes, compressed: str) -> bytes:
    """Return an archive of torch.save with the records of a name compressed, which torch itself never does."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            kind = zipfile.ZIP_DEFLATED if compressed in record.filename else zipfile.ZIP_STORED
            new.writestr(record.filename, old.read(record), kind)
    return target.getvalue()


@pytest.mark.parametrize("compressed", ["/data/0", "data.pkl"])
def test_a_compressed_record_is_refused_and_not_misread(compressed: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    torch.save({"weight": torch.ones(1000)}, path)
    plain, packed = repacked(path.read_bytes(), "nothing"), repacked(path.read_bytes(), compressed)
    path.write_bytes(plain)
    place = locate_tensors(str(path), "file")["weight"]
    assert plain[place.byte_offset :][: place.num_bytes] == bytes_of(torch.ones(1000))
    assert torch.equal(read_values(io.BytesIO(plain), "file")["weight"], torch.ones(1000))
    path.write_bytes(packed)
    assert torch.load(path, weights_only=True)["weight"].shape == (1000,), "torch takes it"
    with pytest.raises(UnsupportedFormatError, match=f"the weights has the compressed record .*{compressed}"):
        locate_tensors(str(path), "the weights")
    with pytest.raises(UnsupportedFormatError, match="compressed record"):
        read_values(io.BytesIO(packed), "the weights")


def test_an_archive_of_which_only_torch_sees_the_end_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(repacked(path.read_bytes(), "/data/0") + b"\0" * 2**17)  # beyond the longest comment
    with pytest.raises(TruncatedError):
        locate_tensors(str(path), "file")
    with pytest.raises(TruncatedError):
        read_values(io.BytesIO(path.read_bytes()), "file")
