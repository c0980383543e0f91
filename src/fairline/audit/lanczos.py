"""The largest eigenvalue of a symmetric operator by the Lanczos method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

#: A Ritz value of at least this share of the largest may be the largest of a larger sample.
CLOSE = 0.5


@dataclass(frozen=True)
class Extreme:
    """The largest eigenvalue and how well it is known.

    Attributes:
        value: The largest Ritz value θ₁; but for rounding never above the eigenvalue.
        error: Estimated distance to the eigenvalue, in the same unit.
        products: Matrix–vector products taken.
        converged: Whether the estimated error fell below the tolerance.
        gap: (θ₁ − θ₂) / |θ₁|, less the residuals of both and not below 0.
        direction: (P,): Ritz vectors of θ₁ and of what is close to it, added up; where to start on a similar operator.
    """

    value: float
    error: float
    products: int
    converged: bool
    gap: float
    direction: Tensor = field(repr=False)

    @property
    def relative_error(self) -> float:
        """``error / |value|``; 0 for the zero operator."""
        return self.error / abs(self.value) if self.value else (math.inf if self.error else 0.0)


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-2,
    max_products: int = 100,
    gap: float | None = None,
    seen: Callable[[int], None] | None = None,
) -> Extreme:
    """λ_max of a symmetric operator, with full reorthogonalisation (Golub and Van Loan, Section 10.3).

    After k products the Ritz values θ₁ ≥ θ₂ ≥ … are the eigenvalues of a k×k tridiagonal matrix. The residual norm r
    of θ₁ bounds its distance to the nearest eigenvalue, and the iteration stops when r ≤ ``tolerance · |θ₁|``. If the
    gap δ below the eigenvalue is known, the distance is at most r²/δ (Kato and Temple), which falls below the
    tolerance earlier. δ must not be taken from these Ritz values alone: of two close eigenvalues they show one at
    first.

    Args:
        product: v ↦ A·v for v (P,).
        start: (P,); should not be orthogonal to the wanted eigenvector.
        tolerance: Relative error to stop at.
        max_products: Stop here at the latest. P products find every eigenvalue that the start vector reaches.
        gap: δ / |θ₁|, where it is known, from a similar operator.
        seen: Told after each product how many there have been.

    Returns:
        The eigenvalue.
    """
    size = start.numel()
    basis = [start / start.norm()]
    diagonal: list[float] = []
    below: list[float] = []
    while True:
        image = product(basis[-1]).to(basis[-1].dtype)
        diagonal.append(float(image @ basis[-1]))
        # Twice is enough: the second pass removes what rounding left of the first.
        for _ in range(2):
            for vector in basis:
                image -= (image @ vector) * vector
        length = float(image.norm())
        if seen is not None:
            seen(len(diagonal))
        ritz, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(below, 1) + np.diag(below, -1))
        residuals = length * np.abs(vectors[-1])
        top = abs(ritz[-1])
        error = residuals[-1]
        if gap is not None:
            free = gap * top if len(ritz) == 1 else min(ritz[-1] - ritz[-2] - residuals[-2], gap * top)
            if free > error:
                error = error**2 / free
        rounding = torch.finfo(start.dtype).eps * max(abs(ritz[0]), top)
        converged = bool(error <= tolerance * top or length <= 8 * rounding or len(diagonal) == size)
        if converged or len(diagonal) >= max_products:
            break
        below.append(length)
        basis.append(image / length)
    weights = vectors @ np.where(ritz >= CLOSE * ritz[-1], np.maximum(ritz, 0), 0) if ritz[-1] > 0 else vectors[:, -1]
    direction = sum((w * b for w, b in zip(weights.tolist(), basis, strict=True)), torch.zeros_like(start))
    apart = ritz[-1] - ritz[-2] - residuals[-1] - residuals[-2] if len(ritz) > 1 else top
    return Extreme(
        float(ritz[-1]), float(error), len(diagonal), converged, max(0.0, float(apart) / top) if top else 0.0, direction
    )


def start_vector(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random unit vector (P,), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).to(device, dtype)
