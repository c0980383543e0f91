"""Figure 2 of the paper, over many seeds: what half the ReLUs cost a majority and a minority of 2-D points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fairline.audit.intervals import student_interval
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus

VARIANTS = ("all ReLUs", "half of the ReLUs")
GROUPS = ("majority", "minority")


def boundary(x: Tensor) -> Tensor:
    """The true boundary: the minority lies above it. x in [−1, 1]."""
    return 0.35 + 0.45 * torch.cos(2.5 * math.pi * x)


def sample(majority: int, minority: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points drawn uniformly from [−1, 1]² on either side of the boundary.

    Args:
        majority: Points below it, label 0.
        minority: Points above it, label 1.
        generator: Source of randomness.

    Returns:
        Points (N, 2) and labels (N,), float32.
    """
    sides: list[list[Tensor]] = [[], []]
    missing = [majority, minority]
    while max(missing) > 0:
        points = 2 * torch.rand(4 * (majority + minority), 2, generator=generator) - 1
        above = points[:, 1] > boundary(points[:, 0])
        for side, chosen in enumerate((points[~above], points[above])):
            sides[side].append(chosen[: max(missing[side], 0)])
            missing[side] -= len(chosen)
    points = torch.cat([torch.cat(sides[0]), torch.cat(sides[1])])
    return points, torch.cat([torch.zeros(majority), torch.ones(minority)])


def network(seed: int, width: int, depth: int) -> nn.Sequential:
    """A ReLU network 2 → width → … → 1 with ``depth`` hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [2, *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 1))


def linearized(model: nn.Sequential, share: float = 0.5) -> nn.Module:
    """The same network, with the last ``share`` of the ReLUs of each layer replaced by the identity."""
    cut = mask_relus(model, torch.zeros(2, 2))
    for layer in masked_relus(cut).values():
        width = layer.shape[0]
        layer.set_mask(torch.arange(width) < width - round(share * width))
    return cut


@dataclass(frozen=True, eq=False)
class Toy:
    """What the experiment found.

    Attributes:
        accuracy: One row a (seed, variant): ``global``, ``majority``, ``minority``, in [0, 1], on new points.
        grid: (G,): coordinates of the grid on either axis.
        shares: Variant → (G, G): share of seeds whose network calls a point (row x₂, column x₁) minority.
        points: Training points of the first seed: ``x1``, ``x2``, ``group``.
    """

    accuracy: pd.DataFrame
    grid: NDArray[np.float64]
    shares: dict[str, NDArray[np.float64]]
    points: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """What :meth:`from_tables` needs: ``accuracy``, ``points``, and the maps, long, as ``map``."""
        x2, x1 = np.meshgrid(self.grid, self.grid, indexing="ij")
        maps = [
            pd.DataFrame({"variant": variant, "x1": x1.ravel(), "x2": x2.ravel(), "share": shares.ravel()})
            for variant, shares in self.shares.items()
        ]
        return {"accuracy": self.accuracy, "points": self.points, "map": pd.concat(maps, ignore_index=True)}

    @classmethod
    def from_tables(cls, accuracy: pd.DataFrame, points: pd.DataFrame, map: pd.DataFrame) -> Toy:
        """The experiment that :meth:`tables` wrote down."""
        grid = np.unique(map["x1"].to_numpy())
        shares = {
            str(variant): part["share"].to_numpy().reshape(len(grid), len(grid))
            for variant, part in map.groupby("variant", sort=False)
        }
        return cls(accuracy, grid, shares, points)

    def summary(self) -> pd.DataFrame:
        """Mean over seeds with its 95 % t interval, a (variant, measure); and the paired difference between variants.

        Returns:
            Columns ``variant`` (a variant or ``"difference"``), ``measure``, ``mean``, ``low``, ``high``, ``seeds``.
        """
        wide = self.accuracy.pivot_table(index="seed", columns="variant")
        rows = []
        for measure in ("global", *GROUPS):
            columns = {variant: wide[measure][variant].to_numpy() for variant in VARIANTS}
            columns["difference"] = columns[VARIANTS[1]] - columns[VARIANTS[0]]
            rows += [
                (variant, measure, float(values.mean()), *student_interval(values), len(values))
                for variant, values in columns.items()
            ]
        return pd.DataFrame(rows, columns=["variant", "measure", "mean", "low", "high", "seeds"])


def run(
    seeds: int = 100,
    *,
    majority: int = 1000,
    minority: int = 100,
    width: int = 8,
    depth: int = 2,
    steps: int = 2000,
    lr: float = 0.01,
    grid: int = 60,
    seen: Callable[[int, int], None] | None = None,
) -> Toy:
    """Train networks with all and with half of their ReLUs from scratch, on the same points and the same start.

    Every seed draws its own training points and its own initial weights; both variants share them. Training is
    full-batch Adam on binary cross-entropy. Accuracies are on 10,000 new points of each group; ``global`` weighs
    them as the training set does.

    Args:
        seeds: How many, two at least.
        majority: Training points of the majority.
        minority: Of the minority.
        width: Units of each hidden layer.
        depth: Hidden layers.
        steps: Of training.
        lr: Learning rate.
        grid: Points a side of the map.
        seen: Told after some steps how many are done, and of how many.

    Returns:
        Accuracies and maps.

    Raises:
        FairlineError: Fewer than two seeds, or a group without points.
    """
    if seeds < 2:
        raise FairlineError(f"An interval over seeds needs two of them at least, not {seeds}.")
    if majority < 1 or minority < 1:
        raise FairlineError(f"Both groups need a training point, not {majority} and {minority}.")
    draws = [sample(majority, minority, torch.Generator().manual_seed(1000 + seed)) for seed in range(seeds)]
    points, labels = torch.stack([p for p, _ in draws]), draws[0][1]
    starts = [network(seed, width, depth) for seed in range(seeds)]
    axis = torch.linspace(-1, 1, grid)
    lattice = torch.cartesian_prod(axis, axis).flip(1)  # (x₁, x₂), x₂ by row
    tables, shares = [], {}
    for position, variant in enumerate(VARIANTS):
        template = starts[0] if position == 0 else linearized(starts[0])

        def progress(done: int, offset: int = position * steps) -> None:
            if seen is not None:
                seen(offset + done, 2 * steps)

        predict = _train(template, starts, points, labels, steps, lr, progress)
        tables.append(_accuracy(predict, majority, minority).assign(variant=variant))
        shares[variant] = (predict(lattice) > 0).double().mean(0).view(grid, grid).numpy()
    accuracy = pd.concat(tables, ignore_index=True)[["seed", "variant", "global", *GROUPS]]
    return Toy(accuracy, axis.double().numpy(), shares, _as_table(points[0], labels))


def _accuracy(predict: Callable[[Tensor], Tensor], majority: int, minority: int) -> pd.DataFrame:
    """Of the networks of all seeds on new points, 10,000 of each group; ``global`` weighs them as in training."""
    fresh, truth = sample(10_000, 10_000, torch.Generator().manual_seed(999))
    right = (predict(fresh) > 0) == (truth > 0.5)
    rows = []
    for seed, own in enumerate(right):
        group = [float(own[truth == side].float().mean()) for side in (0, 1)]
        rows.append((seed, (majority * group[0] + minority * group[1]) / (majority + minority), *group))
    return pd.DataFrame(rows, columns=["seed", "global", *GROUPS])


def _as_table(points: Tensor, labels: Tensor) -> pd.DataFrame:
    return pd.DataFrame({"x1": points[:, 0], "x2": points[:, 1], "group": [GROUPS[int(y)] for y in labels.tolist()]})


def _train(
    template: nn.Module,
    starts: Sequence[nn.Module],
    points: Tensor,
    labels: Tensor,
    steps: int,
    lr: float,
    progress: Callable[[int], None],
) -> Callable[[Tensor], Tensor]:
    """Train copies of ``template`` from all starts at once, on ``points[i]`` each; returns x (N, 2) ↦ logits (S, N)."""
    weights = [dict(start.named_parameters()) for start in starts]
    parameters = {
        name: torch.stack([own[name].detach() for own in weights]).requires_grad_()
        for name, _ in template.named_parameters()
    }

    def forward(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(template, theta, (x,))
        return out[:, 0]

    together = torch.func.vmap(forward, in_dims=(0, 0))
    optimizer = torch.optim.Adam(parameters.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        logits = together(parameters, points)
        # Summed over networks: each one's gradient is that of its own mean loss.
        loss = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none").mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            progress(step)

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.func.vmap(forward, in_dims=(0, None))(parameters, x)

    return predict
