"""Does a resume leave `foreach` and `fused` to the live optimizer, and restore everything else?"""

from __future__ import annotations

from pathlib import Path

import torch

from shardpoint import Checkpointer, TrainState


def test_how_a_step_is_carried_out_is_the_live_optimizers(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    saved = torch.optim.AdamW(model.parameters(), lr=0.25, foreach=True)
    live = torch.optim.AdamW(model.parameters(), lr=0.5, foreach=False)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=saved), epoch=0, step=1, batch_size=1)
        checkpointer.resume(TrainState(model=model, optimizer=live))
    assert live.param_groups[0]["foreach"] is False
    assert live.param_groups[0]["fused"] is None
    assert live.param_groups[0]["lr"] == 0.25
