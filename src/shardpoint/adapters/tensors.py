"""How a torch tensor becomes facts and bytes, and bytes become a tensor again.

Facts come from the tensor itself: global shape, mesh and placements; they are checked against the real local tensor,
since a wrong offset would pass every checksum. Sizes come from numel, never from the storage, which FSDP2 pads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardpoint.errors import UsageError
from shardpoint.geometry import Region
from shardpoint.layout import Mesh, Placement, owned_region
from shardpoint.manifest import RawTensor
from shardpoint.storage import Buffer

ByteArray = npt.NDArray[np.uint8]

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex128: "C128",
    torch.complex32: "C32",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype, place: str) -> str:
    """Return a dtype's logical name.

    Raises:
        UsageError: a dtype that is not stored (quantized ones); `place` is named.
    """
    name = _NAMES.get(dtype)
    if name is None:
        text = f"{place} has dtype {dtype}, which cannot be stored: dequantize it, or make its buffer non-persistent"
        raise UsageError(text)
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a logical name."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A live tensor's facts.

    Attributes:
        dtype: logical name.
        shape: global.
        mesh: over which it is spread, or None for a plain tensor.
        placements: one per mesh axis.
        region: the part that this rank holds; None on a rank outside the mesh, which holds nothing.
        local: that part, sharing the tensor's memory.
    """

    dtype: str
    shape: tuple[int, ...]
    mesh: Mesh | None
    placements: tuple[Placement, ...]
    region: Region | None
    local: torch.Tensor


def _placement(placement: Any) -> Placement:
    if isinstance(placement, Replicate):
        return Placement("replicate")
    # `_StridedShard` is not an instance of Shard: test for it first and by itself.
    if isinstance(placement, _StridedShard):
        return Placement("strided_shard", placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Placement("shard", placement.dim)
    raise UsageError(f"has the placement {placement}: reduce it to Shard or Replicate before saving")


@lru_cache(maxsize=256)
def _mesh(device_mesh: DeviceMesh) -> Mesh:
    ranks = device_mesh.mesh
    return Mesh(tuple(ranks.shape), tuple(ranks.flatten().tolist()))


def mesh_of(tensor: torch.Tensor) -> Mesh | None:
    """Return a DTensor's mesh with global ranks, or None for a plain tensor."""
    return _mesh(tensor.device_mesh) if isinstance(tensor, DTensor) else None


@lru_cache(maxsize=65536)
def _spread(
    shape: tuple[int, ...], device_mesh: DeviceMesh, placements: tuple[Any, ...], rank: int
) -> tuple[Mesh, tuple[Placement, ...], Region | None, tuple[int, ...]]:
    """Return how a DTensor lies on its mesh, the part that a rank holds, and that part's shape.

    Raises:
        UsageError: a placement that cannot be stored.
    """
    mesh = _mesh(device_mesh)
    spread = tuple(_placement(placement) for placement in placements)
    coordinate = mesh.coordinate(rank)
    if coordinate is None:
        return mesh, spread, None, ()
    region = owned_region(shape, mesh.shape, coordinate, spread)
    return mesh, spread, region, region.lengths


def describe(tensor: torch.Tensor, replicated_over: Mesh | None, place: str, rank: int) -> TensorLayout:
    """Return a tensor's facts.

    Args:
        tensor: plain or a DTensor, on any device but meta.
        replicated_over: for a plain tensor, the ranks that are known to hold the same bytes (DDP).
        place: the tensor's name in an error.
        rank: this rank.

    Raises:
        UsageError: sparse, quantized, on meta, with a partial placement, or cut in a way whose shape is not the one
            that the rule gives (then saving it would put bytes in the wrong place).
    """
    local = local_tensor(tensor)
    if local.layout is not torch.strided or local.is_quantized or local.is_meta:
        text = f"{place} is {local.layout} on {local.device}: only dense, materialised tensors can be saved or loaded"
        raise UsageError(text)
    if not local.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(local.shape, local.stride(), strict=True)
    ):
        text = (
            f"{place} is an expanded tensor: many of its elements are one place in memory, so it cannot be loaded into"
        )
        raise UsageError(f"{text}; make it contiguous, or its buffer non-persistent")
    name = dtype_name(local.dtype, place)
    if not isinstance(tensor, DTensor):
        shape = tuple(local.shape)
        placements = (Placement("replicate"),) if replicated_over is not None else ()
        return TensorLayout(name, shape, replicated_over, placements, Region.whole(shape), local)
    shape = tuple(tensor.shape)
    try:
        mesh, spread, region, lengths = _spread(shape, tensor.device_mesh, tensor.placements, rank)
    except UsageError as error:
        raise UsageError(f"{place} {error}") from error
    # Of a tensor without elements FSDP2 shards the dims otherwise than the rule, and nobody holds a byte anyway.
    has_elements = 0 not in shape or local.numel() > 0
    if region is not None and lengths != local.shape and has_elements:
        text = (
            f"{place}: rank {rank} holds {list(local.shape)} of {list(shape)}, but {tensor.placements} on a mesh of "
            f"{mesh.shape} gives {list(lengths)}: this layout cannot be saved safely; please report it"
        )
        raise UsageError(text)
    return TensorLayout(name, shape, mesh, spread, region, local)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    # Without gradients it is the part itself, and nothing is recorded. Entering the mode costs as much as the rest.
    if torch.is_grad_enabled():
        with torch.no_grad():
            part: torch.Tensor = tensor.to_local()
    else:
        part = tensor.to_local()
    return part.detach() if part.requires_grad else part


def flat_bytes(local: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as uint8 `[num_bytes]`, on its device."""
    if local.is_complex():
        local = torch.view_as_real(local)
    return local.reshape(-1).view(torch.uint8)


def stored_bytes(local: torch.Tensor) -> torch.Tensor:
    """Return the bytes that are stored of a local part, uint8 `[num_bytes]`, on its device; no copy if possible."""
    if local.is_contiguous() and not local.is_conj() and not local.is_neg():
        return flat_bytes(local)
    return flat_bytes(local.resolve_conj().resolve_neg().contiguous())


class LocalBytes:
    """The bytes of this rank's part of a tensor, to be staged or filled.

    A contiguous CPU tensor is used in place. Any other (another device, strides, a lazy conjugate) is copied whole:
    when it is read from, before the first byte; when it is written to, after the last (`finish`).

    Args:
        local: the part, as `local_tensor` gives it; a DTensor counts as its part.
    """

    def __init__(self, local: torch.Tensor) -> None:
        self._local = local_tensor(local)
        self.num_bytes = self._local.numel() * self._local.element_size()
        plain = self._local.is_contiguous() and not self._local.is_conj() and not self._local.is_neg()
        self._in_place = plain and self._local.device.type == "cpu"
        self._bytes: torch.Tensor | None = flat_bytes(self._local) if self._in_place else None
        self._address: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the live tensor is."""
        return self._local.device

    def copy_to(self, buffer: Buffer, buffer_offset: int, byte_offset: int, num_bytes: int) -> None:
        """Copy bytes into staging memory.

        From a GPU the copy is queued on the current stream (and has ended when that stream's next event has).

        Args:
            buffer: pinned, for a queued copy.
            buffer_offset: where they go in it, in bytes.
            byte_offset: where they start in this rank's part.
            num_bytes: how many.
        """
        if self._local.device.type == "cpu":
            # A native copy that releases the GIL, whatever its size: a trainer may be running.
            ctypes.memmove(buffer.address + buffer_offset, self._read_address() + byte_offset, num_bytes)
            return
        if self._bytes is None:
            self._bytes = flat_bytes(self._local.resolve_conj().resolve_neg().contiguous())
        destination = torch.from_numpy(buffer.array[buffer_offset : buffer_offset + num_bytes])
        destination.copy_(self._bytes[byte_offset : byte_offset + num_bytes], non_blocking=True)

    def _read_address(self) -> int:
        if self._address is None:
            self._address = int(self.read_view().ctypes.data)
        return self._address

    def read_view(self) -> ByteArray:
        """Return the bytes, uint8 `[num_bytes]`, to read from."""
        if self._bytes is None:
            resolved = self._local.resolve_conj().resolve_neg().contiguous()
            self._bytes = flat_bytes(resolved.cpu())
        return self._bytes.numpy()

    def write_view(self) -> memoryview:
        """Return the bytes, `num_bytes` of them, to write to; `finish` puts them where they belong."""
        if self._bytes is None:
            self._bytes = torch.empty(self.num_bytes, dtype=torch.uint8)
        return self._bytes.numpy().data

    def finish(self) -> None:
        """Put written bytes into the tensor, where they are not there already; drop a copy."""
        if self._in_place:
            return
        if self._bytes is not None:
            staged = torch.empty(self._local.shape, dtype=self._local.dtype)
            flat_bytes(staged).copy_(self._bytes)
            self._local.copy_(staged)
        self._bytes = None

    def release(self) -> None:
        """Drop a copy that was made for reading."""
        if not self._in_place:
            self._bytes = self._address = None


def raw_tensor(tensor: torch.Tensor, place: str) -> RawTensor:
    """Return a small tensor as a document's value."""
    if (
        tensor.dim() == 0
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and type(tensor) is torch.Tensor
    ):
        return RawTensor("F32", (), tensor.detach().numpy().tobytes())  # every parameter's `step`: worth a short way
    local = local_tensor(tensor).resolve_conj().resolve_neg().contiguous().cpu()
    return RawTensor(dtype_name(tensor.dtype, place), tuple(local.shape), flat_bytes(local).numpy().tobytes())


def from_raw(raw: RawTensor) -> torch.Tensor:
    """Return the CPU tensor that `raw_tensor` described."""
    tensor = torch.empty(raw.shape, dtype=torch_dtype(raw.dtype))
    if raw.data:
        flat_bytes(tensor).copy_(torch.frombuffer(bytearray(raw.data), dtype=torch.uint8))
    return tensor


def plain_values(value: Any, place: str) -> Any:
    """Return a nest of values with its tensors turned into `RawTensor`, for a document."""
    if isinstance(value, torch.Tensor):
        return raw_tensor(value, place)
    if type(value) in (list, tuple):
        return type(value)(plain_values(item, f"{place}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        converted = [(key, plain_values(item, f"{place}.{key}")) for key, item in value.items()]
        return dict(converted) if type(value).__name__ in ("dict", "OrderedDict") else value
    return value


def live_values(value: Any) -> Any:
    """Return a document's nest of values with its `RawTensor`s turned into CPU tensors."""
    if isinstance(value, RawTensor):
        return from_raw(value)
    if type(value) in (list, tuple):
        return type(value)(live_values(item) for item in value)
    if type(value) is dict:
        return {key: live_values(item) for key, item in value.items()}
    return value
