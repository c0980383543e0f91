"""ResNet-18 and -34 (He et al. 2016) in the form for small images: 3×3 stem, no max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; a ReLU after the first convolution and one after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + self.shortcut(x)
        out: Tensor = self.relu2(y)
        return out


class ResNet(nn.Module):
    """A residual network of four stages.

    At width 64 and 32×32 pixels ResNet-18 has 491,520 ReLUs, and 557,056 with a ReLU after the stem. The
    published SNL and DeepReDuce codes have none there, and the paper's budgets are fractions of the former.

    Args:
        blocks: Residual blocks in each of the four stages.
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or height and width.
        width: Channels of the first stage; doubled at each next one.
        stem_relu: Whether a ReLU follows the stem.
        stem_stride: Stride of the stem; 2 halves every resolution, which is DeepReDuce's Reshape with ρ = 1/2, and
            quarters ReLUs and work.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        width: int = 64,
        stem_relu: bool = False,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        #: What :func:`~fairline.models.rescaled` builds a smaller one from.
        self.arguments = {
            "blocks": blocks,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "width": width,
            "stem_relu": stem_relu,
            "stem_stride": stem_stride,
        }
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU() if stem_relu else nn.Identity()
        channels = width
        self.stages = len(blocks)
        for stage, count in enumerate(blocks, start=1):
            out = width * 2 ** (stage - 1)
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            layer = []
            for stride in strides:
                layer.append(BasicBlock(channels, out, stride))
                channels = out
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def resnet18(
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int = 64,
    stem_relu: bool = False,
    stem_stride: int = 1,
) -> ResNet:
    """ResNet-18: two blocks a stage; see :class:`ResNet`."""
    return ResNet((2, 2, 2, 2), num_classes, in_channels, image_size, width, stem_relu, stem_stride)


def resnet34(
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int = 64,
    stem_relu: bool = False,
    stem_stride: int = 1,
) -> ResNet:
    """ResNet-34: 3, 4, 6 and 3 blocks a stage; see :class:`ResNet`."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels, image_size, width, stem_relu, stem_stride)
