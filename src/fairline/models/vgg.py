"""VGG-19 with batch normalisation (Simonyan and Zisserman 2015) in the form for small images: one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from fairline.errors import FairlineError

#: Convolutions of each stage of VGG-19, and channels of the stage in multiples of the width.
_STAGES = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))


class VGG(nn.Module):
    """Stages of 3×3 convolutions, each followed by batch normalisation and a ReLU; max-pooling between stages.

    At width 64 and 32×32 pixels VGG-19 has 2·64·32² + 2·128·16² + 4·256·8² + 4·512·4² + 4·512·2² = 303,104 ReLUs.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or height and width; at least 16 each, and more with a strided stem.
        width: Channels of the first stage; 64 is VGG-19.
        stem_stride: Stride of the first convolution; 2 halves every resolution.

    Raises:
        FairlineError: Max-pooling would leave nothing of the image.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        width: int = 64,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        # The stem keeps one pixel in each stride, the poolings drop the last of an odd number.
        if -(-min(sides) // stem_stride) < 2 ** (len(_STAGES) - 1):
            raise FairlineError(
                f"VGG-19 halves its images four times, so they need {15 * stem_stride + 1} pixels a side, "
                f"not {sides[0]}×{sides[1]}."
            )
        self.arguments = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "width": width,
            "stem_stride": stem_stride,
        }
        self.image_size = image_size
        self.stages = len(_STAGES)
        channels = in_channels
        for stage, (count, factor) in enumerate(_STAGES, start=1):
            layers: list[nn.Module] = []
            for position in range(count):
                stride = stem_stride if stage == 1 and position == 0 else 1
                layers += [
                    nn.Conv2d(channels, factor * width, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(factor * width),
                    nn.ReLU(),
                ]
                channels = factor * width
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
        self.downsample = nn.MaxPool2d(2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        for stage in range(1, self.stages + 1):
            if stage > 1:
                x = self.downsample(x)
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def vgg19(
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    width: int = 64,
    stem_stride: int = 1,
) -> VGG:
    """VGG-19 with batch normalisation; see :class:`VGG`."""
    return VGG(num_classes, in_channels, image_size, width, stem_stride)
