"""Networks that use every operator of private inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.masking import MaskedReLU, mask_relus, masked_relus


class Everything(nn.Module):
    """Strided, grouped and dilated convolutions, batch norms folded and not, skips, concat, pooling of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2)
        self.before = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(64, 12)
        self.flat_norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 4, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = F.relu(self.depthwise(x)) * 0.5
        x = torch.cat([x - y, 2.0 * y], 1)
        x = torch.relu(self.before(x))
        x = F.avg_pool2d(x + x, 2)
        x = self.pool(x)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        x = self.drop(self.flat_norm(self.hidden(x)).relu())
        return self.last(x / 2.0)


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and scales that folding must not ignore."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(size, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(size, generator=generator))
    return model.eval()


def masked(model: nn.Module, example: Tensor, share: float, surrogate: str = "identity", seed: int = 0) -> nn.Module:
    """A copy that keeps a share of its ReLUs at random, all of layer 1 and none of layer 2 unless 0 or 1."""
    result = mask_relus(model, example, "identity" if surrogate == "mixed" else surrogate)
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(masked_relus(result).values()):
        kept = torch.rand(layer.kept.shape, generator=generator) < share
        if 0 < share < 1 and place < 2:
            kept = torch.full_like(kept, place == 0)
        layer.set_mask(kept)
        if surrogate == "mixed":
            layer.use_degrees(torch.arange(place, place + layer.shape[0]) % 4)
        if layer.coefficients is not None:
            with torch.no_grad():
                layer.coefficients.add_(torch.randn(layer.coefficients.shape, generator=generator) * 0.05)
    return result.eval()


class Theirs(nn.Module):
    """What people's own classes do: hooks, attributes, modes, constants, weights that are computed, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.relu1 = nn.ReLU()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.relu2 = nn.ReLU()
        self.standardised = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu3 = nn.ReLU()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(1.7))
        self.head = nn.Linear(8, 4)
        self.seen: list[tuple[int, ...]] = []
        self.stem.register_forward_hook(lambda module, inputs, output: self.seen.append(tuple(output.shape)))
        self.unused = nn.ReLU()

    def drop_path(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.8)) / 0.8 if self.training else x

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x = self.relu1(self.stem((x - self.mean) / self.std))
        with torch.enable_grad():
            y = self.relu2(self.spectral(x))
            with torch.no_grad():
                weight = self.standardised.weight
                weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
            y = self.norm(F.conv2d(y, weight, self.standardised.bias, padding=1) * self.gamma + 0.1)
        self.kept = x + self.drop_path(self.relu3(-(1 - self.gamma * y)))
        logits = self.head(self.kept.mean((2, 3))) / self.temperature
        return logits if labels is None else F.cross_entropy(logits, labels)


def swapped(model: nn.Module, example: Tensor, share: float, seed: int = 0) -> nn.Module:
    """The same object, a masked ReLU in the place of each ``nn.ReLU`` that runs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:]))
            )
    with torch.no_grad():
        model(example)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        layer = MaskedReLU(shape)
        layer.set_mask(torch.rand(shape, generator=generator) < share)
        model.set_submodule(name, layer)
    return model.eval()
