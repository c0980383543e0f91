"""The largest eigenvalue of a symmetric operator by the Lanczos method (Golub and Van Loan, Section 10.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

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
    """λ_max of a symmetric operator, with full reorthogonalisation.

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

    >>> matrix = torch.diag(torch.tensor([5.0, 2.0, 1.0, -7.0], dtype=torch.float64))
    >>> found = largest_eigenvalue(lambda v: matrix @ v, torch.ones(4, dtype=torch.float64), tolerance=1e-9)
    >>> round(found.value, 6), found.products, found.converged
    (5.0, 4, True)
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
        error = _error(ritz, residuals, gap)
        rounding = torch.finfo(start.dtype).eps * max(abs(ritz[0]), abs(ritz[-1]))
        converged = bool(error <= tolerance * abs(ritz[-1]) or length <= 8 * rounding or len(diagonal) == size)
        if converged or len(diagonal) >= max_products:
            break
        below.append(length)
        basis.append(image / length)
    top = abs(ritz[-1])
    apart = ritz[-1] - ritz[-2] - residuals[-1] - residuals[-2] if len(ritz) > 1 else top
    relative_gap = max(0.0, float(apart) / top) if top else 0.0
    return Extreme(float(ritz[-1]), error, len(diagonal), converged, relative_gap, _direction(ritz, vectors, basis))


def _error(ritz: Floats, residuals: Floats, gap: float | None) -> float:
    """Distance of the largest Ritz value to an eigenvalue, at most: its residual, or by Kato and Temple r²/δ."""
    error = float(residuals[-1])
    if gap is None:
        return error
    free = gap * abs(ritz[-1])
    if len(ritz) > 1:
        free = min(ritz[-1] - ritz[-2] - residuals[-2], free)
    return float(error**2 / free) if free > error else error


def _direction(ritz: Floats, vectors: Floats, basis: list[Tensor]) -> Tensor:
    """Ritz vectors of the largest value and of what is close to it, added up, (P,)."""
    weights = vectors @ np.where(ritz >= CLOSE * ritz[-1], np.maximum(ritz, 0), 0) if ritz[-1] > 0 else vectors[:, -1]
    return sum((w * b for w, b in zip(weights.tolist(), basis, strict=True)), torch.zeros_like(basis[0]))


def start_vector(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random unit vector (P,), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).to(device, dtype)
