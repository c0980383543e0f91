"""SNL's mask learning as straightforwardly as it can be written (Cho et al. 2022, Algorithm 1, lines 1–10).

A DataLoader, the teacher recomputed at each step, and m·relu(x) + (1 − m)·x through autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from tests.reference.masking import masked_relu


class SoftMask(nn.Module):
    """A ReLU with a learned mask, by the written-out formula."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return masked_relu(x, self.alpha)

    def sparsity(self) -> Tensor:
        return self.alpha.abs().sum()

    def count(self, threshold: float) -> int:
        return int((self.alpha > threshold).sum())

    def after_step(self) -> None:
        """Nothing follows the mask."""


class _Orders(Sampler[int]):
    """Yields given orders, one an epoch."""

    def __init__(self, orders: list[list[int]]) -> None:
        self.orders = iter(orders)
        self.length = len(orders[0])

    def __iter__(self):
        return iter(next(self.orders))

    def __len__(self) -> int:
        return self.length


def learn_masks(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    lam: float,
    growth: float = 1.1,
    patience: int = 5,
    threshold: float = 1e-2,
    temperature: float = 4.0,
    orders: list[list[int]],
    make: Callable[[Sequence[int]], nn.Module] = SoftMask,
    optimize: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> tuple[nn.Module, list[int], list[float]]:
    """Learn masks on a Sequential of plain modules.

    Returns:
        The student, and after each epoch the number of ReLUs and λ.
    """
    student = copy.deepcopy(teacher)
    shapes = {}
    x = images[:2]
    for name, module in teacher.eval().named_children():
        x = module(x)
        shapes[name] = x.shape[1:]
    for name, module in teacher.named_children():
        if isinstance(module, nn.ReLU):
            student.set_submodule(name, make(shapes[name]))
    layers = [module for module in student.modules() if hasattr(module, "sparsity")]
    optimizer = torch.optim.Adam(student.parameters(), lr=lr) if optimize is None else optimize(student)
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, sampler=_Orders(orders))
    lowest = sum(layer.alpha.numel() for layer in layers)
    counts, lambdas = [], []
    for epoch in range(epochs):
        student.train()
        for inputs, targets in loader:
            output = student(inputs)
            with torch.no_grad():
                teacher_output = teacher(inputs)
            ce = F.cross_entropy(output, targets)
            kd = (
                F.kl_div(
                    F.log_softmax(output / temperature, 1),
                    F.softmax(teacher_output / temperature, 1),
                    reduction="batchmean",
                )
                * temperature**2
            )
            loss = ce + kd + lam * sum(layer.sparsity() for layer in layers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for layer in layers:
                layer.after_step()
        count = sum(layer.count(threshold) for layer in layers)
        if count < lowest:
            lowest = count
        elif epoch >= patience:
            lam *= growth
        counts.append(count)
        lambdas.append(lam)
        if after_epoch is not None:
            after_epoch(count, lam)
    return student, counts, lambdas
