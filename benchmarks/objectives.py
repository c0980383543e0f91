"""A finetune epoch under every objective, and every repair after training, against an epoch of plain distillation.

Each epoch is the second, in which Algorithm 1's multipliers act; the teacher's logits are computed before the first.
"lagrangian, sampled" updates the multipliers on 200 images a group instead of the whole training set. Repairs after
training choose their strength on the validation part.

    python benchmarks/objectives.py [--width 8] [--images 2560] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable

import torch
from _ratio import device_name, interleaved
from torch import nn

import fairline as fl
from fairline.data import GroupedData
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.objectives import (
    ARL,
    ERM,
    LDAM,
    AdaAlpha,
    AdaMargin,
    BalancedKD,
    Chi2DRO,
    GroupDRO,
    GroupDrop,
    Lagrangian,
    LogitAdjust,
    LongTailKD,
    Objective,
    Reweighting,
)
from fairline.training import run_epochs

OBJECTIVES = {
    "erm": ERM,
    "lagrangian": lambda: Lagrangian(mu=0.1),
    "lagrangian, sampled": lambda: Lagrangian(mu=0.1, samples=200),
    "lagrangian, released": lambda: Lagrangian(mu=0.1, released=True),
    "drop": GroupDrop,
    "group_dro": GroupDRO,
    "chi2_dro": Chi2DRO,
    "arl": ARL,
    "reweighting": Reweighting,
    "logit_adjust": LogitAdjust,
    "logit_adjust, both": lambda: LogitAdjust(teacher="adjusted"),
    "balanced_kd": BalancedKD,
    "ada_alpha": AdaAlpha,
    "ada_margin": AdaMargin,
    "long_tail_kd": LongTailKD,
    "ldam": lambda: LDAM(defer=0.5),
}

#: Network, training and validation part → anything.
AFTER: dict[str, Callable[[nn.Module, GroupedData, GroupedData], object]] = {
    "adjust": fl.adjust,
    "adjust, tau_norm": lambda network, train, val: fl.adjust(network, train, val, method="tau_norm"),
    "adjust, weight_scale": lambda network, train, val: fl.adjust(network, train, val, method="weight_scale"),
    "last layer": lambda network, train, val: fl.retrain_last_layer(network, val),
    "AFR": lambda network, train, val: fl.reweight_last_layer(network, val),
    "SELF": lambda network, train, val: fl.finetune_last_layer(network, val),
}


def epoch(student: nn.Module, teacher: nn.Module, parts: tuple[GroupedData, ...], objective: Objective) -> float:
    """Seconds of the second epoch, validation included."""
    model = copy.deepcopy(student)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    epochs = run_epochs(
        model, *parts, epochs=2, optimizer=optimizer, objective=objective, teacher=teacher, batch_size=128
    )
    return [done.seconds for done in epochs][-1]


def after(repair: Callable[..., object], student: nn.Module, parts: tuple[GroupedData, GroupedData]) -> float:
    """Seconds of a repair."""
    network = copy.deepcopy(student)
    begun = time.perf_counter()
    repair(network, *parts)
    return time.perf_counter() - begun


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("fairline").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.43, 0.19, 0.17, 0.14, 0.07])
    groups = torch.multinomial(shares, arguments.images, replacement=True, generator=generator)
    images = torch.randint(0, 256, (arguments.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    names = tuple("abcde")
    data = GroupedData(images, groups, groups.clone(), names, names)
    teacher = build("resnet18", 5, width=arguments.width)
    student = mask_relus(teacher, data.normalized(slice(2)))
    for layer in masked_relus(student).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.1)
    held_out = data.select(torch.arange(max(100, arguments.images // 9)))
    steps = {
        name: lambda make=make: epoch(student, teacher, (data, held_out), make()) for name, make in OBJECTIVES.items()
    }
    steps |= {name: lambda repair=repair: after(repair, student, (data, held_out)) for name, repair in AFTER.items()}
    median = interleaved(steps, arguments.rounds)
    print(f"ResNet-18 width {arguments.width}, {arguments.images} images, {device_name()}, torch {torch.__version__}")
    for name in OBJECTIVES:
        print(f"finetune epoch, {name + ' / erm:':28} {median[name] / median['erm']:.2f}")
    for name in AFTER:
        print(f"after training, {name + ' / an epoch of erm:':38} {median[name] / median['erm']:.2f}")


if __name__ == "__main__":
    main()
