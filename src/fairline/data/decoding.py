"""One picture, as people have them, to uint8 pixels: upright, opaque, eight bits a channel. No source.

What is done with each kind, so that none comes out dark, white or sideways:

- An orientation tag (EXIF, XMP, TIFF) is applied.
- Transparency is laid on white. What is wholly transparent, or blank once it lies on white, is refused.
- Grey values of 16 bits and floats are scaled so that ``white`` becomes 255: by default 65,535 (or what the bits of a
  TIFF allow) and 1.0. Values outside of that range are refused, and 16 bits that leave the picture black, such as
  12-bit values in a 16-bit file.
- Of several pictures in one file only the first of a camera's MPO is taken, since the others are its depth or preview;
  animations and files of several pages are refused.
- CMYK is turned to RGB without its colour profile, like any other profile.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Size = tuple[int, int]

#: What is opened. Pillow also knows formats that start other programs (EPS) or hold no photographs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
#: Markers of a JPEG 2000 codestream (ITU-T T.800, Table A.1), which its data cannot contain.
_START_OF_DATA, _END_OF_CODE = b"\xff\x93", b"\xff\xd9"
#: A 16-bit picture whose brightest value is below this share of white is black in eight bits.
_VISIBLE = 1 / 16


#: The Exif tag of how the camera was held; from 5 on the sides change places.
_ORIENTATION = 0x0112


class UnusableImage(ValueError):
    """The picture cannot be read as it is meant; the text says why."""


def decode_image(
    source: bytes | Path | Pixels | Image.Image,
    *,
    channels: int = 3,
    size: Size | None = None,
    crop: int | None = None,
    white: float | None = None,
) -> Pixels:
    """Decode one picture.

    Args:
        source: An encoded file or its content; or pixels (H, W) or (H, W, C), or a Pillow image.
        channels: 3 for RGB, 1 for grey.
        size: Height and width of the result; the picture's own by default.
        crop: Side of the centre that is kept before resizing; all of the picture by default.
        white: The value of white in files of 16-bit grey values or floats.

    Returns:
        Pixels (H, W, channels).

    Raises:
        UnusableImage: There is no picture, or it would be read wrongly.
    """
    try:
        if isinstance(source, Path):
            source = source.read_bytes()
        with _open(source) as opened:
            picture = _upright(opened, white)
        picture = _opaque(picture).convert("L" if channels == 1 else "RGB")
        picture = _fitted(picture, size, crop)
    except UnusableImage:
        raise
    except FileNotFoundError:
        raise UnusableImage("file does not exist") from None
    except Exception as error:
        # Pillow's readers raise almost anything for broken files.
        raise UnusableImage(f"not a readable image ({first_line(error)})") from None
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def picture_size(source: bytes | Path | Pixels) -> Size | None:
    """Height and width of a picture, from its header and upright.

    Args:
        source: As for :func:`decode_image`.

    Returns:
        Both in pixels; None where it cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_ORIENTATION, 1) > 4
    except Exception:
        # Whatever a broken header raises; decoding says what it is.
        return None
    return (width, height) if turned else (height, width)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Hide Pillow's warnings about odd files; what cannot be used raises. Not for several threads at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_uint8(image: Any) -> Tensor:
    """A uint8 (C, H, W) tensor from a Pillow image, an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W).

    Args:
        image: uint8, or floats in [0, 1].

    Returns:
        Grey Pillow images have one channel, all others three; of arrays and tensors all channels are kept.

    Raises:
        UnusableImage: The shape or the range of values is not an image's.

    >>> to_uint8(np.full((2, 2), 0.2)).tolist()
    [[[51, 51], [51, 51]]]
    """
    if isinstance(image, Image.Image):
        with quiet_pillow():
            pixels = decode_image(image, channels=1 if image.mode.startswith(("1", "L", "I", "F")) else 3)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
            raise UnusableImage("is not an image")
        if array.ndim == 3 and array.shape[2] > 4 >= array.shape[0]:
            raise UnusableImage(f"has shape {array.shape}, not (H, W, C); pass (C, H, W) as a tensor")
        image = torch.from_numpy(array.copy())
        image = image if image.ndim == 2 else image.permute(2, 0, 1).contiguous()
    if image.ndim == 2:
        image = image.unsqueeze(0)
    if image.ndim != 3 or 0 in image.shape:
        raise UnusableImage(f"has shape {tuple(image.shape)}, not (C, H, W)")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise UnusableImage(f"is {image.dtype}; uint8 or float in [0, 1] is needed")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise UnusableImage(f"has values from {low:.3g} to {high:.3g}; floats must lie in [0, 1], not normalised")
    return image.mul(255).round().to(torch.uint8)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _open(source: bytes | Pixels | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
    if not source:
        raise UnusableImage("file is empty")
    Image.init()
    try:
        opened = Image.open(io.BytesIO(source), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnusableImage(f"not a readable image (it begins with {source[:12]!r})") from None
    if opened.format == "JPEG2000" and source.rfind(_END_OF_CODE) <= source.find(_START_OF_DATA):
        # OpenJPEG fills what is missing with black.
        raise UnusableImage("not a readable image (it is cut short)")
    return opened


def _upright(opened: Image.Image, white: float | None) -> Image.Image:
    """The picture with its orientation applied and eight bits a channel."""
    if getattr(opened, "is_animated", False) and opened.format != "MPO":
        raise UnusableImage("holds several pictures (an animation or pages), not one")
    # The tiles name the layout in the file, until it is read. BMP's "BGR;16" has 16 bits for all channels together.
    layouts = str(getattr(opened, "tile", ()))
    deep = ";16" in layouts and "BGR;16" not in layouts
    tags = dict(opened.tag_v2) if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):
        return _scaled(picture, tags, white)
    if deep:
        _require_visible_colours(picture, white)
    return picture


def _scaled(picture: Image.Image, tags: dict[int, Any], white: float | None) -> Image.Image:
    """Grey values of more than eight bits, scaled so that white is 255."""
    if "transparency" in picture.info:
        raise UnusableImage("has 16 bits and a transparent grey, which cannot be read together")
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise UnusableImage("has values that are not finite")
    inverted = tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    given, white = white, white or _white(picture.mode, tags)
    if white is None:
        raise UnusableImage(f"has values from {low:g} to {high:g} and does not tell which is white")
    if low < 0 or high > white:
        raise UnusableImage(f"has values from {low:g} to {high:g}, outside of 0 (black) to {white:g} (white)")
    if given is None and picture.mode != "F" and high < _VISIBLE * white:
        blank = "white" if inverted else "black"
        raise UnusableImage(f"would be {blank}: its largest value is {high:g} of {white:g}")
    if inverted:
        values = white - values
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _white(mode: str, tags: dict[int, Any]) -> float | None:
    """The value of white in a file that follows the custom of its kind, or None where there is none."""
    if mode == "F":
        return 1.0
    bits = max(tags.get(_TIFF_BITS, (16,)))
    if bits > 16 or max(tags.get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,))) != _UNSIGNED:
        return None
    return float(2**bits - 1)


def _require_visible_colours(picture: Image.Image, white: float | None) -> None:
    """Refuse colours of 16 bits, of which Pillow keeps the upper eight, where nothing is left of them.

    Raises:
        UnusableImage: They are black, or are meant for another range.
    """
    if white not in (None, 65535) or picture.mode == "CMYK":
        raise UnusableImage("has colours of 16 bits, which are read as RGB with a white of 65535 alone")
    colours = picture.split()[: 1 if picture.mode == "LA" else 3]
    if max(int(np.asarray(colour).max()) for colour in colours) < _VISIBLE * 255:
        raise UnusableImage("would be black: no colour reaches 4096 of 65535")


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture on white."""
    if not (picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info):
        return picture
    rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    low, high = rgba.getchannel("A").getextrema()
    if low == 255:
        return rgba.convert("RGB")
    if high == 0:
        raise UnusableImage("is wholly transparent")
    result = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if result.getextrema() == ((255, 255),) * 3:
        raise UnusableImage("is blank, since what is not transparent is white")
    return result


def _fitted(picture: Image.Image, size: Size | None, crop: int | None) -> Image.Image:
    if crop is not None:
        if crop > min(picture.size):
            raise UnusableImage(f"has {picture.height}×{picture.width} pixels, fewer than the crop of {crop}")
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return picture
