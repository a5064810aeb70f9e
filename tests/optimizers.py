"""Which optimizers of a user's own do tests train with: states in nests, and fp32 masters of narrower weights."""

from __future__ import annotations

from typing import Any

import torch


class Nested(torch.optim.Optimizer):
    """Momenta of two speeds in a dict, a history of gradients in a list, a 0-dim tensor and a flag in a tuple."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    zeros = torch.zeros_like(parameter, dtype=torch.float64)
                    state["momenta"] = {"fast": zeros, "slow/~#": zeros.clone(), 3: {"deep": zeros.clone()}}
                    state["a/b"] = torch.zeros_like(parameter)
                    state["history"] = []
                    state["told"] = (torch.zeros(()), True, "x")
                state["told"][0].add_(1)
                for number, momentum in enumerate((state["momenta"]["fast"], state["momenta"]["slow/~#"])):
                    momentum.mul_(0.5 + 0.4 * number).add_(parameter.grad)
                state["momenta"][3]["deep"].add_(1)
                state["a/b"].add_(parameter.grad)
                state["history"] = [*state["history"][-1:], parameter.grad.clone()]
                total = state["momenta"]["fast"] + state["momenta"]["slow/~#"] + sum(state["history"])
                parameter.sub_((group["lr"] * (total + state["a/b"]) / state["told"][0]).to(parameter.dtype))


class Masters(torch.optim.Optimizer):
    """Momentum over fp32 masters, of which the weights are rounded copies."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.detach().float().clone()
                    state["momentum"] = torch.zeros_like(state["master"])
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                state["master"].sub_(group["lr"] * state["momentum"])
                parameter.copy_(state["master"].to(parameter.dtype))
