"""A tiny convolutional network, for the demo and for tests."""

from __future__ import annotations

from torch import nn


def cnn(
    num_classes: int, in_channels: int = 3, image_size: int | tuple[int, int] = 32, width: int = 16
) -> nn.Sequential:
    """Three 3×3 convolutions with batch norm and ReLU, halving the image twice, then average pooling.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels, or height and width.
        width: Channels of the first convolution; doubled at each next one.

    Returns:
        A network with ``width·h·w + 2·width·⌈h/2⌉·⌈w/2⌉ + 4·width·⌈h/4⌉·⌈w/4⌉`` ReLUs for images of h×w.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    network.image_size = image_size  # type: ignore[assignment]
    return network
