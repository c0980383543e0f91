"""Appendix A.1 on data: what convergence says of the groups' gradient norms, with two groups and with more."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from fairline.audit.functional import Functional
from fairline.audit.gradients import GroupGradients, group_gradients
from fairline.data.grouped import GroupedData


def converged_regression(data: GroupedData, pool: int = 4) -> nn.Sequential:
    """A softmax regression on pooled pixels at the minimum of its loss, found by L-BFGS in float64.

    Its loss is convex, so a vanishing gradient is the minimum, which a deep network never reaches exactly.

    Args:
        data: What to fit. Classes that a linear function separates would put the minimum at infinity; pooling keeps
            enough mistakes.
        pool: Side of the squares of pixels that are averaged.

    Returns:
        The network, float64.
    """
    _, channels, height, width = data.images.shape
    features = channels * (height // pool) * (width // pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(features, data.num_classes)).double()
    images, labels = data.normalized().double().cpu(), data.labels.cpu()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=20_000, history_size=50, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(model(images), labels)
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return model


def gradient_balance(model: nn.Module, data: GroupedData) -> tuple[pd.DataFrame, GroupGradients]:
    """Gradient norms of the groups beside what Appendix A.1 makes of their sizes.

    Args:
        model: At a minimum of the loss over ``data``, for the claim to apply.
        data: What it was trained on.

    Returns:
        One row a group: ``n``, ``gradient_norm``, ``gradient_share`` (½ for both of two groups at a minimum),
        ``ratio`` (‖gₐ‖ over that of the largest group) and ``inverse_size`` (size of the largest group over |Sᵃ|,
        which the ratio equals with two groups); and the gradients, whose ``residual`` is 0 at a minimum.
    """
    found = group_gradients(Functional(model, data))
    largest = int(found.n.argmax())
    table = pd.DataFrame(
        {
            "n": found.n,
            "gradient_norm": found.norm,
            "gradient_share": found.share,
            "ratio": found.norm / found.norm[largest],
            "inverse_size": found.n[largest] / found.n,
        },
        index=pd.Index(data.group_names, name="group"),
    )
    return table, found


def two_groups(data: GroupedData) -> GroupedData:
    """The same samples in two groups: those of the larger and those of the smaller half of the groups."""
    sizes = torch.bincount(data.groups, minlength=data.num_groups)
    rare = torch.zeros(data.num_groups, dtype=torch.bool)
    rare[sizes.cpu().argsort(stable=True)[: data.num_groups // 2]] = True
    return replace(data, groups=rare.long().to(data.groups.device)[data.groups], group_names=("frequent", "rare"))


def check(data: GroupedData) -> pd.DataFrame:
    """:func:`gradient_balance` of one converged regression with two groups and with all groups of the data.

    Returns:
        Its rows, with the columns ``groups`` (how many) and ``group``.
    """
    model = converged_regression(data)
    tables = []
    for grouped in (two_groups(data), data):
        table, found = gradient_balance(model, grouped)
        tables.append(table.reset_index().assign(groups=grouped.num_groups, residual=found.residual))
    return pd.concat(tables, ignore_index=True)
