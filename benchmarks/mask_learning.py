"""An epoch of mask learning against a plain epoch of distillation of the same network with its ReLUs untouched.

Both go through the same training loop with the teacher's logits computed once, so the ratio is what masks cost. AutoReP
is shown with both surrogates; SENet's epoch is one of its second stage, with the comparison of activations after it.

    python benchmarks/mask_learning.py [--width 16] [--images 2560] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import logging
import time

import torch
from _ratio import device_name, interleaved
from torch import nn
from torch.optim import SGD

from fairline import SNL, AutoReP, SENet
from fairline.data import GroupedData
from fairline.inference import predict
from fairline.linearize import Linearizer
from fairline.models import build
from fairline.objectives import ERM
from fairline.training import Progress, run_epochs


class Between:
    """Seconds from one epoch's first batch to the next one's: all that an epoch costs, with what follows it."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.times: list[float] = []

    def __call__(self, update: Progress) -> None:
        """Note the time of each epoch's first batch."""
        if (update.done - 1) % self.batches == 0:
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of the last whole epoch."""
        return self.times[-1] - self.times[-2]


def plain(teacher: nn.Module, data: GroupedData, device: str, batches: int) -> float:
    """Seconds of an epoch of distillation without masks."""
    student, clock = copy.deepcopy(teacher), Between(batches)
    optimizer = SGD(student.parameters(), lr=1e-3, momentum=0.9)
    for _ in run_epochs(
        student, data, epochs=2, optimizer=optimizer, objective=ERM(), teacher=teacher, device=device, progress=clock
    ):
        pass
    return clock.seconds


def learning(method: Linearizer, teacher: nn.Module, data: GroupedData, device: str, batches: int) -> float:
    """Seconds of an epoch of mask learning."""
    clock = Between(batches)
    list(method.linearize(teacher, data, [0.0], device=device, progress=clock))
    return clock.seconds


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("fairline").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (arguments.images,), generator=generator)
    images = torch.randint(0, 256, (arguments.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    names = tuple(map(str, range(10)))
    data = GroupedData(images, labels, labels.clone(), names, names)
    teacher = build("resnet18", 10, width=arguments.width)
    predict(teacher, data.select(torch.arange(10)), device=torch.device(device))
    batches = -(-arguments.images // 256)
    senet = {"sensitivity_epochs": 1, "mask_epochs": 2, "tolerance": 0.0, "epochs": 0, "samples": 200}
    methods = {
        "SNL": lambda: SNL(max_epochs=2, batch_size=256),
        "AutoReP, identity": lambda: AutoReP(max_epochs=2, batch_size=256, surrogate="identity"),
        "AutoReP, quadratic": lambda: AutoReP(max_epochs=2, batch_size=256),
        "SENet": lambda: SENet(**senet),
    }
    steps = {"plain": lambda: plain(teacher, data, device, batches)}
    for name, make in methods.items():
        steps[name] = lambda make=make: learning(make(), teacher, data, device, batches)
    median = interleaved(steps, arguments.rounds)
    print(f"ResNet-18 width {arguments.width}, {arguments.images} images, {device_name()}, torch {torch.__version__}")
    for name in methods:
        print(f"mask learning / plain distillation, {name}: {median[name] / median['plain']:.2f}")


if __name__ == "__main__":
    main()
