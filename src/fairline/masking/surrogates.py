"""What may stand in a ReLU's place: a polynomial of each channel, ``g(x) = c₀ + c₁x + 0.2·c₂x² + 0.04·c₃x³``.

A surrogate is told by its degree. Those of degree 2 and 3 are learned; the identity and zero are what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairline.errors import FairlineError

Surrogate = Literal["identity", "quadratic", "cubic", "zero"]

#: Factor of x² in a surrogate, as AutoReP's published code has it. Without it a deep network of fitted polynomials
#: overflows: each layer squares what the last one let through. A cube gets it twice.
SQUARE_SCALE = 0.2
#: Factors of 1, x, x² and x³.
POWER_SCALES = (1.0, 1.0, SQUARE_SCALE, SQUARE_SCALE**2)


@dataclass(frozen=True)
class Polynomial:
    """A surrogate.

    Attributes:
        name: On the command line and in files.
        plural: What it is called in a sentence.
        degree: Tells it from all others: 0 (zero), 1 (the identity), 2 or 3.
    """

    name: Surrogate
    plural: str
    degree: int

    @property
    def learned(self) -> bool:
        """Whether its coefficients are weights."""
        return self.degree > 1

    @property
    def products(self) -> int:
        """Products of two secrets that it takes, one after the other: by Horner's rule one for each power above x."""
        return max(self.degree - 1, 0)

    def stands_for(self, degree: int) -> bool:
        """Whether it can compute what a surrogate of some degree does, whatever the coefficients are."""
        return degree == self.degree or (self.learned and degree < self.degree)


#: All surrogates by name.
SURROGATES: dict[Surrogate, Polynomial] = {
    each.name: each
    for each in (
        Polynomial("identity", "the identity", 1),
        Polynomial("quadratic", "quadratics", 2),
        Polynomial("cubic", "cubics", 3),
        Polynomial("zero", "zero", 0),
    )
}
#: Their names by degree.
OF_DEGREE: dict[int, Surrogate] = {each.degree: each.name for each in SURROGATES.values()}
#: What a layer or network is said to have whose channels have several.
MIXED = "mixed"


def require_surrogate(surrogate: str) -> None:
    """Refuse a surrogate that does not exist.

    Raises:
        FairlineError: It does not.
    """
    if surrogate not in SURROGATES:
        *others, last = SURROGATES
        raise FairlineError(f"A surrogate is {', '.join(others)} or {last}, not '{surrogate}'.")


def evaluate(coefficients: Tensor, x: Tensor) -> Tensor:
    """``g(x)`` by Horner's rule.

    Args:
        coefficients: (degree + 1, C, 1, …), at least of degree 1.
        x: (B, C, …).

    Returns:
        Of the shape of x.
    """
    top = len(coefficients) - 1
    value = POWER_SCALES[top] * coefficients[top]
    for power in reversed(range(top)):
        scale = POWER_SCALES[power]
        value = value * x + (coefficients[power] if scale == 1 else scale * coefficients[power])
    return value


def held(coefficients: Tensor, degrees: Tensor) -> Tensor:
    """Coefficients in which what a channel's degree rules out is fixed: for zero all, for the identity too.

    Args:
        coefficients: (D, C, 1, …).
        degrees: int64, (C,).

    Returns:
        Of the shape of the coefficients; those that are fixed have no gradient.
    """
    degrees = degrees.view(-1, *[1] * (coefficients.ndim - 2))
    power = torch.arange(len(coefficients), device=degrees.device).view(-1, *[1] * (coefficients.ndim - 1))
    free = (power <= degrees) & (degrees > 1)
    fixed = ((power == 1) & (degrees == 1)).to(coefficients.dtype)
    return torch.where(free, coefficients, fixed)
