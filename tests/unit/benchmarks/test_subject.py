from __future__ import annotations

import pytest

from benchmarks.subject import LlamaShape


@pytest.mark.parametrize("size_gb", [0.1, 0.2, 0.5, 2.0, 8.0])
def test_the_shape_has_about_the_wanted_size(size_gb: float) -> None:
    shape = LlamaShape.of(size_gb)
    per_layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    num_parameters = shape.layers * per_layer + 2 * shape.vocabulary * shape.hidden + shape.hidden
    assert num_parameters * 12 / 1e9 == pytest.approx(size_gb, rel=0.15)
    assert shape.hidden % 64 == 0
