"""AutoReP's gated polynomial as straightforwardly as it can be written (Peng et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    """m·relu(x) + (1 − m)·(c₀ + c₁x + 0.2·c₂x²), m following w through a hysteresis, one unit at a time."""

    def __init__(self, weight: Tensor, coefficients: Tensor, threshold: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(weight.clone())
        self.coefficients = nn.Parameter(coefficients.clone())
        self.threshold = threshold
        self.state = torch.ones_like(weight)

    def mask(self) -> Tensor:
        # The value of the state; the slope softplus(w), by a term that is zero.
        path = self.alpha * F.softplus(self.alpha).detach()
        return self.state + (path - path.detach())

    def forward(self, x: Tensor) -> Tensor:
        c = self.coefficients
        return self.mask() * x.relu() + (1 - self.mask()) * (c[0] + c[1] * x + 0.2 * c[2] * x * x)

    def sparsity(self) -> Tensor:
        return self.mask().sum()

    def count(self, threshold: float) -> int:
        return int(self.state.sum())

    def after_step(self) -> None:
        values = self.alpha.detach().flatten().tolist()
        state = self.state.flatten().tolist()
        for i, value in enumerate(values):
            if state[i] == 1 and value <= -self.threshold:
                state[i] = 0.0
            elif state[i] == 0 and value > self.threshold:
                state[i] = 1.0
        self.state = torch.tensor(state).view_as(self.alpha)
