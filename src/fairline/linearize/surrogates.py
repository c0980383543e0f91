"""What stands in a ReLU's place: the identity, or a quadratic polynomial a channel (Delphi, SAFENet, AutoReP).

The quadratic ``g(x) = c₀ + c₁x + 0.2·c₂x²`` starts from the least-squares fit of the ReLU on the channel's own
pre-activations and is trained with the other weights. c₂ minimises ``E[(relu(x) − c₀ − c₁x − c₂x²)²]``; where x is
normal this is AutoReP's distribution-aware approximation (Peng et al. 2023), of N(0, 1) ``(1 + x²)/√(8π) + x/2``. As in
AutoReP's code the square then enters with a smaller factor, without which deep networks overflow; here c₀ and c₁ are
fitted again to what that leaves. The code's factor differs from script to script (0.1 or 0.2 on CIFAR, 2 with clipping
on Tiny ImageNet); 0.2 is part of fairline's file format, and ``square`` starts with another one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.activations import each_activation
from fairline.masking import SQUARE_SCALE, SURROGATES, Surrogate, mask_relus, masked_relus


def require_surrogate(surrogate: str) -> None:
    """Refuse a surrogate that does not exist.

    Raises:
        FairlineError: It does not.
    """
    if surrogate not in SURROGATES:
        raise FairlineError(f"A surrogate is {' or '.join(SURROGATES)}, not '{surrogate}'.")


def start_masked(
    model: nn.Module,
    train: GroupedData,
    surrogate: Surrogate,
    device: torch.device,
    *,
    samples: int = 2000,
    seed: int = 0,
    square: float = SQUARE_SCALE,
) -> nn.Module:
    """A masked copy of a network on ``device`` that computes what the network does, its surrogates fitted.

    All ReLUs are kept that the network has. Where it is linearized already, what stands in the place of the others
    stays as it is: a channel with a ReLU that was cut to the identity starts from the identity.

    Args:
        model: The trained network, masked or not; not changed.
        train: Training part, that surrogates are fitted on.
        surrogate: What will stand in a ReLU's place.
        device: Where to put it.
        samples: Training images to fit on, at most.
        seed: Of their choice.
        square: As for :func:`fit_quadratics`.

    Returns:
        The copy, in the mode of the network.

    Raises:
        FairlineError: The model has no ReLU, there is no such surrogate, or ReLUs were cut to quadratics and the
            identity is asked for.
    """
    layers = masked_relus(model).values()
    fitted = any(layer.coefficients is not None for layer in layers)
    if surrogate == "identity" and any(
        layer.coefficients is not None and layer.num_kept < layer.kept.numel() for layer in layers
    ):
        raise FairlineError(
            f"ReLUs of {type(model).__name__} have been replaced by quadratics, which the identity cannot stand for; "
            "linearize it further with surrogate='quadratic'."
        )
    masked = mask_relus(model, train.normalized(slice(2)), surrogate).to(device)
    if surrogate == "quadratic" and not fitted:
        fit_quadratics(masked, train.to(device), samples=samples, seed=seed, square=square)
    return masked


def fit_quadratics(
    model: nn.Module, data: GroupedData, *, samples: int = 2000, seed: int = 0, square: float = SQUARE_SCALE
) -> None:
    """Set the coefficients of all quadratic surrogates that nothing depends on yet to the fit of the ReLU.

    Args:
        model: Masked, with quadratic surrogates; evaluated as its masks are now. Channels with a ReLU that is cut keep
            their coefficients.
        data: On the model's device.
        samples: Images to fit on, at most.
        seed: Of their choice.
        square: Factor that the fitted square enters with. The coefficient that is stored is multiplied by 0.2 wherever
            it is used, whatever this is, so that it is ``square / 0.2`` times the fit.
    """
    layers = {name: layer for name, layer in masked_relus(model).items() if layer.coefficients is not None}
    moments = {name: torch.zeros(layer.shape[0], 8, dtype=torch.float64) for name, layer in layers.items()}

    def add(name: str, x: Tensor, index: Tensor) -> None:
        # Channels in front, everything else behind.
        values = x.double().transpose(0, 1).flatten(1)
        powers = torch.stack([values**k for k in range(5)], 1)
        bent = torch.stack([powers[:, k] * values.clamp_min(0) for k in range(3)], 1)
        moments[name] += torch.cat([powers, bent], 1).sum(2).cpu()

    each_activation(model, data, add, samples=samples, seed=seed)
    for name, layer in layers.items():
        coefficients = damped(least_squares(moments[name]), moments[name], square)
        assert layer.coefficients is not None
        whole = layer.kept.view(len(layer.kept), -1).all(1).view(layer.coefficients.shape[1:])
        with torch.no_grad():
            fit = coefficients.T.reshape(layer.coefficients.shape).to(layer.coefficients)
            layer.coefficients.copy_(torch.where(whole, fit, layer.coefficients))


def damped(coefficients: Tensor, moments: Tensor, square: float = SQUARE_SCALE) -> Tensor:
    """A smaller square: c₀ and c₁ fitted to ``relu(x) − square·c₂x²``.

    Args:
        coefficients: From :func:`least_squares`, (C, 3).
        moments: As there, (C, 8).
        square: Factor of the square.

    Returns:
        float64, (C, 3); c₂ is ``square / 0.2`` times the fit, since 0.2 stands before it wherever it is used.
    """
    left = moments[:, 5:7] - square * coefficients[:, 2:] * moments[:, 2:4]
    line = _solve(moments, left)
    return torch.cat([line, coefficients[:, 2:] * (square / SQUARE_SCALE)], 1)


def least_squares(moments: Tensor) -> Tensor:
    """Coefficients (C, 3) of the quadratic nearest to the ReLU.

    Args:
        moments: float64, (C, 8): sums of 1, x, x², x³, x⁴, relu(x), x·relu(x), x²·relu(x).

    Returns:
        c₀, c₁ and c₂ of each channel, float64.
    """
    return _solve(moments, moments[:, 5:])


def _solve(moments: Tensor, target: Tensor) -> Tensor:
    """Polynomial of degree d − 1 from Σ xᵏ, (C, ≥ 2d − 1), and Σ xᵏy, (C, d)."""
    degree = target.shape[1]
    gram = torch.stack([moments[:, k : k + degree] for k in range(degree)], 1)
    # Powers of x differ by orders of magnitude; a unit diagonal keeps the pseudo-inverse's cut meaningful.
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    inverse = torch.linalg.pinv(scale[:, :, None] * gram * scale[:, None, :], rtol=1e-9, hermitian=True)
    solution: Tensor = scale * (inverse @ (scale * target)[:, :, None]).squeeze(2)
    return solution
