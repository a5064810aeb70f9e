from __future__ import annotations

import pytest
import torch

from shardpoint.adapters import destinations
from shardpoint.adapters.destinations import Copied, Destinations, InPlace


def test_a_contiguous_tensor_is_its_own_memory() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    place = Destinations().of(tensor)
    assert isinstance(place, InPlace)
    view = place.open(2, 4)
    view[:] = b"\x80\x3f"
    place.close(2, 4, view)
    assert tensor[0].tolist() == [0.0, 1.0, 0.0]
    assert len(place.memory) == 12


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_any_other_changes_only_with_its_last_byte(order: list[int]) -> None:
    base = torch.zeros(4, 4)
    place = Destinations().of(base[:, ::2])
    assert isinstance(place, Copied)
    data = torch.arange(8, dtype=torch.float32).numpy().tobytes()
    for number, half in enumerate(order):
        view = place.open(16 * half, 16 * half + 16)
        view[:] = data[16 * half : 16 * half + 16]
        assert not base.any(), number
        place.close(16 * half, 16 * half + 16, view)
    assert base[:, ::2].flatten().tolist() == list(range(8))
    assert not base[:, 1::2].any()


def test_a_lazy_conjugate_gets_its_logical_values() -> None:
    base = torch.zeros(2, dtype=torch.complex64)
    place = Destinations().of(base.conj())
    view = place.open(0, 16)
    view[:] = torch.tensor([1 + 2j, 3 - 4j]).numpy().tobytes()
    place.close(0, 16, view)
    assert base.conj().tolist() == [1 + 2j, 3 - 4j]


def test_only_large_fresh_memory_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(destinations, "populate", lambda _, num_bytes: prepared.append(num_bytes))
    monkeypatch.setattr(destinations, "is_fresh", lambda *_: True)
    small, large = torch.empty(2**18 - 1), torch.empty(2**21)
    for tensor in (small, large):
        place = Destinations().of(tensor)
        assert isinstance(place, InPlace)
        place.prepare(0, len(place.memory))
    assert prepared == [2**23]
    prepared.clear()
    monkeypatch.setattr(destinations, "is_fresh", lambda *_: False)
    touched = Destinations().of(large)
    assert isinstance(touched, InPlace)
    touched.prepare(0, 2**23)
    assert prepared == []
