"""Slow and obviously right: what it does to the loss that a channel's ReLUs become a polynomial, image by image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fairline.data import GroupedData
from fairline.masking import masked_relus


def channel_estimate(model: nn.Module, data: GroupedData, name: str, channel: int, degree: int) -> float:
    """``E[Σ (∂L/∂y)²·(relu(x) − g(x))²]`` over a channel's units, g its least-squares fit with smaller powers."""
    layer, values, slopes = masked_relus(model)[name], [], []

    def see(_, arguments, output):
        values.append(arguments[0][0, channel].detach().flatten())
        output.retain_grad()
        slopes.append(output)

    handle = layer.register_forward_hook(see)
    model.eval()
    for image in range(len(data)):
        F.cross_entropy(model(data.normalized(torch.tensor([image]))), data.labels[[image]]).backward()
    handle.remove()
    model.zero_grad()
    x = torch.cat(values).double().numpy()
    gradient = torch.cat([each.grad[0, channel].flatten() for each in slopes]).double().numpy()
    relu, fitted = np.maximum(x, 0), np.zeros_like(x)
    if degree:
        design = np.stack([x**k for k in range(degree + 1)], 1)
        best = np.linalg.lstsq(design, relu, rcond=None)[0]
        higher = sum(0.2 ** (k - 1) * best[k] * x**k for k in range(2, degree + 1))
        fitted = design[:, :2] @ np.linalg.lstsq(design[:, :2], relu - higher, rcond=None)[0] + higher
    return float((gradient**2 * (relu - fitted) ** 2).sum()) / len(data)
