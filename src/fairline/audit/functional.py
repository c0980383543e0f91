"""A network's loss as a function of its parameters, with the products that gradients and curvature need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fairline.data.grouped import GroupedData
from fairline.data.memory import images_at_once
from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.masking import copy_model, masked_relus
from fairline.ranks import here
from fairline.training import choose

Product = Callable[[Tensor], Tensor]


class Functional:
    """J(θ; S) = mean cross-entropy of a network over samples S, as a function of its P parameters θ.

    Works on a copy in evaluation mode, so BatchNorm uses its running statistics and samples do not touch each
    other: every quantity over S is then a plain sum over batches, and memory depends on the batch alone. Several
    processes at work together (:mod:`fairline.ranks`) take some of the batches each.
    Parameter vectors are flat, (P,), in the order of ``named_parameters()``.

    Args:
        model: The network; left as it is. Every parameter counts, also those that are frozen in training.
        data: What it is measured on.
        device: Where to compute; where the model is by default.
        batch_size: Samples at a time, by default 250, and 64 on a CPU; fewer where images have more than 64×64 pixels.

    Raises:
        FairlineError: The network has no parameter, or masks that are still being learned.
    """

    def __init__(
        self, model: nn.Module, data: GroupedData, device: torch.device | None = None, batch_size: int | None = None
    ) -> None:
        if any(layer.weight is not None for layer in masked_relus(model).values()):
            raise FairlineError("The masks are still being learned; fix them (keep_largest) before an audit.")
        self.model = copy_model(model).eval()
        if device is not None:
            self.model.to(device)
        self.data = data
        first = next(self.model.parameters(), None)
        if first is None:
            raise FairlineError(f"{type(model).__name__} has no parameters, so its loss has no gradient.")
        self.device, self.dtype = first.device, first.dtype
        self.arithmetic = choose("fp32", self.model, data.normalized(slice(2)).to(self.dtype), self.device)
        self.arithmetic.place(self.model, self.device)
        self.model.requires_grad_(False)
        self.parameters = {
            name: parameter.detach().clone().requires_grad_() for name, parameter in self.model.named_parameters()
        }
        self.batch_size = images_at_once(batch_size or (64 if self.device.type == "cpu" else 250), data.images.shape)
        self.ranks = here()
        self.size = sum(parameter.numel() for parameter in self.parameters.values())

    def logits(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) under other parameters."""
        return logits_of(functional_call(self.model, parameters, (images,)), self.model, images)

    def batches(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (B, C, H, W) and labels (B,) of the samples in ``index``."""
        for chunk, images in self.data.batches(index, self.batch_size):
            yield self.arithmetic.order(images.to(self.device, self.dtype)), self.data.labels[chunk].to(self.device)

    def own(self, index: Tensor) -> Tensor:
        """Those of the samples in ``index`` that are this process's, whole batches of them."""
        return index[self.ranks.part(len(index), self.batch_size)]

    def total(self, own: Tensor, index: Tensor) -> Tensor:
        """Sum over the samples in ``index`` of what each process summed over its own."""
        return self.ranks.sum(own, len(index), self.batch_size)

    def gather(self, own: Tensor, index: Tensor) -> Tensor:
        """A row for each sample in ``index``, (n, …), of the rows that each process has of its own."""
        return self.ranks.gather(own, len(index), self.batch_size)

    def flat(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """One vector (P,) of tensors shaped like the parameters."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def unflat(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Tensors shaped like the parameters of one vector (P,)."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        pieces = vector.to(self.dtype).split(sizes)
        return tuple(piece.view_as(p) for piece, p in zip(pieces, self.parameters.values(), strict=True))

    def loss(self, index: Tensor) -> float:
        """J(θ; S), in nats."""
        with torch.no_grad():
            losses = [
                F.cross_entropy(self.logits(self.parameters, images).double(), labels, reduction="sum")
                for images, labels in self.batches(self.own(index))
            ]
        return float(self.total(torch.stack(losses).sum(), index)) / len(index)

    def gradient(self, index: Tensor) -> Tensor:
        """∇J(θ; S), (P,), float64."""
        leaves = tuple(self.parameters.values())
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for images, labels in self.batches(self.own(index)):
            loss = F.cross_entropy(self.logits(self.parameters, images), labels, reduction="sum")
            total += self.flat(torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True))
        return self.total(total, index) / len(index)

    def hessian_product(self, index: Tensor) -> Product:
        """Products v ↦ ∇²J(θ; S)·v, both (P,): the gradient of ⟨∇J, v⟩ (Pearlmutter 1994)."""
        leaves = tuple(self.parameters.values())

        def product(vector: Tensor) -> Tensor:
            direction = self.unflat(vector)
            total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
            for images, labels in self.batches(self.own(index)):
                loss = F.cross_entropy(self.logits(self.parameters, images), labels, reduction="sum")
                gradient = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
                # Where the loss is flat or linear in a parameter its gradient has no graph, and adds nothing.
                pairs = [(g, v) for g, v in zip(gradient, direction, strict=True) if g is not None and g.requires_grad]
                if pairs:
                    total += self.flat(
                        torch.autograd.grad(
                            [g for g, _ in pairs],
                            leaves,
                            grad_outputs=[v for _, v in pairs],
                            materialize_grads=True,
                            allow_unused=True,
                        )
                    )
            return self.total(total, index) / len(index)

        return product

    def ggn_product(self, index: Tensor) -> Product:
        """Products v ↦ G·v, G = mean of Jᵀ(diag(p) − p·pᵀ)J: generalized Gauss–Newton (Schraudolph 2002).

        J (K, P) is the Jacobian of the logits and p (K,) the softmax of a sample.

        Args:
            index: S, sample positions.

        Returns:
            The products, both (P,).
        """
        names = list(self.parameters)
        leaves = tuple(self.parameters.values())

        def product(vector: Tensor) -> Tensor:
            direction = dict(zip(names, self.unflat(vector), strict=True))
            total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
            for images, _ in self.batches(self.own(index)):
                inner = self._logit_curvature_product(images, direction)
                logits = self.logits(self.parameters, images)
                total += self.flat(
                    torch.autograd.grad(logits, leaves, grad_outputs=inner, materialize_grads=True, allow_unused=True)
                )
            return self.total(total, index) / len(index)

        return product

    def _logit_curvature_product(self, images: Tensor, direction: dict[str, Tensor]) -> Tensor:
        """(diag(p) − p·pᵀ)·J·v for each image, (B, K)."""
        frozen = {name: parameter.detach() for name, parameter in self.parameters.items()}
        logits, tangent = torch.func.jvp(lambda theta: self.logits(theta, images), (frozen,), (direction,))[:2]
        p = logits.softmax(1)
        return p * tangent - p * (p * tangent).sum(1, keepdim=True)
