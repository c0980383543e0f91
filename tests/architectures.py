"""Compact real architectures, each with what makes it hard to mask. 3×16×16 images, five classes.

``ARCHITECTURES`` maps a name to a function that builds the network and to its ReLUs an image, counted by hand.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fairline as fl
from fairline.data import GroupedData
from fairline.inference import predict
from fairline.private import write_onnx

CLASSES = 5


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Head(nn.Module):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


class TorchvisionBlock(nn.Module):
    """One in-place ReLU module that is called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(TorchvisionBlock(4, 4), TorchvisionBlock(4, 4))
        self.layer2 = nn.Sequential(TorchvisionBlock(4, 8, 2))
        self.head = Head(8)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.head(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class PreactivationBlock(nn.Module):
    """The shortcut starts from the activation that an in-place ReLU has written."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.shortcut = conv(inputs, outputs, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        normalised = self.bn1(x)
        out = self.conv1(self.relu1(normalised))
        out = self.conv2(self.relu2(self.bn2(out)))
        return out + self.shortcut(normalised)


class ResNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.blocks = nn.ModuleList([PreactivationBlock(4, 4), PreactivationBlock(4, 8, 2)])
        self.bn, self.head = nn.BatchNorm2d(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.bn(x)))


class FunctionalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class FunctionalResNet(nn.Module):
    """As pytorch-cifar writes it: F.relu and F.avg_pool2d; dropout by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(FunctionalBlock(4, 4)), nn.Sequential(FunctionalBlock(4, 8, 2))
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, 8)
        out = F.dropout(out.view(out.size(0), -1), 0.2, training=self.training)
        return self.linear(out)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int, drop_rate: float):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, 8, kernel=1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, growth)
        self.drop_rate = drop_rate

    def bottleneck(self, *inputs: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if self.training and any(each.requires_grad for each in inputs):
            out = checkpoint(self.bottleneck, *inputs, use_reentrant=False)
        else:
            out = self.bottleneck(*inputs)
        out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, p=self.drop_rate, training=self.training)


class DenseNet(nn.Module):
    """Checkpointed while training, as torchvision's with ``memory_efficient``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList([DenseLayer(4 + 4 * i, 4, 0.1) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AvgPool2d(2))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(self.transition(torch.cat(features, 1)))


class CheckpointedResNet(FunctionalResNet):
    """Whole blocks with functional ReLUs run in checkpoints."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2):
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


class BasicConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, kernel=kernel), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


class Inception(nn.Module):
    """An auxiliary head while training, and then a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv(3, 4, 3)
        self.branches = nn.ModuleList([BasicConv(4, 2, 1), BasicConv(4, 2, 3), BasicConv(4, 2, 5)])
        self.aux_conv, self.aux_fc = BasicConv(6, 4, 1), nn.Linear(4, CLASSES)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.cat([branch(x) for branch in self.branches], 1)
        if self.training:
            aux = F.relu(self.aux_conv(x)).mean((2, 3))
            return InceptionOutputs(self.head(x), self.aux_fc(aux))
        return self.head(x)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]):
        super().__init__()
        hidden = 2 * inputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), activation()),
            features=nn.Sequential(InvertedResidual(4, 4, 1, activation), InvertedResidual(4, 8, 2, activation)),
            head=Head(8),
        )
    )


class SqueezeExcitation(nn.Module):
    """A ReLU on one number a channel, and a sigmoid gate."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))


class SENet(nn.Module):
    """One ReLU object is passed to all blocks."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.stem = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), act)
        self.block = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), act, SqueezeExcitation(4), conv(4, 8, 2), act)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class UNet(nn.Module):
    """Skips that concatenate, transposed convolutions, and a classifier on top."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(3, 4), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(conv(4, 8, 2), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge = nn.Sequential(conv(8, 4), nn.ReLU(inplace=True))
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.down2(high)
        return self.head(self.merge(torch.cat([high, self.up(low)], 1)))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (4, 0, 8, 0):
            if width:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(8 * 16, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(True), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class ConvTransformer(nn.Module):
    """A CNN with a transformer encoder: torch's layer calls F.relu, and has a fast path in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc(self.encoder(tokens).mean(1))


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token, learned positions, and ReLU in the MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, 8))
        self.blocks = nn.Sequential(ViTBlock(), ViTBlock())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        # A ReLU of parameters alone: no image reaches it.
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + F.relu(self.positions)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Siamese(nn.Module):
    """One encoder for both halves of an image: each of its ReLUs runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, 2), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.encoder(half).mean((2, 3)) for half in x.chunk(2, dim=3))
        return self.fc(F.relu(torch.cat([left, right], 1)))


class Hooked(nn.Module):
    """Hooks act: one scales an activation, one records, one pads the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.head = Head(4)
        self.records: list[Tensor] = []
        self.conv1.register_forward_pre_hook(lambda _, inputs: (F.pad(inputs[0], (1, 1, 1, 1)),))
        self.relu.register_forward_hook(lambda _, __, output: 0.5 * output)
        self.relu.register_forward_hook(self.record)

    def record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.records = [output]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv1(x))) + 0 * self.records[0].sum()


class WeightNorm(nn.Module):
    """Old-style ``weight_norm``, whose weight is no leaf."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.conv1 = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
            self.conv2 = nn.utils.weight_norm(nn.Conv2d(4, 8, 3, 2, padding=1))
        self.act1, self.act2, self.head = nn.ReLU(), nn.ReLU(), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.conv2(self.act1(self.conv1(x)))))


class SpectralNorm(nn.Module):
    """Parametrized: a power iteration moves buffers while training; a ReLU keeps one weight positive."""

    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.relu(weight)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.conv2 = nn.Conv2d(4, 8, 3, 2, padding=1)
        nn.utils.parametrize.register_parametrization(self.conv2, "weight", self.Positive())
        self.relu1, self.relu2, self.head = nn.ReLU(), nn.ReLU(), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu2(self.conv2(self.relu1(self.conv1(x)))))


class DropPath(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class ConvNeXtLike(nn.Module):
    """Stochastic depth, dropout of whole channels, and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.depthwise = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2)])
        self.wide = nn.ModuleList([nn.Conv2d(8, 16, 1) for _ in range(2)])
        self.narrow = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.drop_path, self.head = DropPath(0.3), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depthwise, wide, narrow in zip(self.depthwise, self.wide, self.narrow, strict=True):
            y = narrow(F.relu(wide(depthwise(x))))
            x = x + self.drop_path(self.scale * F.dropout2d(y, 0.2, training=self.training))
        return self.head(x)


class Frozen(nn.Module):
    """A backbone without gradient, in evaluation mode also while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.neck, self.relu, self.head = conv(4, 8), nn.ReLU(), Head(8)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.training else nullcontext():
            features = self.backbone(x)
        return self.head(self.relu(self.neck(features)))


class SmallNet(nn.Module):
    """A stem that the next ones share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.fc = conv(3, 4, 2), nn.ReLU(), nn.Linear(4, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.conv1(x)).mean((2, 3))


class DictOutput(SmallNet):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(x)
        return {"features": h, "logits": self.fc(h)}


class TupleOutput(SmallNet):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.fc(F.relu(h - 0.1)), h


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As Hugging Face has it: a dict, a dataclass and a tuple in one; without a loss there is none."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) is not None:
                self[each.name] = value


class HuggingFace(SmallNet):
    """Keyword arguments with defaults, a ModelOutput, and a loss where labels are given."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, *, return_dict: bool = True) -> Any:
        h = self.features(pixel_values)
        logits = self.fc(h)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if not return_dict:
            return (logits, h)
        return ModelOutput(loss=loss, logits=logits, hidden_states=(h,))


class Distillable(SmallNet):
    """``is_feat=False``, one ReLU module for everything, activations kept on the network."""

    def forward(self, x: Tensor, is_feat: bool = False, **options: Any) -> Any:
        self.kept = self.features(self.relu(x))
        logits = self.fc(self.kept)
        return ([self.kept], logits) if is_feat else logits


class Recurrent(nn.Module):
    """A recurrence over rows of features, ReLU by module in a loop; six of its eight steps share one line."""

    def __init__(self, nonlinearity: str | None = None) -> None:
        super().__init__()
        self.conv1 = conv(3, 4, 2)
        self.rnn = None if nonlinearity is None else nn.RNN(32, 6, nonlinearity=nonlinearity, batch_first=True)
        self.inner, self.outer, self.relu = nn.Linear(32, 6), nn.Linear(6, 6), nn.ReLU()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv1(x).relu().permute(0, 2, 1, 3).flatten(2)
        if self.rnn is not None:
            return self.fc(self.rnn(rows)[0][:, -1])
        state = rows.new_zeros(len(rows), 6)
        for row in rows.unbind(1):
            state = self.relu(self.inner(row) + self.outer(state))
        return self.fc(state)


class MixedActivations(nn.Module):
    """MobileNetV3-like: ReLU, Hardswish, GELU and PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.Hardswish(), conv(4, 4, 2), nn.GELU())
        self.prelu, self.head = nn.PReLU(), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.prelu(self.body(x)).clamp(min=0))


#: Builds a network, and how many ReLUs it evaluates for an image; None where it must be refused.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "ResNet, torchvision's (one ReLU a block)": (TorchvisionResNet, 4 * 256 + 4 * 4 * 64 + 2 * 8 * 16),
    "ResNet v2 (in-place ReLU read again)": (ResNetV2, 4 * 256 * 2 + 4 * 256 + 8 * 64 + 8 * 64),
    "ResNet of functions": (FunctionalResNet, 4 * 256 + 2 * 4 * 256 + 2 * 8 * 64),
    "ResNet, blocks in checkpoints": (CheckpointedResNet, 4 * 256 + 2 * 4 * 256 + 2 * 8 * 64),
    "DenseNet with checkpoints": (DenseNet, 256 * ((4 + 8) + (8 + 8) + (12 + 8)) + 16 * 256),
    "Inception with an auxiliary head": (Inception, 4 * 256 + 6 * 64),
    "MobileNetV2 with ReLU": (lambda: mobilenet_v2(nn.ReLU), 4 * 256 + 2 * 8 * 256 + 8 * 256 + 8 * 64),
    "MobileNetV2 with ReLU6": (lambda: mobilenet_v2(nn.ReLU6), None),
    "SE-Net (one ReLU object)": (SENet, 4 * 256 + 4 * 256 + 2 + 8 * 64),
    "U-Net": (UNet, 4 * 256 + 8 * 64 + 4 * 256),
    "VGG with BatchNorm": (VGG, 4 * 256 + 8 * 64 + 32),
    "CNN with a transformer encoder": (ConvTransformer, 8 * 16 + 2 * 16 * 16),
    "ViT with ReLU": (ViT, 2 * 17 * 16),
    "Siamese (a shared encoder)": (Siamese, 2 * (4 * 128 + 4 * 32) + 8),
    "hooks": (Hooked, 4 * 256),
    "weight_norm": (WeightNorm, 4 * 256 + 8 * 64),
    "spectral_norm and parametrizations": (SpectralNorm, 4 * 256 + 8 * 64),
    "DropPath and dropout of channels": (ConvNeXtLike, 2 * 16 * 16),
    "a backbone without gradient": (Frozen, 4 * 256 + 8 * 256),
    "logits in a dict": (DictOutput, 4 * 64),
    "logits in a tuple": (TupleOutput, 4 * 64 + 4),
    "logits in a ModelOutput, labels=None": (HuggingFace, 4 * 64),
    "is_feat=False, activations kept": (Distillable, 3 * 256 + 4 * 64),
    "a recurrence with a shared ReLU": (Recurrent, 4 * 64 + 8 * 6),
    "nn.RNN with ReLU": (lambda: Recurrent("relu"), None),
    "nn.RNN with tanh": (lambda: Recurrent("tanh"), 4 * 64),
    "ReLU, Hardswish, GELU, PReLU and clamp": (MixedActivations, 4 * 256 + 4 * 64),
}


def small_data(n: int = 60) -> GroupedData:
    """Images whose brightness tells the class a little."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    images = torch.randint(0, 156, (n, 3, 16, 16), generator=generator) + 20 * labels[:, None, None, None]
    names = tuple(f"class {i}" for i in range(CLASSES))
    return GroupedData(images.to(torch.uint8), labels, torch.arange(n) % 2, names, ("first", "second"), name="small")


STEPS = ("mask", "train", "random", "SNL", "finetune", "audit", "export", "ONNX")


def journey(make: Callable[[], nn.Module], folder: Path) -> dict[str, str]:
    """Take a network through everything; for each step ``works``, or the sentence that ended the journey.

    An export that is refused does not end it before its own step.
    """
    torch.manual_seed(0)
    model, data = make(), small_data()
    images = data.normalized(slice(4))
    found: dict[str, str] = {}

    def train() -> None:
        fl.train(model, data, epochs=1, batch_size=20, lr=0.01)

    def linearize(method: Any) -> fl.Linearized:
        (cut,) = method.linearize(model, data, [0.5])
        return cut

    def onnx() -> None:
        write_onnx(folder / "network.onnx", fl.private.to_graph(state["cut"].model, images))
        session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        expected = predict(state["cut"].model, data)[:4]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)

    state: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "mask": lambda: fl.mask_relus(model, images),
        "train": train,
        "random": lambda: state.update(cut=linearize(fl.Random())),
        "SNL": lambda: linearize(fl.SNL(lam=1e-2, max_epochs=1, batch_size=20)),
        "finetune": lambda: fl.finetune(state["cut"].model, model, data, epochs=1, batch_size=20),
        "audit": lambda: fl.audit(
            state["cut"].model, data, model, measures=("accuracy", "gradient_norm"), resamples=50
        ),
        "export": lambda: fl.private.to_graph(state["cut"].model, images),
        "ONNX": onnx,
    }
    for name, step in steps.items():
        try:
            step()
        except fl.FairlineError as error:
            found[name] = str(error)
            break
        found[name] = "works"
    return found
