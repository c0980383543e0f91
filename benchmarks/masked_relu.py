"""What a masked ReLU costs in a training step, against the plain ReLU and the written-out formula.

Ratios of medians of interleaved steps of ResNet-18, batch 128, 32×32 images, SGD; memory is what autograd keeps
for the backward pass. Aim: fixed masks ≤ 1.15 in time and ≤ 1.1 in memory, learned masks ≤ 1.25 in time.

    python benchmarks/masked_relu.py [--width 16] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _ratio import device_name, interleaved, saved_bytes, timed
from torch import Tensor, nn

from fairline.masking import MaskedReLU, mask_relus, masked_relus
from fairline.models import build


class WrittenOut(nn.Module):
    """m·relu(x) + (1 − m)·x through autograd, as the published code has it."""

    def __init__(self, layer: MaskedReLU, learned: bool) -> None:
        super().__init__()
        self.mask = nn.Parameter(layer.kept.float(), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the formula."""
        return F.relu(x) * self.mask.expand_as(x) + (1 - self.mask.expand_as(x)) * x


def main() -> None:
    """Print one ratio a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32, device=device), torch.randint(0, 10, (128,), device=device)
    plain = build("resnet18", 10, width=arguments.width).to(device)
    fixed = mask_relus(plain, x)
    for layer in masked_relus(fixed).values():
        layer.set_mask(torch.rand(layer.shape, device=device) < 0.1)
    learned = mask_relus(plain, x)
    for layer in masked_relus(learned).values():
        layer.learn()
    networks = {"plain ReLU": plain, "fixed masks": fixed, "learned masks": learned}
    for name, source, is_learned in (("fixed", fixed, False), ("learned", learned, True)):
        network = mask_relus(plain, x)
        for path in masked_relus(network):
            network.set_submodule(path, WrittenOut(source.get_submodule(path), is_learned))
        networks[f"{name} masks, written out"] = network.to(device)

    def step(network: nn.Module) -> Callable[[], float]:
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        return lambda: timed(run)

    seconds = interleaved({name: step(network) for name, network in networks.items()}, arguments.rounds)
    memory = {
        name: saved_bytes(lambda network=network: F.cross_entropy(network(x), y)) for name, network in networks.items()
    }
    print(f"ResNet-18 width {arguments.width}, batch 128, {device_name()}, torch {torch.__version__}")
    print(f"{'':28}{'time':>8}{'memory':>9}   (ratio to the plain ReLU)")
    for name in networks:
        print(f"{name:28}{seconds[name] / seconds['plain ReLU']:8.2f}{memory[name] / memory['plain ReLU']:9.2f}")


if __name__ == "__main__":
    main()
