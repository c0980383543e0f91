"""Small networks of several kinds, in float64 by default, on small synthetic data."""

from __future__ import annotations

import torch
from torch import nn

from fairline.data import GroupedData
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from tests.conftest import make_data


def perceptron(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, classes))


def convolutional(classes: int) -> nn.Module:
    """With BatchNorm whose running statistics are not the batch's."""
    model = build("cnn", classes, 1, 4, width=1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def residual(classes: int) -> nn.Module:
    model = build("resnet18", classes, 1, 4, width=1)
    # A few blocks are enough; the full Hessian of 18 layers is too large to write out.
    for stage in (2, 3, 4):
        model.set_submodule(f"layer{stage}", nn.Identity())
    model.linear = nn.Linear(1, classes)
    return model


def masked(classes: int) -> nn.Module:
    """Half of the ReLUs of each layer linearized."""
    model = mask_relus(convolutional(classes).eval(), torch.zeros(2, 1, 4, 4))
    generator = torch.Generator().manual_seed(1)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
    return model


def linear(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


KINDS = {f.__name__: f for f in (perceptron, convolutional, residual, masked, linear)}


def network(kind: str, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return KINDS[kind](classes).to(dtype).eval()


def small_data(n: int = 60, *, classes: int = 3, groups: int | None = None, seed: int = 0) -> GroupedData:
    return make_data(n, classes=classes, groups=groups, size=4, seed=seed)


def seen(data: GroupedData, index, dtype: torch.dtype = torch.float64):
    """Images and labels as the network sees them."""
    return data.normalized(torch.as_tensor(index)).to(dtype), data.labels[torch.as_tensor(index)]
