"""Training and auditing images that do not fit into memory: what they keep resident, and how fast they are.

The images are generated: the first bytes of each are random, the rest is a hole in the file, so that 20 GB take half a
GB of disk. Reading a hole costs what reading a cached page costs; a cold disk is not measured here.

    python benchmarks/larger_than_memory.py [--gigabytes 20] [--steps 4] [--rounds 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _ratio import interleaved

import fairline as fl
from fairline.data import GroupedData
from fairline.data._packed import IMAGES, image_digest, seal

#: Random bytes at the start of each image: a page of the file system.
FILLED = 4096


def sparse_data(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Write packed data of two classes, which are the groups, all images different."""
    folder.mkdir(parents=True)
    shape = (3, *size)
    row = int(np.prod(shape))
    filled = min(FILLED, row)
    rng = np.random.default_rng(0)
    pixels, digests = np.zeros(shape, np.uint8), []
    with (folder / IMAGES).open("wb") as file:
        for position in range(images):
            pixels.reshape(-1)[:filled] = rng.integers(0, 256, filled, dtype=np.uint8)
            file.seek(position * row)
            file.write(pixels.reshape(-1)[:filled].data)
            digests.append(np.frombuffer(image_digest(pixels), np.uint8))
        file.truncate(images * row)
    index = torch.arange(images) % 2
    names = ("even", "odd")
    empty = torch.empty((images, *shape), dtype=torch.uint8, device="meta")
    header, tensors = GroupedData(empty, index, index, names, names, name="generated")._description()
    digests = torch.from_numpy(np.stack(digests))
    seal(folder, {"key": "generated", "shape": [images, *shape], **header}, {"digests": digests, **tensors})


def resident(what: str) -> float:
    """GB of this process: ``VmHWM`` at most so far, ``VmRSS`` now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1e6


def use(folder: Path, steps: int, samples: int) -> None:
    """Split, train for some steps and audit packed data; print what was resident."""
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"  {what:44} {time.perf_counter() - began:7.1f} s  {resident('VmHWM'):5.2f} GB at most", flush=True)

    tell("torch and fairline imported")
    data = fl.data.load("packed", folder)
    tell(f"{data.images.numel() / 1e9:.1f} GB of images opened")
    train, _, test = data.split(0)
    tell("split, and normalised by the training part")
    model = fl.models.build("cnn", 2, image_size=data.images.shape[2:], width=2)

    class Enough(Exception):
        pass

    def stop(progress: fl.training.Progress) -> None:
        if progress.done == steps:
            raise Enough

    try:
        fl.train(model, train, epochs=1, batch_size=16, progress=stop)
    except Enough:
        tell(f"{steps} steps of 16 images, drawn from all of them")
    report = fl.audit(model, test if samples == 0 else test.select(torch.arange(samples)), resamples=100)
    tell(f"audit of {int(report.frame['n'].max()):,} images of the test part")


def throughput(images: int, size: int, width: int, rounds: int, folder: Path) -> None:
    """Print the seconds of an epoch and of an audit of packed data over those of the same data in memory."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (images,), generator=generator)
    memory = GroupedData(pixels, labels, labels.clone(), ("a", "b"), ("a", "b"))
    sets = {"memory": memory, "packed": memory.pack(folder)}
    torch.manual_seed(0)
    model = fl.models.build("resnet18", 2, image_size=size, width=width)

    def epoch(data: GroupedData) -> float:
        return float(fl.train(model, data, epochs=1, batch_size=128)[0]["seconds"])

    def audit(data: GroupedData) -> float:
        began = time.perf_counter()
        fl.audit(model, data, resamples=10)
        return time.perf_counter() - began

    for name, step in (("epoch", epoch), ("audit", audit)):
        seconds = interleaved({key: lambda data=data, step=step: step(data) for key, data in sets.items()}, rounds)
        print(f"{name} of {images} images of {size}×{size}, ResNet-18 width {width}: memory / packed ", end="")
        print(f"{seconds['memory'] / seconds['packed']:.3f}", flush=True)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=0, help="images of the audit; all of the test part by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="of the comparison with images in memory")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the generated images go")
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.use is not None:
        use(arguments.use, arguments.steps, arguments.samples)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.gigabytes > 0:
            images = int(arguments.gigabytes * 1e9 / (3 * arguments.size**2))
            sparse_data(Path(folder) / "large", images, (arguments.size, arguments.size))
            print(f"{images:,} images of {arguments.size}×{arguments.size}")
            words = ["--use", f"{folder}/large", "--steps", str(arguments.steps), "--samples", str(arguments.samples)]
            subprocess.run([sys.executable, __file__, *words], check=True, env=os.environ)
        if arguments.rounds > 0:
            throughput(arguments.images, 32, arguments.width, arguments.rounds, Path(folder) / "small")


if __name__ == "__main__":
    main()
