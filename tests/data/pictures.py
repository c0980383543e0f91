"""Image files as people have them, written from pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 8, width: int = 12) -> np.ndarray:
    """Pixels (H, W, 3), all different, so that a turned or mirrored picture is another one."""
    values = np.arange(height * width * 3) * 255 // (height * width * 3 - 1)
    return values.astype(np.uint8).reshape(height, width, 3)


def tiff(values: np.ndarray, *, photometric: int = 1, sample_format: int = 1, bits: int | None = None) -> bytes:
    """A grey, uncompressed TIFF of any sample type, which Pillow cannot write itself."""
    height, width = values.shape
    data = values.tobytes()
    bits = bits or 8 * values.dtype.itemsize
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    entries |= {279: len(data), 339: sample_format}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + data
