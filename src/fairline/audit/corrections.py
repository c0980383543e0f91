"""Whose accuracy the kept ReLUs carry: a network's affine part, and what the corrections add, by group.

A linearized network is an affine classifier and one correction for each kept ReLU (:mod:`fairline.audit.ablation`). The
paper's story, that minorities need the complex boundary, says that they live on the corrections. Three looks at it:

- all corrections taken out at once: accuracy of the affine part, and the gain to the whole network;
- those of one layer, what lies behind it computed anew: which layers serve whom;
- those of one unit: which units serve whom, by the margin of the true class.

Rows by group and overall:

- ``affine_accuracy``: of the network with every kept ReLU switched off, its surrogate in its place. Affine in the
  image under identity surrogates; otherwise, and where rows ``bends_<function>`` name other functions that stay,
  it is the part without ReLUs.
- ``correction_gain``: the whole network's accuracy less that, with paired limits; ``correction_share``: the same
  in % of the whole network's accuracy.
- ``centred_affine_accuracy`` and ``centred_correction_share``: likewise with each correction's mean in its place,
  not 0: another affine classifier, whose layers meet inputs of the usual size.
- ``reference_affine_accuracy``, ``reference_correction_gain``, …: those of the reference, if there is one.
- ``correction_drop/<layer>``: accuracy lost where this layer's corrections alone are taken out; paired limits.

Rows by group:

- ``correction_service``: what all units do for the true class's margin, to first order, in logits.
- ``units_for_half``: the least number of units that bring half of what helpful units bring to that margin.
- ``units_mainly``: units that give the group twice what they give to all others together.
- ``unit_service/<layer>[c,h,w]``: what the most helpful units do for the margin, in logits.

Rows overall:

- ``corrections``: how many there are; ``layer_corrections/<layer>``: in each layer.
- ``affine_one_class``: the share of images that the affine part gives to its most frequent class.
- ``minority_correction_share_gap`` and ``centred_…``: the smallest groups' mean ``correction_share`` less that of
  the largest group, in points. Which groups those are (:func:`compared`) say rows of groups,
  ``correction_compared``: 1 and −1.
- ``units_one_group``: of the units that help a group, the share that mainly serves one; and
  ``units_one_group_chance``: the same where groups are dealt out at random to the same images.
- ``units_exact``: 1 if every unit was taken out, 0 if its service is a first-order estimate; ``unit_agreement``:
  Spearman's ρ of the two over the groups and units that were tried both ways.

Source: none; see :mod:`fairline.audit.ablation`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit.ablation import Ablation, Services, averaged, part_of
from fairline.audit.accuracy import relative_drop
from fairline.audit.base import Row, Subject, class_name
from fairline.audit.correlation import spearman
from fairline.audit.intervals import Drawn, Floats, draw, mean_interval, percentile_interval, pooled
from fairline.data.grouped import OVERALL, GroupedData
from fairline.errors import FairlineError

logger = logging.getLogger(__name__)

#: Positions of the networks among those drawn: the whole one, its affine part, and that with the corrections' means.
WHOLE, AFFINE, CENTRED = 0, 1, 2

#: Groups of which the whole network gets fewer images right are not compared: a share of so few is noise.
RARELY = 10

#: A unit mainly serves a group to which it gives twice what it gives to all others together.
MAINLY = 2 / 3

#: Units that are named for each network, and units whose first-order estimate is checked by taking them out.
NAMED, CHECKED = 10, 32

#: Random orders of the groups that tell how one-sided units look by chance.
ORDERS = 10


def measure(
    subject: Subject, *, samples: int = 1000, unit_samples: int = 100, exact_units: int | None = None
) -> list[Row]:
    """Rows of the affine part, of what corrections add to it, and of layers and units that do.

    The head of this file says which. The affine part's prediction of each sample becomes the column
    ``affine_prediction``.

    Costs three passes over the data, one over ``samples`` of each group for each layer that keeps a ReLU, and for units
    about three passes over ``unit_samples`` of each group and at most as much as the layers again, or 32 of those.

    Args:
        subject: The model; one without masks keeps all of its ReLUs.
        samples: Of a group that layers are taken out on, and means are over; all if it has no more.
        unit_samples: Of a group that units are measured on.
        exact_units: Take out every unit, one by one, of networks that keep at most so many; by default where that costs
            no more than taking out layers does, and always of those that keep at most 32.

    Returns:
        The rows.

    Raises:
        FairlineError: An option is out of range, or masks cannot reach the network's ReLUs.
    """
    if samples < 1 or unit_samples < 1:
        raise FairlineError(
            f"Corrections need a sample of each group at least, not {samples} samples and {unit_samples} of units."
        )
    if exact_units is not None and exact_units < 0:
        raise FairlineError(f"The option 'exact_units' of corrections is a number from 0, not {exact_units}.")
    ablation = ablation_of(subject)
    rng = np.random.default_rng(subject.seed)
    n = len(subject.data)
    rows = [Row(OVERALL, "corrections", ablation.count, n=n)]
    rows += [Row(OVERALL, f"bends_{name}", count, n=n) for name, count in ablation.bends.items()]
    rows += _of_parts(subject, samples, rng)
    affine, _ = _parts(subject, samples)
    subject.samples["affine_prediction"] = np.array([class_name(subject.data, int(k)) for k in affine], dtype=object)
    if subject.reference is not None:
        others = [row for row in _of_parts(subject.reference, samples, rng) if row.measure in PARTS]
        rows += [Row(row.group, f"reference_{row.measure}", row.value, row.low, row.high, row.n) for row in others]
    if ablation.count:
        rows += _of_layers(subject, samples, rng)
        passes = len(ablation.layers) * len(_sample(subject, samples))
        rows += _of_units(subject, unit_samples, exact_units, passes)
    return rows


#: What a network and its reference have alike.
PARTS = (
    "affine_accuracy",
    "correction_gain",
    "correction_share",
    "centred_affine_accuracy",
    "centred_correction_share",
)


def ablation_of(subject: Subject) -> Ablation:
    """The subject's network, made once."""
    return subject.once("ablation", lambda: Ablation(subject.model, subject.data, subject.device))


def suits(subject: Subject) -> bool:
    """Whether masks reach the network's ReLUs; where they do not, that is logged."""
    try:
        ablation_of(subject)
    except FairlineError as error:
        logger.warning("%s: its corrections are not measured (%s)", subject.name, error)
        return False
    return True


def compared(sizes: Mapping[str, int], right: Mapping[str, float]) -> tuple[list[str], str]:
    """The smallest groups, and the largest.

    The smallest are the smaller half of the groups, those as large as the largest left out, and those of which the
    network gets too few images right for a share of them.

    Args:
        sizes: Training images of each group; of the audited ones where those are not known.
        right: How many of them the whole network gets right.

    Returns:
        Their names; no smallest groups where there is nothing to compare.

    >>> compared({"a": 50, "b": 30, "c": 20, "d": 11, "e": 60}, {"a": 40, "b": 20, "c": 10, "d": 9, "e": 50})
    (['c'], 'e')
    >>> compared({"a": 50, "b": 50}, {"a": 40, "b": 40})
    ([], 'a')
    """
    order = sorted(sizes, key=lambda group: sizes[group])
    largest = max(sizes, key=lambda group: sizes[group])
    small = [g for g in order[: len(order) // 2] if sizes[g] < sizes[largest] and right[g] >= RARELY]
    return (small if right[largest] >= RARELY else []), largest


def _of_parts(subject: Subject, samples: int, rng: np.random.Generator) -> list[Row]:
    """Rows of :data:`PARTS` and what compares groups by them."""
    affine, correct = _parts(subject, samples)
    index = dict(subject.group_index())
    # Without a correction nothing is drawn: the gain is known to be 0.
    draws = subject.resamples if ablation_of(subject).count else 0
    drawn = {name: draw(correct[own], draws, rng) for name, own in index.items()}
    rows = []
    for name, own in index.items():
        rows += _rows_of_parts(name, correct[own], drawn[name])
    rows += _rows_of_parts(OVERALL, correct, pooled(list(drawn.values()), rng))
    one_class = float(torch.bincount(affine).max()) / len(affine)
    rows.append(Row(OVERALL, "affine_one_class", one_class, n=len(affine)))
    right = {name: int(correct[own, WHOLE].sum()) for name, own in index.items()}
    small, largest = compared(subject.sizes or {name: len(own) for name, own in index.items()}, right)
    if not small:
        return rows
    chosen = {name: index[name] for name in (*small, largest)}
    n = sum(map(len, chosen.values()))
    rows += [Row(name, "correction_compared", 1 if name in small else -1, n=len(own)) for name, own in chosen.items()]
    for prefix, network in (("", AFFINE), ("centred_", CENTRED)):
        shares = {name: relative_drop(*correct[own][:, [WHOLE, network]].mean(0)) for name, own in chosen.items()}
        value = float(np.mean([shares[name] for name in small]) - shares[largest])
        spread = {name: _shares(drawn[name], network) for name in chosen}
        limits = _limits(np.mean([spread[name] for name in small], axis=0) - spread[largest])
        rows.append(Row(OVERALL, f"{prefix}minority_correction_share_gap", value, *limits, n))
    return rows


def _parts(subject: Subject, samples: int) -> tuple[Tensor, NDArray[np.bool_]]:
    """What the affine part predicts, int64, (N,), and what whole, affine and centred network get right, (N, 3)."""

    def compute() -> tuple[Tensor, NDArray[np.bool_]]:
        ablation, labels = ablation_of(subject), subject.data.labels.cpu()
        own = subject.predictions
        if not ablation.count:
            return own.logits.argmax(1), np.repeat(own.correct[:, None], 3, axis=1)
        with ablation.without(ablation.kept):
            affine = ablation.logits(subject.data).argmax(1)
        with ablation.centred(part_of(subject.data, _sample(subject, samples))):
            centred = ablation.logits(subject.data).argmax(1)
        return affine, np.stack([own.correct, (affine == labels).numpy(), (centred == labels).numpy()], axis=1)

    return subject.once(("parts", samples), compute)


def _rows_of_parts(name: str, correct: NDArray[np.bool_], drawn: Drawn) -> list[Row]:
    """Rows of one group, or of all images."""
    accuracy, n = correct.mean(0), len(correct)

    def row(measure: str, value: float, draws: Floats) -> Row:
        return Row(name, measure, float(value), *((math.nan, math.nan) if math.isnan(value) else _limits(draws)), n)

    whole, affine = drawn.shares([WHOLE, AFFINE], [1, -1])
    return [
        row("affine_accuracy", accuracy[AFFINE], drawn.shares([AFFINE], [1])[0]),
        row("correction_gain", accuracy[WHOLE] - accuracy[AFFINE], whole - affine),
        row("correction_share", relative_drop(accuracy[WHOLE], accuracy[AFFINE]), _shares(drawn, AFFINE)),
        row("centred_affine_accuracy", accuracy[CENTRED], drawn.shares([CENTRED], [1])[0]),
        row("centred_correction_share", relative_drop(accuracy[WHOLE], accuracy[CENTRED]), _shares(drawn, CENTRED)),
    ]


def _shares(drawn: Drawn, network: int) -> Floats:
    """Drawn shares of the whole network's accuracy that another one lacks, in %, (B,)."""
    return np.asarray(relative_drop(*drawn.shares([WHOLE, network], [1, -1])))


def _limits(draws: Floats) -> tuple[float, float]:
    return percentile_interval(draws) if draws.size else (math.nan, math.nan)


def _of_layers(subject: Subject, samples: int, rng: np.random.Generator) -> list[Row]:
    """Rows of each layer that keeps a ReLU, on a sample of each group."""
    ablation, index = ablation_of(subject), _sample(subject, samples)
    data, n = part_of(subject.data, index), len(index)
    whole, labels, groups = subject.predictions.correct[index], data.labels.cpu(), data.groups.cpu().numpy()
    # Of all images, not of those sampled.
    weights = np.bincount(subject.data.groups.cpu().numpy()) / len(subject.data)
    rows = []
    for position, (layer, kept) in enumerate(ablation.kept.items(), start=1):
        with ablation.without({layer: kept}):
            left = (ablation.logits(data).argmax(1) == labels).numpy()
        drops, draws = [], []
        for group, name in enumerate(data.group_names):
            own = np.stack([whole, left], axis=1)[groups == group]
            before, after = draw(own, subject.resamples, rng).shares([0, 1], [1, -1])
            drops.append(float(own[:, 0].mean() - own[:, 1].mean()))
            draws.append(before - after)
            rows.append(Row(name, f"correction_drop/{layer}", drops[-1], *percentile_interval(draws[-1]), len(own)))
        total, limits = float(weights @ drops), percentile_interval(weights @ np.stack(draws))
        rows.append(Row(OVERALL, f"correction_drop/{layer}", total, *limits, n))
        rows.append(Row(OVERALL, f"layer_corrections/{layer}", int(kept.sum()), n=n))
        subject.report("corrections of layers", position, len(ablation.kept), layer)
    return rows


def _of_units(subject: Subject, samples: int, exact_units: int | None, passes: int) -> list[Row]:
    """Rows of units, on a sample of each group; ``passes`` images may be spent on taking all out one by one."""
    ablation, data = ablation_of(subject), part_of(subject.data, _sample(subject, samples))
    n, count = len(data), ablation.count
    generator = torch.Generator().manual_seed(subject.seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(ORDERS)]
    estimated = ablation.services(data, orders)
    every = count <= CHECKED or (count * n <= passes if exact_units is None else count <= exact_units)
    tried = range(count) if every else _spread(estimated.by_group)

    def seen(done: int) -> None:
        subject.report("corrections of units", done, len(tried))

    taken_out = averaged([(torch.arange(n), ablation.exact(data, tried, seen))], data, orders)
    both = (taken_out.by_group, estimated.by_group[:, list(tried)])
    agreement = float(spearman(*(means.reshape(-1, 1).numpy() for means in both))[0])
    rows = [
        Row(OVERALL, "units_exact", float(every), n=n),
        Row(OVERALL, "unit_agreement", agreement, n=n),
    ]
    groups = data.groups.cpu().numpy()
    for group, name in enumerate(data.group_names):
        total = estimated.total.numpy()[groups == group]
        rows.append(Row(name, "correction_service", float(total.mean()), *mean_interval(total), len(total)))
    return rows + _concentration(taken_out if every else estimated, ablation, data)


def _concentration(services: Services, ablation: Ablation, data: GroupedData) -> list[Row]:
    """Rows of which units serve whom."""
    n, sizes = len(data), torch.bincount(data.groups.cpu()).tolist()
    mainly, share = one_sided(services.by_group)
    chance = float(np.nanmean([one_sided(dealt)[1] for dealt in services.by_chance]))
    rows = [Row(OVERALL, "units_one_group", share, n=n), Row(OVERALL, "units_one_group_chance", chance, n=n)]
    for group, name in enumerate(data.group_names):
        half = units_for_half(services.by_group[group])
        rows.append(Row(name, "units_for_half", half, n=sizes[group]))
        rows.append(Row(name, "units_mainly", int(mainly[group]), n=sizes[group]))
    units = ablation.units()
    for unit in services.by_group.amax(0).topk(min(NAMED, ablation.count)).indices.tolist():
        layer, position = units[unit]
        place = ",".join(str(int(i)) for i in np.unravel_index(position, ablation.layers[layer].shape))
        rows += [
            Row(name, f"unit_service/{layer}[{place}]", float(services.by_group[group, unit]), n=sizes[group])
            for group, name in enumerate(data.group_names)
        ]
    return rows


def one_sided(by_group: Tensor) -> tuple[Tensor, float]:
    """Which units mainly serve one group.

    Args:
        by_group: (A, r): what each unit does for the mean margin of each group.

    Returns:
        Units that give a group twice what they give to all others together, int64, (A,); and how many those are of all
        that help any group, NaN if none does.

    >>> one_sided(torch.tensor([[3.0, 1.0, -1.0], [1.0, 1.0, -2.0]]))
    (tensor([1, 0]), 0.5)
    """
    helps = by_group.clamp_min(0)
    total = helps.sum(0)
    mainly = ((helps > MAINLY * total) & (total > 0)).sum(1)
    helpful = int((total > 0).sum())
    return mainly, float(mainly.sum()) / helpful if helpful else math.nan


def units_for_half(service: Tensor) -> int:
    """The least number of units that bring half of what all helpful units bring.

    Args:
        service: (r,): what each does for a margin.

    Returns:
        The number; 0 if none helps.

    >>> units_for_half(torch.tensor([5.0, -9.0, 2.0, 1.0, 3.0]))
    2
    """
    bring = service.clamp_min(0).sort(descending=True).values.cumsum(0)
    return int((bring < bring[-1] / 2).sum()) + 1 if bring[-1] > 0 else 0


def _spread(by_group: Tensor) -> list[int]:
    """Units to check, from the most helpful one down through all ranks."""
    order = by_group.amax(0).argsort(descending=True, stable=True)
    places = torch.linspace(0, len(order) - 1, min(CHECKED, len(order))).round().long()
    return [int(unit) for unit in order[places]]


def _sample(subject: Subject, samples: int) -> Tensor:
    """Positions of up to so many images of each group."""
    return torch.cat(subject.data.sample_by_group(samples, subject.seed)).cpu()
