"""Make the golden checkpoint of the current format version, with the real engine and fixed values.

    python tests/compat/make_golden.py tests/compat/golden/format-1.0

Golden files are never made again for a version that was released: what they hold must stay readable for ever.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState


class Tiny(nn.Module):
    """A model of two dtypes, with a buffer and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.arange(6, dtype=torch.float32).reshape(2, 3) - 2.5) / 4)
        self.low = nn.Parameter(torch.tensor([1.0, -2.0, 0.15625], dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("seen", torch.tensor([7, 2**40], dtype=torch.int64))


def main(root: Path) -> None:
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002 - the global generator is what a checkpoint has
    torch.manual_seed(3)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5, 5], gamma=0.5)
    scheduler.best = math.inf  # type: ignore[attr-defined]  # as ReduceLROnPlateau has it
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 2.0**-number)
    optimizer.step()
    scheduler.step()
    with torch.no_grad():  # what the arithmetic of a release gives is not part of the format
        for number, parameter in enumerate(model.parameters()):
            optimizer.state[parameter]["exp_avg"].fill_(number + 0.5)
            optimizer.state[parameter]["exp_avg_sq"].fill_(2.0**-number)
            parameter.copy_(getattr(Tiny(), ("weight", "low", "scale")[number]))
    with Checkpointer(root) as checkpointer:
        state = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler)
        pending = checkpointer.save(
            state, epoch=1, step=4, batch_size=8, metrics={"loss": 0.125, "reward": -math.inf}, force=True
        )
        assert pending is not None
        print(pending.result())  # noqa: T201 - a script


if __name__ == "__main__":
    main(Path(sys.argv[1]))
