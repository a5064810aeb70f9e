"""torch's AdamW by the name and parameters of ColossalAI's HybridAdam, for a script that changes its imports."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class HybridAdam(torch.optim.AdamW):
    """AdamW: what ColossalAI's HybridAdam computes by default, on parameters that FSDP2 shards."""

    def __init__(
        self, model_params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float,
        adamw_mode: bool,
    ) -> None:  # fmt: skip
        assert adamw_mode
        super().__init__(model_params, lr=lr, betas=betas, weight_decay=weight_decay)
