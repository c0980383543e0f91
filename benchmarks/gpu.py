"""Images a second of base training, mask learning and finetuning on a GPU: float32, bfloat16, and CUDA graphs.

One process; synthetic images, which lie on the GPU. The faster of the last two of three epochs counts. The loss of the
first epoch shows that all compute the same.

    python benchmarks/gpu.py [--widths 16,64] [--images 8192] [--batch 128]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

import fairline as fl
from fairline.training.graphs import VARIABLE

#: Precision, and whether networks are captured.
VARIANTS = {"fp32": ("fp32", 0), "fp32, graphs": ("fp32", 1), "bf16": ("bf16", 0), "bf16, graphs": ("bf16", 1)}
STEPS = ("base", "mask learning", "finetune")


def images_of(count: int) -> fl.GroupedData:
    """Images of 32×32 pixels, their five classes and groups marked by a brighter row."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (count,), generator=generator)
    pixels = torch.randint(0, 200, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), :, labels * 5] += 50
    names = tuple("abcde")
    return fl.GroupedData(pixels, labels, labels.clone(), names, names)


def epochs_of(step: str, width: int, data: fl.GroupedData, batch: int, precision: Any) -> list[dict[str, float]]:
    """Rows of three epochs."""
    torch.manual_seed(0)
    network = fl.models.build("resnet18", 5, width=width)
    rows: list[dict[str, float]] = []
    settings = {"batch_size": batch, "precision": precision}
    if step == "base":
        return fl.train(network, data, epochs=3, lr=0.01, **settings)
    if step == "mask learning":
        list(fl.SNL(max_epochs=3, **settings).linearize(network, data, [0.5], history=rows))
    else:
        (cut,) = fl.Random().linearize(network, data, [0.1])
        fl.finetune(cut.model, network, data, epochs=3, history=rows, **settings)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="16,64")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    data = images_of(arguments.images)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(
        f"{device}, torch {torch.__version__}; ResNet-18, {arguments.images} images of 32×32, batch {arguments.batch}"
    )
    print(f"{'width':>5}  {'epoch of':13}  {'':12}  {'images/s':>9}  over fp32  loss of the first epoch")
    for width in map(int, arguments.widths.split(",")):
        for step in STEPS:
            plain = 0.0
            for name, (precision, captured) in VARIANTS.items():
                os.environ[VARIABLE] = str(captured)
                rows = epochs_of(step, width, data, arguments.batch, precision)
                speed = len(data) / min(row["seconds"] for row in rows[-2:])
                plain = plain or speed
                loss = f"{rows[0]['loss']:.5f}"
                print(f"{width:5}  {step:13}  {name:12}  {speed:9,.0f}  {speed / plain:9.2f}  {loss}", flush=True)


if __name__ == "__main__":
    main()
