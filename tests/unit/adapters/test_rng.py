"""Does the random state come back exactly, through a document?"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from shardpoint.adapters.rng import derive_rng, read_rng, write_rng
from shardpoint.errors import ManifestError
from shardpoint.manifest import decode_document, encode_document


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002 - the global generator is the one
        torch.rand(()).item(),
        torch.randn(3)[2].item(),
    ]


def test_what_was_read_comes_back() -> None:
    random.gauss(0, 1)  # leaves a second number waiting
    data = encode_document(read_rng())
    expected = draw()
    draw()
    write_rng(decode_document(data), "rng")
    assert draw() == expected


def test_a_new_rank_gets_its_own_numbers_and_the_same_each_time() -> None:
    document = encode_document(read_rng())
    seen = []
    for rank in (3, 4, 3):
        derive_rng(document, rank)
        seen.append(draw())
    assert seen[0] == seen[2]
    assert not set(seen[0]) & set(seen[1])


@pytest.mark.parametrize(
    "state", [{}, {"python": 1}, [], {"python": {"version": 3, "words": np.ones(2), "gauss": None}}]
)
def test_what_is_no_random_state(state: object) -> None:
    with pytest.raises(ManifestError, match="rng/x"):
        write_rng(state, "rng/x")  # type: ignore[arg-type]
