"""What explains a disparity, against the obvious ways to compute it.

    python benchmarks/explain.py [--run RUN] [--rounds 3]

RUN is the folder of a finished train, linearize or finetune run, whose network with the fewest ReLUs is used, with the
test part; without it a small network is trained on digits for a few seconds. Prints ratios:

- gradient norms of all groups / one forward and backward pass over the same images, for several numbers of groups;
- power iteration as PyHessian runs it (random start, stop at a relative change of 1e-3) / fairline's Lanczos at its
  default tolerance of 1 %, for all groups with the same Hessian products, and the error of both;
- first-order distances / K − 1 forward and backward passes;
- peak memory of a Hessian product over eight times the images / over the images.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from _ratio import device_name, interleaved, timed
from torch import nn

import fairline as fl
from fairline.audit.boundary import first_order_distances
from fairline.audit.curvature import group_curvature
from fairline.audit.functional import Functional
from fairline.audit.gradients import group_gradients
from fairline.audit.lanczos import largest_eigenvalue, start_vector
from fairline.data import GroupedData
from fairline.runs import Run, load_network


def trained(run: str | None) -> tuple[nn.Module, GroupedData]:
    """A network and data that it was not trained on."""
    if run is not None:
        folder = Run.read(run, "train", "linearize", "finetune")
        # Most ReLUs first.
        return load_network(list(folder.networks().values())[-1])[0], folder.base().data.load()[1]["test"]
    train, val, test = fl.data.load("digits").split(seed=0)
    model = fl.models.build("cnn", train.num_classes, train.images.shape[1], train.images.shape[-1], width=8)
    fl.train(model, train, val, epochs=20, batch_size=64, lr=0.05, seed=0)
    return model, test


def one_pass(functional: Functional) -> None:
    """Forward and backward over all images, as an epoch without steps."""
    model = functional.model.requires_grad_(True)
    model.zero_grad()
    for images, labels in functional.batches(torch.arange(len(functional.data))):
        F.cross_entropy(model(images), labels).backward()
    model.requires_grad_(False)


def power_iteration(product, start: torch.Tensor, tolerance: float = 1e-3) -> tuple[float, int]:
    """Eigenvalue and products."""
    vector, value, count = start, None, 0
    while True:
        image = product(vector).to(vector.dtype)
        newer, count = float(image @ vector), count + 1
        vector = image / image.norm()
        if value is not None and abs(newer - value) <= tolerance * (abs(value) + 1e-6):
            return newer, count
        value = newer


def gradient_norms(model: nn.Module, data: GroupedData, rounds: int) -> None:
    steps = {"pass": lambda: timed(lambda: one_pass(Functional(model, data)))}
    for count in (2, 5, 20):
        groups = torch.arange(len(data)) % count
        regrouped = replace(data, groups=groups.to(data.device), group_names=tuple(map(str, range(count))))
        functional = Functional(model, regrouped)
        steps[f"{count} groups"] = lambda f=functional: timed(lambda: group_gradients(f))
    times = interleaved(steps, rounds)
    for name, seconds in times.items():
        if name != "pass":
            print(f"gradient norms of {name} / one pass: {seconds / times['pass']:.2f}")


def curvature(model: nn.Module, data: GroupedData) -> None:
    functional = Functional(model, data)
    seconds = {"power": 0.0, "ours": 0.0}
    worst = {"power": 0.0, "ours": 0.0}
    for group, name in enumerate(data.group_names):
        index = torch.nonzero(data.groups == group).flatten()
        product = functional.hessian_product(index)
        start = start_vector(functional.size, 1, functional.device, functional.dtype)
        found: dict[str, tuple[float, int]] = {}

        def power(product=product, start=start, found=found) -> None:
            found["power"] = power_iteration(product, start)

        def ours(index=index, found=found) -> None:
            result = group_curvature(functional, index)
            found["ours"] = result.value, result.products

        product(start)  # warms up
        for method, step in (("power", power), ("ours", ours)):
            seconds[method] += timed(step)
        exact = largest_eigenvalue(product, start, tolerance=1e-4).value
        errors = {method: abs(value / exact - 1) for method, (value, _) in found.items()}
        worst = {method: max(worst[method], errors[method]) for method in worst}
        print(
            f"  {name} ({len(index)} images): λ_max {exact:.4g}; power iteration {found['power'][1]} products, "
            f"error {errors['power']:.1e}; fairline {found['ours'][1]} over the group, error {errors['ours']:.1e}"
        )
    print(
        f"λ_max of all groups, power iteration / fairline: {seconds['power'] / seconds['ours']:.2f} "
        f"(largest error {worst['power']:.1e} and {worst['ours']:.1e})"
    )


def distances(model: nn.Module, data: GroupedData, rounds: int) -> None:
    functional = Functional(model, data)
    classes = data.num_classes
    steps = {
        "passes": lambda: timed(lambda: [one_pass(functional) for _ in range(classes - 1)]),
        "distances": lambda: timed(lambda: first_order_distances(functional)),
    }
    times = interleaved(steps, rounds)
    print(f"first-order distances / {classes - 1} passes: {times['distances'] / times['passes']:.2f}")


def peak_memory(images: int) -> int:
    """Peak resident memory in KiB of a process that takes one Hessian product over so many images."""
    code = (
        "import resource, torch, fairline as fl\n"
        "from fairline.audit.functional import Functional\n"
        f"n = {images}\n"
        "images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)\n"
        "labels, groups = torch.arange(n) % 5, torch.zeros(n, dtype=torch.int64)\n"
        "data = fl.GroupedData(images, labels, groups, tuple('abcde'), ('all',))\n"
        "f = Functional(fl.models.build('resnet18', 5, width=8), data)\n"
        "f.hessian_product(torch.arange(n))(torch.ones(f.size))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"on {device_name()}")
    model, data = trained(arguments.run)
    print(f"{data.name}, {len(data)} test images, {data.num_groups} groups")
    gradient_norms(model, data, arguments.rounds)
    curvature(model, data)
    distances(model, data, arguments.rounds)
    small, large = peak_memory(500), peak_memory(4000)
    print(f"peak memory, 4000 images / 500: {large / small:.2f}")


if __name__ == "__main__":
    main()
