"""The paper's two upper bounds beside what they bound: Theorem 4.4 (excess loss) and Proposition 4.5 (curvature)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit import curvature, gradients
from fairline.audit.base import Row, Subject, predictions
from fairline.audit.distance import shared_parameters, total_distance
from fairline.audit.functional import Functional
from fairline.audit.intervals import mean_interval
from fairline.audit.lanczos import start_vector
from fairline.errors import FairlineError
from fairline.masking import copy_model, relu_count
from fairline.ranks import here

Floats = NDArray[np.float64]


def excess_loss_bound(subject: Subject, *, tolerance: float = 1e-2, max_products: int = 100) -> list[Row]:
    """Rows for Theorem 4.4, R(a) ≤ ‖gₐ‖·‖θ̃ − θ‖ + ½·λ_max(Hₐ)·‖θ̃ − θ‖² + O(‖θ̃ − θ‖³), all in nats.

    gₐ and Hₐ are those of the reference θ on the audited samples of the group, as in the proof (Appendix A.2).

    Measures: ``excess_loss``, R(a) = J(θ̃; Sᵃ) − J(θ; Sᵃ); ``bound_first`` and ``bound_second``, the two terms;
    ``bound``, their sum, the cubic term left out; ``bound_holds``, 1 or 0; ``bound_looseness``, bound / R(a), NaN
    unless R(a) > 0.
    The expansion behind the theorem moves the weights and keeps the ReLUs, but θ̃ runs with fewer. So there is also
    ``excess_loss_weights``: the loss of θ̃'s weights in the reference network with all its ReLUs (and its BatchNorm
    statistics), less J(θ; Sᵃ), where the two networks have the same parameters.

    Args:
        subject: The linearized model; its reference is the network before.
        tolerance: Relative error of λ_max.
        max_products: Hessian products to take for a group at most.

    Returns:
        The rows.

    Raises:
        FairlineError: The networks share no parameter, or the reference has no ReLU.
    """
    assert subject.reference is not None  # audit() requires it
    reference, data = subject.reference, subject.data
    relu_count(reference.model, data.normalized(torch.arange(1)).to(reference.functional.device))
    moved = total_distance(subject.model, reference.model)
    norms = dict(zip(data.group_names, gradients.once(reference).norm.tolist(), strict=True))
    transplanted = _transplanted(subject, reference)
    rows = []
    for name, index in subject.group_index():
        before = reference.predictions.loss[index].mean()
        excess = float(subject.predictions.loss[index].mean() - before)
        largest = curvature.once(reference, name, "hessian", tolerance, max_products).value
        first, second = norms[name] * moved, largest * moved**2 / 2
        bound = first + second
        values = {
            "excess_loss": excess,
            "bound_first": first,
            "bound_second": second,
            "bound": bound,
            "bound_holds": float(excess <= bound),
            "bound_looseness": bound / excess if excess > 0 else math.nan,
        }
        if transplanted is not None:
            values["excess_loss_weights"] = float(transplanted[index].mean() - before)
        rows += [Row(name, measure, value, n=len(index)) for measure, value in values.items()]
    return rows


def _transplanted(subject: Subject, reference: Subject) -> Floats | None:
    """Loss of each sample with θ̃ in the reference network; None where their parameters differ in name or shape."""
    shared = shared_parameters(subject.model, reference.model)
    if shared.keys() != dict(reference.model.named_parameters()).keys():
        return None
    network = copy_model(reference.model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(shared[name][0])
    try:
        return predictions(network, subject.data, subject.device).loss
    except FairlineError:
        # Weights moved far may overflow in a network that they were not trained in.
        return None


@dataclass(frozen=True)
class Terms:
    """Per-sample terms of Proposition 4.5, (n,) each.

    Attributes:
        z1: h(1 − h)·‖∇z‖².
        z2: λ_max((h − y)·∇²z).
        z2_printed: |h − y|·λ_max(∇²z), as the paper prints it.
    """

    z1: Floats
    z2: Floats
    z2_printed: Floats


def binary_terms(
    functional: Functional, index: Tensor, *, tolerance: float = 1e-2, max_products: int = 50, seed: int = 0
) -> Terms:
    """The terms of Proposition 4.5 for each sample of a binary classifier.

    With binary cross-entropy ℓ = −y·log h − (1 − y)·log(1 − h) and h = σ(z), the Hessian of a sample's loss is
    h(1 − h)·∇z∇zᵀ + (h − y)·∇²z: the derivatives are those of the logit z, not of the probability h (the paper
    writes h for both, and its proof differentiates ℓ as one does with respect to the logit). By Weyl's
    inequality its λ_max is at most h(1 − h)·‖∇z‖² + λ_max((h − y)·∇²z). The second term as printed,
    |h − y|·λ_max(∇²z), is smaller wherever y = 1 and −λ_min(∇²z) > λ_max(∇²z), and is then no bound.

    Args:
        functional: The network on its data; two outputs, z = z₁ − z₀.
        index: Sample positions.
        tolerance: Error of the eigenvalues to stop at, relative to the largest magnitude.
        max_products: Products for each sample at most.
        seed: Of the start vectors.

    Returns:
        The terms.
    """
    # Basis vectors of all samples in a batch are held at once.
    batch = max(1, min(64, int(2e8 // (functional.size * min(max_products, functional.size)))))
    theta = {name: parameter.detach() for name, parameter in functional.parameters.items()}
    names = list(theta)

    def logit(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        out = functional.logits(parameters, image[None])[0]
        return out[1] - out[0]

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten(1) for name in names], dim=1)

    def product(image: Tensor, direction: dict[str, Tensor]) -> Any:
        return torch.func.jvp(lambda p: torch.func.grad(logit)(p, image), (theta,), (direction,))[1]

    parts: list[tuple[Tensor, ...]] = []
    for images, labels in _small_batches(functional, index, batch):

        def times(vectors: Tensor, images: Tensor = images) -> Tensor:
            pieces = vectors.split([theta[name].numel() for name in names], dim=1)
            direction = {name: piece.reshape(-1, *theta[name].shape) for name, piece in zip(names, pieces, strict=True)}
            return flat(torch.func.vmap(product, in_dims=(0, 0))(images, direction))

        gradient = flat(torch.func.vmap(torch.func.grad(logit), in_dims=(None, 0))(theta, images))
        h = torch.sigmoid(torch.func.vmap(logit, in_dims=(None, 0))(theta, images)).double()
        smallest, largest = _extremes(times, len(images), functional, tolerance, max_products, seed)
        error = h - labels
        parts.append(
            (
                h * (1 - h) * gradient.double().square().sum(1),
                torch.where(error > 0, error * largest, error * smallest),
                error.abs() * largest,
            )
        )
    return Terms(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _small_batches(functional: Functional, index: Tensor, size: int) -> Any:
    for images, labels in functional.batches(index):
        yield from zip(images.split(size), labels.split(size), strict=True)


def _extremes(
    times: Any, count: int, functional: Functional, tolerance: float, max_products: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of ``count`` operators at once, (count,) each, by Lanczos."""
    start = start_vector(functional.size, seed, functional.device, functional.dtype)
    basis = [start.expand(count, -1).contiguous()]
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    done = torch.zeros(count, dtype=torch.bool, device=functional.device)
    while True:
        image = times(basis[-1])
        diagonal.append((image * basis[-1]).sum(1))
        # An operator whose Krylov space is exhausted repeats its first value, which lies between its extremes.
        diagonal[-1] = torch.where(done, diagonal[0], diagonal[-1])
        for _ in range(2):
            for vector in basis:
                image = image - (image * vector).sum(1, keepdim=True) * vector
        length = image.norm(dim=1)
        steps = len(diagonal)
        projected = torch.diag_embed(torch.stack(diagonal, 1).double())
        if below:
            beside = torch.stack(below, 1).double()
            projected = projected + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        ritz, vectors = torch.linalg.eigh(projected)
        size = ritz.abs().amax(1)
        done |= length <= 8 * torch.finfo(functional.dtype).eps * size
        residual = length.double()[:, None] * vectors[:, -1, :].abs()
        settled = torch.maximum(residual[:, 0], residual[:, -1]) <= tolerance * size
        if bool((done | settled).all()) or steps >= min(max_products, functional.size):
            return ritz[:, 0], ritz[:, -1]
        below.append(torch.where(done, 0, length))
        basis.append(torch.where(done[:, None], 0, image / length.clamp_min(torch.finfo(length.dtype).tiny)[:, None]))


def binary_curvature_bound(
    subject: Subject, *, samples: int | None = None, tolerance: float = 1e-2, max_products: int = 50
) -> list[Row]:
    """Rows for Proposition 4.5, λ_max(Hₐ) ≤ Z₁ + Z₂; see :func:`binary_terms` for how the symbols are read.

    Measures: ``z1`` and ``z2``, means over the group; ``z_bound``, their sum; ``z_bound_holds``, whether λ_max(Hₐ),
    computed over the same samples, is below it; ``z_bound_looseness``, z_bound / λ_max(Hₐ); ``z2_printed``, the second
    term as the paper prints it. Terms have the unit of a Hessian eigenvalue.

    Args:
        subject: The model.
        samples: Take so many random samples of each group, with 95 % limits; all by default. Every sample needs its own
            eigenvalue. λ_max is then that of the same samples.
        tolerance: Relative error of the eigenvalues.
        max_products: Products for each eigenvalue at most.

    Returns:
        The rows.

    Raises:
        FairlineError: The model is not a binary classifier, or no sample was asked for.
    """
    outputs = subject.predictions.logits.shape[1]
    if outputs != 2 or subject.data.num_classes != 2:
        raise FairlineError(
            f"Proposition 4.5 is about binary classifiers, but {subject.name} has {outputs} outputs "
            f"for {subject.data.num_classes} classes."
        )
    if samples is not None and samples < 1:
        raise FairlineError(f"Proposition 4.5 needs a sample of each group at least, not {samples}.")
    rows = []
    rng = np.random.default_rng(subject.seed)
    for name, positions in subject.group_index():
        whole = samples is None or samples >= len(positions)
        chosen = positions if whole else np.sort(rng.choice(positions, samples, replace=False))
        index = torch.from_numpy(chosen)
        terms = _terms_of(subject, name, index, tolerance, max_products)
        bound = float(terms["z_bound"].mean())
        if whole:
            largest = curvature.once(subject, name, "hessian", tolerance).value
        else:
            largest = curvature.group_curvature(subject.functional, index, tolerance=tolerance, seed=subject.seed).value
        n = len(chosen)
        for key, own in terms.items():
            limits = (math.nan, math.nan) if whole else mean_interval(own)
            rows.append(Row(name, key, float(own.mean()), *limits, n=n))
        rows.append(Row(name, "z_bound_holds", float(largest <= bound), n=n))
        rows.append(Row(name, "z_bound_looseness", bound / largest if largest > 0 else math.nan, n=n))
    return rows


def _terms_of(subject: Subject, name: str, index: Tensor, tolerance: float, max_products: int) -> dict[str, Floats]:
    """Terms of Proposition 4.5 and their sum for samples of a group, (n,) each, telling how far it is."""
    parts: list[Terms] = []
    ranks, size = here(), 200
    chunks = index[ranks.part(len(index), size)].split(size)
    for done, chunk in enumerate(chunks, start=1):
        parts.append(
            binary_terms(subject.functional, chunk, tolerance=tolerance, max_products=max_products, seed=subject.seed)
        )
        subject.report(f"Proposition 4.5, {name}", done, len(chunks))
    terms = {}
    for key in ("z1", "z2", "z2_printed"):
        own = torch.from_numpy(np.concatenate([getattr(part, key) for part in parts]))
        terms[key] = ranks.gather(own.to(subject.functional.device), len(index), size).cpu().numpy()
    return {**terms, "z_bound": terms["z1"] + terms["z2"]}
