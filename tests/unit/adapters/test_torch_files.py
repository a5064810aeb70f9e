"""Are the places in files of torch.save those of the bytes, and is what has no such place refused?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardpoint.adapters.torch_files import Located, locate_tensors
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
