"""What stands in a ReLU's place: the identity, zero, or a polynomial a channel (Delphi, SAFENet, AutoReP).

The quadratic ``g(x) = c₀ + c₁x + 0.2·c₂x²`` starts from the least-squares fit of the ReLU on the channel's own
pre-activations and is trained with the other weights. c₂ minimises ``E[(relu(x) − c₀ − c₁x − c₂x²)²]``; where x is
normal this is AutoReP's distribution-aware approximation (Peng et al. 2023), of N(0, 1) ``(1 + x²)/√(8π) + x/2``. As in
AutoReP's code the square then enters with a smaller factor, without which deep networks overflow; here c₀ and c₁ are
fitted again to what that leaves. The code's factor differs from script to script (0.01 or 0.02 on CIFAR, 0.2 with
clipping on Tiny ImageNet); 0.2 is part of fairline's file format, and ``square`` starts with another one.

The cubic is fitted likewise, of degree 3, and its cube enters with the square's factor twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.activations import each_activation
from fairline.masking import (
    POWER_SCALES,
    SQUARE_SCALE,
    SURROGATES,
    MaskedReLU,
    Polynomial,
    Surrogate,
    mask_relus,
    masked_relus,
    require_surrogate,
)


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
        square: As for :func:`fit_surrogates`.

    Returns:
        The copy, in the mode of the network.

    Raises:
        FairlineError: The model has no ReLU, there is no such surrogate, or it cannot compute what ReLUs were cut to.
    """
    require_surrogate(surrogate)
    wanted = SURROGATES[surrogate]
    layers = masked_relus(model).values()
    _require_room(model, wanted)
    fitted = any(layer.surrogate == surrogate for layer in layers)
    masked = mask_relus(model, train.normalized(slice(2)), surrogate).to(device)
    if wanted.learned and not fitted:
        fit_surrogates(masked, train.to(device), samples=samples, seed=seed, square=square)
    return masked


def _require_room(model: nn.Module, wanted: Polynomial) -> None:
    """Refuse a surrogate that cannot compute what stands in the place of ReLUs that were cut before."""
    found = {int(degree) for layer in masked_relus(model).values() for degree in layer.channel_degrees[cut(layer)]}
    if all(map(wanted.stands_for, found)):
        return
    others = {each.degree: each for each in SURROGATES.values()}
    theirs = others[max(degree for degree in found if not wanted.stands_for(degree))]
    enough = next(each for each in (theirs, others[2], others[3]) if all(map(each.stands_for, found)))
    raise FairlineError(
        f"ReLUs of {type(model).__name__} have been replaced by {theirs.plural}, which {wanted.plural} cannot stand "
        f"for; linearize it further with surrogate='{enough.name}'."
    )


def cut(layer: MaskedReLU) -> Tensor:
    """Which channels of a layer have lost a ReLU, bool, (C,)."""
    return ~layer.kept.view(len(layer.kept), -1).all(1)


def fit_surrogates(
    model: nn.Module, data: GroupedData, *, samples: int = 2000, seed: int = 0, square: float = SQUARE_SCALE
) -> None:
    """Set the coefficients of all polynomial surrogates that nothing depends on yet to the fit of the ReLU.

    Args:
        model: Masked, with surrogates that have coefficients; evaluated as its masks are now. Channels with a ReLU that
            is cut keep their coefficients.
        data: On the model's device.
        samples: Images to fit on, at most.
        seed: Of their choice.
        square: Factor that the fitted square enters with, a cube with its square. The coefficient that is stored is
            multiplied by 0.2 wherever it is used, whatever this is, so that it is ``square / 0.2`` times the fit.
    """
    layers = {name: layer for name, layer in masked_relus(model).items() if layer.coefficients is not None}
    moments: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, index: Tensor) -> None:
        if name in layers:
            found = moments_of(x, int(layers[name].channel_degrees.max()))
            moments[name] = moments[name] + found if name in moments else found

    each_activation(model, data, add, samples=samples, seed=seed)
    for name, layer in layers.items():
        put(layer, moments[name], ~cut(layer), square)


def put(layer: MaskedReLU, moments: Tensor, channels: Tensor, square: float = SQUARE_SCALE) -> None:
    """Set coefficients of a layer to the fit, each channel's to that of its own degree.

    Args:
        layer: With coefficients.
        moments: From :func:`moments_of`, for the highest of its degrees.
        channels: bool, (C,): which of them.
        square: As for :func:`fit_surrogates`.
    """
    assert layer.coefficients is not None
    with torch.no_grad():
        for degree in layer.channel_degrees.unique().tolist():
            if degree < 2:
                continue
            own = fit(of_degree(moments, degree), square).T
            fitted = torch.zeros(len(layer.coefficients), own.shape[1], dtype=own.dtype)
            fitted[: len(own)] = own
            chosen = (channels & (layer.channel_degrees == degree)).view(layer.coefficients.shape[1:])
            fitted = fitted.reshape(layer.coefficients.shape).to(layer.coefficients)
            layer.coefficients.copy_(torch.where(chosen, fitted, layer.coefficients))


def moments_of(x: Tensor, degree: int, weight: Tensor | None = None) -> Tensor:
    """The sums that a fit of some degree needs.

    Args:
        x: Pre-activations, (B, C, …).
        degree: d, of the polynomial.
        weight: Of each unit, of the shape of x; 1 by default.

    Returns:
        float64, (C, 3d + 2), on the CPU: for each channel the sums of 1, x, …, x²ᵈ and relu(x), x·relu(x), ….
    """
    # Channels in front, everything else behind.
    values = x.double().transpose(0, 1).flatten(1)
    powers = torch.stack([values**k for k in range(2 * degree + 1)], 1)
    bent = torch.stack([powers[:, k] * values.clamp_min(0) for k in range(degree + 1)], 1)
    sums = torch.cat([powers, bent], 1)
    if weight is not None:
        sums = sums * weight.double().transpose(0, 1).flatten(1).unsqueeze(1)
    return sums.sum(2).cpu()


def of_degree(moments: Tensor, degree: int) -> Tensor:
    """Those sums of :func:`moments_of` that a fit of a lower degree needs."""
    highest = (moments.shape[1] - 2) // 3
    bent = moments[:, 2 * highest + 1 :]
    return torch.cat([moments[:, : 2 * degree + 1], bent[:, : degree + 1]], 1)


def fit(moments: Tensor, square: float = SQUARE_SCALE) -> Tensor:
    """Coefficients of each channel's polynomial as a network starts with them, (C, d + 1), float64."""
    return damped(least_squares(moments), moments, square)


def damped(coefficients: Tensor, moments: Tensor, square: float = SQUARE_SCALE) -> Tensor:
    """Smaller powers above x: c₀ and c₁ fitted to ``relu(x) − square·c₂x² − square²·c₃x³``.

    Args:
        coefficients: From :func:`least_squares`, (C, d + 1).
        moments: As there.
        square: Factor of the square.

    Returns:
        float64, (C, d + 1); c₂ is ``square / 0.2`` times the fit, since 0.2 stands before it wherever it is used.
    """
    degree = coefficients.shape[1] - 1
    left = moments[:, 2 * degree + 1 : 2 * degree + 3]
    higher = []
    for power in range(2, degree + 1):
        factor = square ** (power - 1)
        left = left - factor * coefficients[:, power, None] * moments[:, power : power + 2]
        higher.append(coefficients[:, power, None] * (factor / POWER_SCALES[power]))
    return torch.cat([_solve(moments, left), *higher], 1)


def least_squares(moments: Tensor) -> Tensor:
    """Coefficients (C, d + 1) of the polynomial nearest to the ReLU.

    Args:
        moments: float64, (C, 3d + 2), see :func:`moments_of`.

    Returns:
        c₀, …, c_d of each channel, float64.
    """
    degree = (moments.shape[1] - 2) // 3
    return _solve(moments, moments[:, 2 * degree + 1 :])


def errors(coefficients: Tensor, moments: Tensor) -> Tensor:
    """The sum of ``(relu(x) − g(x))²``, a number a channel.

    Args:
        coefficients: As :func:`fit` gives them, (C, d + 1); (C, 1) of zeros for zero.
        moments: From :func:`moments_of`, of degree d at least.

    Returns:
        float64, (C,).
    """
    degree = (moments.shape[1] - 2) // 3
    bent = moments[:, 2 * degree + 1 :]
    factors = coefficients * torch.tensor(POWER_SCALES[: coefficients.shape[1]], dtype=torch.float64)
    # relu² = x·relu.
    total = bent[:, 1].clone()
    for i, own in enumerate(factors.T):
        total -= 2 * own * bent[:, i]
        for j, other in enumerate(factors.T):
            total += own * other * moments[:, i + j]
    return total.clamp_min(0)


def _solve(moments: Tensor, target: Tensor) -> Tensor:
    """Polynomial of degree d − 1 from Σ xᵏ, (C, ≥ 2d − 1), and Σ xᵏy, (C, d)."""
    degree = target.shape[1]
    gram = torch.stack([moments[:, k : k + degree] for k in range(degree)], 1)
    # Powers of x differ by orders of magnitude; a unit diagonal keeps the pseudo-inverse's cut meaningful.
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    inverse = torch.linalg.pinv(scale[:, :, None] * gram * scale[:, None, :], rtol=1e-9, hermitian=True)
    solution: Tensor = scale * (inverse @ (scale * target)[:, :, None]).squeeze(2)
    return solution
