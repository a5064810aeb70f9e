"""Does a loss scale move as ColossalAI's own?"""

from __future__ import annotations

import random

import pytest

from shardpoint.booster.loss_scale import LossScale, ScaleOptions
from tests.colossalai import cpu


@pytest.mark.parametrize("seed", range(20))
def test_the_scale_is_that_of_the_real_scaler(seed: int) -> None:
    cpu.install()
    from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler

    drawn = random.Random(seed)
    options = ScaleOptions(
        initial_scale=2.0**8,
        min_scale=drawn.choice([0, 1, 2**6]),
        growth_factor=drawn.choice([2, 4]),
        backoff_factor=drawn.choice([0.5, 0.25]),
        growth_interval=drawn.randint(1, 4),
        hysteresis=drawn.randint(0, 3),
        max_scale=drawn.choice([0, 2**10, 2**32]),
    )
    names = (
        "initial_scale",
        "min_scale",
        "growth_factor",
        "backoff_factor",
        "growth_interval",
        "hysteresis",
        "max_scale",
    )
    theirs = DynamicGradScaler(**{name: getattr(options, name) for name in names})
    ours = LossScale(options)
    for _ in range(60):
        overflowed = drawn.random() < 0.3
        ours.update(overflowed=overflowed)
        theirs.update(overflowed)
        assert ours.scale == theirs.scale.item()
