"""Epochs of base training, mask learning and finetuning, and an audit: this checkout against another one, in one run.

Each measurement is a process of its own on the same synthetic images; the two checkouts take turns. The other checkout
is run as it runs by default; this one in each ``--precision``. An epoch is the second of two: what is done once a run
(the choice of the precision, the teacher's logits) is left out and told apart.

    git worktree add ../before 01a59ec
    python benchmarks/engine.py --before ../before [--widths 16,32,64] [--steps base] [--images 1024] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent
STEPS = ("base", "mask learning", "finetune", "audit")

#: Runs in either checkout, so it uses what both have.
WORKER = """
import json, sys, time
import torch
import fairline as fl

step, width, images, precision = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
more = {"precision": precision} if precision else {}
generator = torch.Generator().manual_seed(0)
labels = torch.randint(0, 5, (images,), generator=generator)
pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
names = tuple("abcde")
data = fl.GroupedData(pixels, labels, labels.clone(), names, names)
torch.manual_seed(0)
network = fl.models.build("resnet18", 5, width=width)
began = time.perf_counter()
rows = []
if step == "base":
    rows = fl.train(network, data, epochs=2, batch_size=128, **more)
elif step == "mask learning":
    list(fl.SNL(max_epochs=2, batch_size=128, **more).linearize(network, data, [0.5], history=rows))
elif step == "audit":
    (cut,) = fl.Random().linearize(network, data, [0.1])
    for _ in range(2):
        start = time.perf_counter()
        fl.audit(cut.model, data, measures=["accuracy"], resamples=100)
        rows.append({"seconds": time.perf_counter() - start})
else:
    (cut,) = fl.Random().linearize(network, data, [0.1])
    fl.finetune(cut.model, network, data, epochs=2, batch_size=128, history=rows, **more)
whole = time.perf_counter() - began
print(json.dumps({"epoch": rows[-1]["seconds"], "once": whole - sum(row["seconds"] for row in rows)}))
"""


def measure(checkout: Path, precision: str, step: str, width: int, images: int) -> dict[str, float]:
    """Seconds of an epoch, and of what comes once."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, step, str(width), str(images), precision],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--precisions", default="auto,fp32")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    precisions = arguments.precisions.split(",")
    capabilities = {name: value for name, value in torch.cpu.get_capabilities().items() if "bf16" in name}
    print(f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads, {capabilities}")
    print(f"torch {torch.__version__}, ResNet-18, {arguments.images} images of 32×32, batch 128")
    print(f"{'width':>5}  {'epoch of':13}" + "".join(f"  before / {p:4}" for p in precisions) + "  once, in epochs")
    for width in map(int, arguments.widths.split(",")):
        for step in arguments.steps.split(","):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ("before", *precisions)}
            for _ in range(arguments.rounds):
                for name, seen in found.items():
                    checkout = arguments.before if name == "before" else HERE
                    precision = "" if name == "before" else name
                    seen.append(measure(checkout, precision, step, width, arguments.images))
            seconds = {name: statistics.median(each["epoch"] for each in seen) for name, seen in found.items()}
            once = statistics.median(each["once"] for each in found[precisions[0]]) / seconds[precisions[0]]
            ratios = "".join(f"  {seconds['before'] / seconds[p]:13.2f}" for p in precisions)
            print(f"{width:5}  {step:13}{ratios}  {once:15.2f}", flush=True)


if __name__ == "__main__":
    main()
