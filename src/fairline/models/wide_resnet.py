"""Wide residual networks (Zagoruyko and Komodakis 2016): pre-activation blocks in three groups."""

from __future__ import annotations

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU before each of two 3×3 convolutions, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        # As published, a projection reads the activation and an identity the block's own input.
        out: Tensor = y + self.shortcut(activated if self.projects else x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-k: a convolution of 16 channels, then three groups of (depth − 4)/6 blocks.

    WRN-22-8 (``width=128``) at 32×32 pixels has 1,359,872 ReLUs, as published for SNL, which leaves out the one after
    the last block; with it there are 1,392,640.

    Args:
        depth: 6n + 4.
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or height and width.
        width: Channels of the first group, doubled at each next one; 16·k.
        final_relu: Whether a ReLU follows the last batch normalisation.
        stem_stride: Stride of the stem; 2 halves every resolution.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        width: int = 128,
        final_relu: bool = False,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.arguments = {
            "depth": depth,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "width": width,
            "final_relu": final_relu,
            "stem_stride": stem_stride,
        }
        self.image_size = image_size
        stem = min(16, width)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, stem_stride, padding=1, bias=False)
        channels = stem
        self.stages = 3
        for stage in range(1, self.stages + 1):
            out = width * 2 ** (stage - 1)
            blocks = []
            for position in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(channels, out, 2 if stage > 1 and position == 0 else 1))
                channels = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.relu: nn.Module = nn.ReLU() if final_relu else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(self.flatten(self.pool(self.relu(self.bn(x)))))
        return logits


def wide_resnet22_8(
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int = 128,
    final_relu: bool = False,
    stem_stride: int = 1,
) -> WideResNet:
    """WRN-22-8 at the default width; see :class:`WideResNet`."""
    return WideResNet(22, num_classes, in_channels, image_size, width, final_relu, stem_stride)
