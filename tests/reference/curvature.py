"""Gradients and Hessians written out: full matrices by double autograd, sums sample by sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def flat_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def with_parameters(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    named, start = {}, 0
    for name, p in model.named_parameters():
        named[name] = theta[start : start + p.numel()].view_as(p)
        start += p.numel()
    return named


def mean_loss(model: nn.Module, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, with_parameters(model, theta), (images,)), labels)


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean of the gradients of single samples, one backward pass each, through ``.grad``."""
    total = torch.zeros_like(flat_parameters(model))
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        total += torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()]
        )
    model.zero_grad()
    return total / len(images)


def hessian(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The full matrix, row by row."""
    return torch.autograd.functional.hessian(
        lambda theta: mean_loss(model, theta, images, labels), flat_parameters(model)
    )


def hessian_by_differences(model: nn.Module, images: Tensor, labels: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of the gradient."""
    theta = flat_parameters(model)

    def grad(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(mean_loss(model, at, images, labels), at)[0]

    rows = []
    for i in range(len(theta)):
        e = torch.zeros_like(theta)
        e[i] = step
        rows.append((grad(theta + e) - grad(theta - e)) / (2 * step))
    return torch.stack(rows)


def ggn(model: nn.Module, images: Tensor) -> Tensor:
    """Mean of Jᵀ(diag(p) − p·pᵀ)J with each sample's full Jacobian."""
    theta = flat_parameters(model)
    total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for image in images:

        def logits(at: Tensor, image: Tensor = image) -> Tensor:
            return functional_call(model, with_parameters(model, at), (image[None],))[0]

        jacobian = torch.autograd.functional.jacobian(logits, theta)
        p = logits(theta).softmax(0)
        total += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total / len(images)


def power_iteration(product, start: Tensor, tolerance: float = 1e-3, limit: int = 1000) -> tuple[float, int]:
    """Eigenvalue of largest magnitude and products taken, stopped by relative change as PyHessian does."""
    vector, value = start / start.norm(), None
    for count in range(1, limit + 1):
        image = product(vector).to(vector.dtype)
        newer = float(image @ vector)
        vector = image / image.norm()
        if value is not None and abs(newer - value) / (abs(value) + 1e-6) < tolerance:
            return newer, count
        value = newer
    return value, limit
