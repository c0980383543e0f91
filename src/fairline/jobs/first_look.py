"""Weights that are taken as they are, looked at before anything is built on them.

Accuracy on the validation part, and what commonly lowers it: outputs in another order, and pixels on another scale. And
whether private inference knows every operator of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fairline._io import write_json, write_text
from fairline.data import IMAGENET
from fairline.data.grouped import OVERALL, GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.private import to_graph

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

#: Chance that a warning is for nothing.
LEVEL = 0.001
#: Another reading of the outputs or pixels is told of if it is right about so many more images, as a share.
MUCH = 0.05
#: Classes that a sentence names.
_NAMED = 10


@dataclass(frozen=True)
class Reading:
    """One way to feed a network and to read its outputs.

    Attributes:
        scale: The option that gives its pixels' scale; empty for the run's.
        permuted: Whether its outputs are those of other classes.
        correct: bool, (N,): which images it gets right.
        order: The class of each output.
    """

    scale: str
    permuted: bool
    correct: Bools
    order: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of images that are right."""
        return float(self.correct.mean())


def first_look(
    network: nn.Module, parts: Mapping[str, GroupedData], device: torch.device, part: str = "val"
) -> dict[str, Any]:
    """Measure a network whose weights were brought from elsewhere.

    Args:
        network: Maps (B, C, H, W) to (B, K).
        parts: Of the data, ``train`` among them.
        device: Where to compute.
        part: The one to measure on.

    Returns:
        Plain JSON: ``accuracy`` by group and ``recall`` by class, each with ``n``; ``warnings``, sentences; ``order``,
        the classes as the outputs look like, where those look permuted; ``export``, a sentence, and ``exports``.
    """
    data = parts[part]
    # Another scale to try, whatever they are normalised by.
    measured = replace(parts["train"], mean=None, std=None).normalization()
    outputs = _outputs(network, data, device)
    labels = data.labels.cpu().numpy()
    right = outputs == labels
    found: dict[str, Any] = {
        "part": part,
        "image_size": list(data.images.shape[2:]),
        "mean": list(data.normalization()[0]),
        "std": list(data.normalization()[1]),
        "accuracy": {OVERALL: _share(right), **_shares(right, data.groups.cpu().numpy(), data.group_names)},
        "recall": _shares(right, labels, data.class_names),
        "order": None,
    }
    warnings = [_chance(outputs, labels, data)]
    start, best = _best(network, data, device, outputs, measured)
    if best is not start:
        warnings.append(_told(start, best, data))
        found["order"] = list(best.order) if best.permuted else None
    found["warnings"] = [sentence for sentence in warnings if sentence]
    return found | exported(network, data)


def exported(network: nn.Module, data: GroupedData) -> dict[str, Any]:
    """Whether the graph that private inference and the compiler need can be made of a network.

    Args:
        network: The network.
        data: Whose images it takes.

    Returns:
        ``exports``, and ``export``, which says it in a sentence, with what stands in the way.
    """
    try:
        graph = to_graph(network, torch.zeros(1, *data.images.shape[1:]))
    except FairlineError as error:
        return {"exports": False, "export": f"It cannot be exported for private inference yet: {error}"}
    told = f"It can be exported for private inference: {len(graph.nodes)} operators, {graph.relus:,} ReLUs an image."
    return {"exports": True, "export": told}


def write_first_look(folder: Path, found: Mapping[str, Any]) -> None:
    """Write what was found, and the order that the outputs look like as a file for ``--classes``.

    Args:
        folder: Of the run.
        found: By :func:`first_look`.
    """
    if found["order"]:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in found["order"]))
    write_json(folder / "first_look.json", found)


def _outputs(network: nn.Module, data: GroupedData, device: torch.device) -> Ints:
    """The largest output of each image."""
    chosen: Ints = predict(network, data, device=device).argmax(1).cpu().numpy()
    return chosen


def _share(right: Bools) -> dict[str, Any]:
    # A class may have no image in the part.
    return {"value": float(right.mean()) if len(right) else None, "n": len(right)}


def _shares(right: Bools, index: Ints, names: Sequence[str]) -> dict[str, Any]:
    return {name: _share(right[index == place]) for place, name in enumerate(names)}


def _chance(outputs: Ints, labels: Ints, data: GroupedData) -> str:
    """A warning, if predictions that know nothing of the image would be right as often."""
    from scipy.stats import binomtest

    count = max(int(outputs.max()) + 1, data.num_classes)
    said, true = (np.bincount(each, minlength=count) / len(labels) for each in (outputs, labels))
    # What names each class as often as the network, at random; all one class, if it names but one.
    expected = float(said @ true)
    hits = int((outputs == labels).sum())
    test = binomtest(hits, len(labels), min(expected, 1.0), alternative="greater")
    if test.pvalue <= LEVEL:
        return ""
    return (
        f"An accuracy of {hits / len(labels):.1%} is near chance: naming classes at random, each as often as the "
        f"network does, gives {expected:.1%} (binomial test, {len(labels):,} images, p = {test.pvalue:.2g})."
    )


def _best(
    network: nn.Module,
    data: GroupedData,
    device: torch.device,
    outputs: Ints,
    measured: tuple[Sequence[float], Sequence[float]],
) -> tuple[Reading, Reading]:
    """How the network was read, and how it should be: the same, unless another way is much better."""
    readings = _readings(outputs, data, "")
    start = best = readings[0]
    for option, mean, std in _scales(data, measured):
        other = _outputs(network, replace(data, mean=mean, std=std), device)
        readings += _readings(other, data, option)
    while True:
        better = [each for each in readings if _much_better(each, best)]
        # One change at a time, so that none is told of that adds nothing.
        near = [each for each in better if (each.scale == best.scale) != (each.permuted == best.permuted)]
        if not better:
            return start, best
        best = max(near or better, key=lambda each: each.accuracy)


def _scales(
    data: GroupedData, measured: tuple[Sequence[float], Sequence[float]]
) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Common scales of pixels that are not the data's: option, mean and deviation."""
    channels = data.images.shape[1]
    common = [
        ("--normalization data", *measured),
        ("--normalization none", (0.0,) * channels, (1.0,) * channels),
        ("--mean 0.5 --std 0.5", (0.5,) * channels, (0.5,) * channels),
        # Pixels from 0 to 255.
        (f"--mean 0 --std {1 / 255:.8f}", (0.0,) * channels, (1 / 255,) * channels),
    ]
    if channels == 3:
        common.insert(0, ("--normalization imagenet", *IMAGENET))
    scales = [(option, tuple(mean), tuple(std)) for option, mean, std in common]
    return [each for each in scales if not np.allclose(each[1:], data.normalization(), atol=1e-6)]


def _readings(outputs: Ints, data: GroupedData, scale: str) -> list[Reading]:
    """The outputs as they are, and in the order that agrees most with the labels."""
    labels, names = data.labels.cpu().numpy(), data.class_names
    plain = Reading(scale, False, outputs == labels, names)
    if outputs.max() >= len(names) or len(names) < 2:
        return [plain]
    # An order is judged on images that it was not found on.
    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    correct = np.empty(len(labels), dtype=np.bool_)
    for one in (half, ~half):
        order = _order(outputs[one], labels[one], len(names))
        correct[~one] = order[outputs[~one]] == labels[~one]
    order = _order(outputs, labels, len(names))
    return [plain, Reading(scale, True, correct, tuple(names[label] for label in order))]


def _order(outputs: Ints, labels: Ints, classes: int) -> Ints:
    """The label of each output, one each, that agrees with most images."""
    from scipy.optimize import linear_sum_assignment

    agree = np.bincount(outputs * classes + labels, minlength=classes * classes).reshape(classes, classes)
    # Where nothing speaks for another, an output keeps its label.
    order: Ints = linear_sum_assignment(agree + np.eye(classes) / (2 * classes), maximize=True)[1]
    return order


def _much_better(one: Reading, other: Reading) -> bool:
    """McNemar's exact test on the same images, and a difference that matters."""
    from scipy.stats import binomtest

    won, lost = int((one.correct & ~other.correct).sum()), int((other.correct & ~one.correct).sum())
    if won - lost < MUCH * len(one.correct):
        return False
    return bool(binomtest(won, won + lost, alternative="greater").pvalue < LEVEL)


def _told(start: Reading, best: Reading, data: GroupedData) -> str:
    """What would be much better, and what to do for it."""
    gain = f"{best.accuracy:.1%} of these images would be right, not {start.accuracy:.1%}"
    if not best.permuted:
        return f"The network looks trained on pixels of another scale: with {best.scale}, {gain}."
    moved = [
        f"output {place} looks like '{name}'"
        for place, (name, own) in enumerate(zip(best.order, data.class_names, strict=True))
        if name != own
    ]
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    shown = ", ".join(moved[:_NAMED]) + more
    also = f", and the pixels of another scale ({best.scale})" if best.scale else ""
    return (
        f"The outputs look permuted{also}: {shown}; so {gain}. Pass --classes FILE with this order: "
        f"{', '.join(best.order[:_NAMED])}{', …' if len(best.order) > _NAMED else ''}."
    )
