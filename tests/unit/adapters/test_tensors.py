"""Do all kinds of tensors come back bit by bit, and are those that cannot refused by name?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState
from shardpoint.adapters.tensors import LocalBytes, describe, from_raw, live_values, plain_values, raw_tensor
from shardpoint.errors import UsageError
from tests.training import bits, on_disk, same_bits


def holder(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def zoo(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    real = torch.randn(6, 4)
    return holder(
        scalar=torch.tensor(3.5 + seed),
        empty=torch.empty(0, 3),
        strided=torch.randn(8, 6)[::2, 1::2],
        turned=real.t() * 2,
        channels=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        c64=torch.randn(3, 2, dtype=torch.complex64),
        c128=torch.randn(3, 2, dtype=torch.complex128),
        c128_scalar=torch.randn((), dtype=torch.complex128),
        conjugate=torch.randn(3, dtype=torch.complex64).conj(),
        fp8=torch.randn(5).to(torch.float8_e4m3fn),
        fp8_wide=torch.randn(5).to(torch.float8_e5m2),
        i16=torch.randint(-99, 99, (3, 3), dtype=torch.int16),
        u16=torch.randint(0, 99, (3,)).to(torch.uint16),
        u64=torch.tensor([2**63 + seed], dtype=torch.uint64),
        flag=torch.tensor([True, bool(seed)]),
        f16=torch.randn(3).half(),
        bf16=torch.randn(3).bfloat16(),
        odd=torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        big=torch.randn(1500, 1501),
    )


def test_every_kind_round_trips(tmp_path: Path) -> None:
    one, two = zoo(0), zoo(1)
    strides = {name: tensor.stride() for name, tensor in two.named_buffers()}
    pointers = {name: tensor.data_ptr() for name, tensor in two.named_buffers()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=one), epoch=0, step=0, batch_size=1)
        checkpointer.resume(TrainState(model=two))
    for name, tensor in one.named_buffers():
        assert bits(two.get_buffer(name)) == bits(tensor), name
        assert two.get_buffer(name).dtype == tensor.dtype
    assert {name: tensor.stride() for name, tensor in two.named_buffers()} == strides
    assert {name: tensor.data_ptr() for name, tensor in two.named_buffers()} == pointers
    stored = on_disk(tmp_path / "epoch-0_step-0" / "modeling")
    assert torch.equal(stored["c128"], torch.view_as_real(one.get_buffer("c128")))
    plain = {name: tensor for name, tensor in one.named_buffers() if tensor.dtype != torch.complex128}
    assert same_bits({name: stored[name] for name in plain}, plain)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.ones(3).to(torch.float8_e8m0fnu).view(torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.ones(1).expand(5),
    ],
    ids=["sparse", "meta", "fp4", "expanded"],
)
def test_what_cannot_be_saved_is_named(tensor: torch.Tensor, tmp_path: Path) -> None:
    model = holder(fine=torch.ones(2), strange=tensor)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match="modeling: strange"):
        checkpointer.save(TrainState(model=model), epoch=0, step=0, batch_size=1)
    assert [path.name for path in tmp_path.iterdir()] == [".shardpoint"]


def test_a_contiguous_tensor_is_used_in_place() -> None:
    tensor = torch.zeros(2, 3)
    view = LocalBytes(tensor).write_view()
    view[:4] = np.float32(7.0).tobytes()
    assert tensor[0, 0] == 7.0


def test_a_strided_tensor_changes_only_at_the_end() -> None:
    base = torch.zeros(4, 4)
    destination = LocalBytes(base[:, ::2])
    destination.write_view()[:] = np.arange(8, dtype=np.float32).tobytes()
    assert not base.any()
    destination.finish()
    assert base[:, ::2].flatten().tolist() == list(range(8))
    assert not base[:, 1::2].any()


def test_documents_hold_tensors_exactly() -> None:
    tensor = torch.randn(3, 2).t()
    assert torch.equal(from_raw(raw_tensor(tensor, "x")), tensor)
    nest: Any = {"a": [tensor, (1, None)], 3: torch.tensor(2.0, dtype=torch.bfloat16)}
    back = live_values(plain_values(nest, "x"))
    assert torch.equal(back["a"][0], tensor)
    assert back["a"][1] == (1, None)
    assert back[3].dtype == torch.bfloat16


def test_facts_of_a_plain_tensor() -> None:
    facts = describe(torch.empty(2, 3), None, "x", 0)
    assert (facts.dtype, facts.shape, facts.mesh, facts.placements) == ("F32", (2, 3), None, ())
    assert facts.region is not None
    assert facts.region.lengths == (2, 3)
