"""Gradient norm of each group's loss, all groups in one pass (paper, Theorem 4.4, Figure 3 and Appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit.base import Row, Subject
from fairline.audit.functional import Functional
from fairline.data.grouped import OVERALL


@dataclass(frozen=True)
class GroupGradients:
    """What one pass over the data tells of the gradients gₐ = ∇J(θ; Sᵃ).

    Attributes:
        norm: (A,): ‖gₐ‖, nats per unit of parameter distance.
        n: (A,): |Sᵃ|.
        overall: ‖∇J(θ; S)‖.
    """

    norm: NDArray[np.float64]
    n: NDArray[np.int64]
    overall: float

    @property
    def share(self) -> NDArray[np.float64]:
        """(A,): |Sᵃ|·‖gₐ‖ as a share of its sum over groups: how much of the pull on θ is this group's.

        At a minimum of the loss over all samples, Σₐ |Sᵃ|·gₐ = 0. With two groups both shares are then ½, which is
        ‖gₐ‖/‖g_b‖ = |S_b|/|Sₐ| (Appendix A.1). With more groups no share can exceed ½, and nothing more is implied:
        a small group may have a small gradient.
        """
        pull = self.n * self.norm
        return pull / pull.sum() if pull.sum() > 0 else np.full_like(pull, np.nan)

    @property
    def residual(self) -> float:
        """‖Σₐ |Sᵃ|·gₐ‖ / Σₐ |Sᵃ|·‖gₐ‖ in [0, 1]: 0 at a minimum, 1 where all groups pull the same way."""
        pull = float((self.n * self.norm).sum())
        return float(self.n.sum() * self.overall / pull) if pull > 0 else float("nan")


def group_gradients(functional: Functional) -> GroupGradients:
    """Gradient norms of all groups in one pass: each sample goes forward and backward once, with its own group.

    The norm is that of the whole group's gradient; a mean of the norms of mini-batch gradients, as in the code
    published with the paper, is larger and depends on the batch size.

    Args:
        functional: The network on its data.

    Returns:
        The norms.
    """
    data = functional.data
    overall = torch.zeros(functional.size, dtype=torch.float64, device=functional.device)
    norms, sizes = [], []
    for group in range(data.num_groups):
        index = torch.nonzero(data.groups == group).flatten()
        gradient = functional.gradient(index)
        norms.append(float(gradient.norm()))
        sizes.append(len(index))
        overall += gradient * (len(index) / len(data))
    return GroupGradients(np.array(norms), np.array(sizes), float(overall.norm()))


def per_sample_gradient_norms(functional: Functional, batch_size: int = 25) -> NDArray[np.float64]:
    """‖∇_θ ℓ(x, y)‖ of every sample; memory grows with ``batch_size`` · P.

    Args:
        functional: The network on its data.
        batch_size: Samples whose gradients are held at a time.

    Returns:
        float64, (N,), nats per unit of parameter distance.
    """
    parameters = {name: parameter.detach() for name, parameter in functional.parameters.items()}

    def loss(theta: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional.logits(theta, image[None]), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    norms = []
    everything = torch.arange(len(functional.data))
    for images, labels in functional.batches(functional.own(everything)):
        for part, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            squares = [g.flatten(1).double().square().sum(1) for g in gradients(parameters, part, targets).values()]
            norms.append(torch.stack(squares).sum(0).sqrt())
    return functional.gather(torch.cat(norms), everything).cpu().numpy()


def measure(subject: Subject, *, per_sample: bool = False) -> list[Row]:
    """Rows for the gradients, nats per unit of parameter distance unless said otherwise.

    Measures: ``gradient_norm``, ‖gₐ‖ (also overall); ``gradient_share``, the group's share of the pull on the
    parameters; overall ``gradient_residual``, 0 at a minimum of the loss over these samples.

    Args:
        subject: The model.
        per_sample: Also record each sample's gradient norm as the column ``gradient_norm``.

    Returns:
        The rows.
    """
    gradients = once(subject)
    rows = []
    for position, name in enumerate(subject.data.group_names):
        n = int(gradients.n[position])
        rows.append(Row(name, "gradient_norm", float(gradients.norm[position]), n=n))
        rows.append(Row(name, "gradient_share", float(gradients.share[position]), n=n))
    n = len(subject.data)
    rows.append(Row(OVERALL, "gradient_norm", gradients.overall, n=n))
    rows.append(Row(OVERALL, "gradient_residual", gradients.residual, n=n))
    if per_sample:
        subject.samples["gradient_norm"] = per_sample_gradient_norms(subject.functional)
    return rows


def once(subject: Subject) -> GroupGradients:
    """The gradients of a subject, computed once."""

    def compute() -> GroupGradients:
        # A loss that is not finite must be named before it becomes a gradient.
        _ = subject.predictions
        return group_gradients(subject.functional)

    return subject.once("gradients", compute)
