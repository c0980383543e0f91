"""Masked ReLU as it is defined, for autograd to differentiate."""

from __future__ import annotations

from torch import Tensor


def masked_relu(x: Tensor, mask: Tensor) -> Tensor:
    """m·relu(x) + (1 − m)·x, written out."""
    return mask * x.relu() + (1 - mask) * x
