"""An epoch of SNL's mask learning against straightforward loops.

Each straightforward loop recomputes the teacher at every step, reads a DataLoader that normalises image by image, and
computes m·relu(x) + (1 − m)·x through autograd, in float32. "As published" also lets gradients flow into the teacher,
as the published code does (it never detaches the teacher's output); the other runs the teacher under no_grad.
fairline's epoch is in the ``--precision`` given; its time leaves out what comes once, before the first epoch: the trial
of the precision, and the teacher's pass over the data, whose length is printed beside it.

    python benchmarks/snl_epoch.py [--width 16] [--images 2560] [--rounds 3] [--precision auto]
"""

from __future__ import annotations

import argparse
import logging
import time

import torch
from _ratio import device_name, interleaved, synchronize, timed
from masked_relu import WrittenOut
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fairline import SNL
from fairline.data import GroupedData
from fairline.inference import predict
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.precision import PRECISIONS, Precision


class OneImage(Dataset):
    """Normalises image by image, as a transform does."""

    def __init__(self, data: GroupedData) -> None:
        mean, std = data.normalization()
        self.images, self.labels = data.images, data.labels
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.images[i].float().div(255) - self.mean) / self.std, self.labels[i]


def straightforward(teacher: nn.Module, data: GroupedData, device: str, *, teacher_gradients: bool) -> float:
    """Seconds of one epoch."""
    student = mask_relus(teacher, data.normalized(slice(2)))
    for path, layer in masked_relus(student).items():
        student.set_submodule(path, WrittenOut(layer, learned=True))
    student.to(device).train()
    teacher.to(device).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    masks = [module.mask for module in student.modules() if isinstance(module, WrittenOut)]
    start = time.perf_counter()
    for images, labels in DataLoader(OneImage(data), batch_size=256, shuffle=True):
        images, labels = images.to(device), labels.to(device)
        output = student(images)
        with torch.set_grad_enabled(teacher_gradients):
            target = teacher(images)
        kd = nn.functional.kl_div((output / 4).log_softmax(1), (target / 4).softmax(1), reduction="batchmean")
        penalty = sum(mask.norm(p=1) for mask in masks)
        loss = nn.functional.cross_entropy(output, labels) + 16 * kd + 1e-5 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - start


def ours(teacher: nn.Module, data: GroupedData, device: str, precision: Precision) -> float:
    """Seconds of the second epoch."""
    history: list[dict[str, float]] = []
    method = SNL(max_epochs=2, batch_size=256, precision=precision)
    list(method.linearize(teacher, data, [0.5], device=device, history=history))
    return history[-1]["seconds"]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of fairline's epoch")
    arguments = parser.parse_args()
    logging.getLogger("fairline").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (arguments.images,), generator=generator)
    images = torch.randint(0, 256, (arguments.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    names = tuple(map(str, range(10)))
    data = GroupedData(images, labels, labels.clone(), names, names)
    teacher = build("resnet18", 10, width=arguments.width)
    steps = {
        "fairline": lambda: ours(teacher, data, device, arguments.precision),
        "no_grad": lambda: straightforward(teacher, data, device, teacher_gradients=False),
        "published": lambda: straightforward(teacher, data, device, teacher_gradients=True),
    }
    median = interleaved(steps, arguments.rounds)
    once = timed(lambda: predict(teacher, data, device=torch.device(device)))
    print(f"ResNet-18 width {arguments.width}, {arguments.images} images, {device_name()}, torch {torch.__version__}")
    print(f"straightforward epoch as published / fairline epoch:       {median['published'] / median['fairline']:.2f}")
    print(f"straightforward epoch, teacher no_grad / fairline epoch:   {median['no_grad'] / median['fairline']:.2f}")
    print(f"the teacher's one pass before the first epoch, in epochs:  {once / median['fairline']:.2f}")


if __name__ == "__main__":
    main()
