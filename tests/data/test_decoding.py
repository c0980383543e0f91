from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fairline.data.decoding import UnusableImage, decode_image, quiet_pillow, to_uint8
from tests.data.pictures import encoded, gradient, tiff

LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "WEBP": {"lossless": True, "exact": True},
    "JPEG2000": {"irreversible": False},
}
PIXELS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


@settings(max_examples=60)
@given(pixels=PIXELS, kind=st.sampled_from(sorted(LOSSLESS)))
def test_lossless_files_hold_what_was_written(pixels, kind):
    assert np.array_equal(decode_image(encoded(pixels, kind, **LOSSLESS[kind])), pixels)


@settings(max_examples=60)
@given(
    pixels=PIXELS,
    mode=st.sampled_from(["1", "L", "P", "LA", "RGBA", "RGB"]),
    kind=st.sampled_from(["PNG", "TIFF", "WEBP"]),
)
def test_every_mode_is_read_as_it_is_seen(pixels, mode, kind):
    """An opaque picture of any mode is that mode's own RGB."""
    picture = Image.fromarray(pixels).convert(mode)
    if kind == "WEBP" and mode in ("1", "P"):
        picture = picture.convert("RGB")
    raw = encoded(picture, kind, **LOSSLESS.get(kind, {}))
    assert np.array_equal(decode_image(raw), np.asarray(picture.convert("RGB")))
    grey = decode_image(raw, channels=1)
    assert np.array_equal(grey[..., 0], np.asarray(picture.convert("RGB").convert("L")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_applied(kind, orientation):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    # How the camera held the sensor: the inverse of what the tag asks for.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    picture = Image.fromarray(upright)
    stored = picture.transpose(undo[orientation]) if orientation in undo else picture
    options = {"JPEG": {"quality": 100, "subsampling": 0}, **LOSSLESS}[kind]
    pixels = decode_image(encoded(stored, kind, exif=exif if kind == "TIFF" else exif.tobytes(), **options))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (0 if kind != "JPEG" else 12)


@settings(max_examples=40)
@given(values=hnp.arrays(np.uint16, (5, 7)), kind=st.sampled_from(["PNG", "TIFF", "JPEG2000"]))
def test_grey_of_16_bits_is_scaled_or_refused_as_black(values, kind):
    raw = encoded(values, kind, **({"irreversible": False} if kind == "JPEG2000" else {}))
    if values.max() < 65535 / 16:
        with pytest.raises(UnusableImage, match="would be black: its largest value is"):
            decode_image(raw)
        values.fill(0)
        values[0, 0] = 4095
        raw = encoded(values, "PNG")
        assert decode_image(raw, white=4095).max() == 255
    else:
        assert np.array_equal(decode_image(raw)[..., 1], np.rint(values / 257).astype(np.uint8))


def test_colours_of_16_bits():
    def png(value: int) -> bytes:
        """2×2 pixels of one colour; Pillow writes none of 16 bits."""

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        rows = 2 * (b"\0" + 2 * struct.pack(">HHH", value, value // 2, 0))
        header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    assert decode_image(png(60_000))[0, 0].tolist() == [234, 117, 0]
    with pytest.raises(UnusableImage, match="would be black: no colour reaches 4096"):
        decode_image(png(4000))
    with pytest.raises(UnusableImage, match="white of 65535 alone"):
        decode_image(png(4000), white=4095)


def test_tiffs_of_other_numbers():
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    expected = np.rint(ramp * 255).astype(np.uint8)
    assert np.array_equal(decode_image(tiff(ramp, sample_format=3))[..., 0], expected)
    assert np.array_equal(decode_image(tiff(200 * ramp, sample_format=3), white=200)[..., 0], expected)
    # White is zero.
    assert np.array_equal(decode_image(tiff(ramp, sample_format=3, photometric=0))[..., 0], 255 - expected)
    deep = (ramp * 65535).astype("<u2")
    assert np.array_equal(decode_image(tiff(deep, photometric=0))[..., 0], 255 - np.rint(deep / 257).astype(np.uint8))
    with pytest.raises(UnusableImage, match="would be white: its largest value is 4095 of 65535"):
        decode_image(tiff(deep // 16, photometric=0))
    for values, kind, message in [
        (255 * ramp, 3, "values from 0 to 255, outside of 0 .black. to 1 .white."),
        (ramp - 0.5, 3, "values from -0.5 to 0.5, outside"),
        (np.full((3, 4), np.nan, np.float32), 3, "not finite"),
        (deep.astype("<i2") // 3, 2, "does not tell which is white"),
        (deep.astype("<u4"), 1, "does not tell which is white"),
        (ramp.astype("<f8"), 3, "not a readable image"),
    ]:
        with pytest.raises(UnusableImage, match=message):
            decode_image(tiff(values, sample_format=kind))
    assert decode_image(tiff(deep.astype("<u4")), white=65535).max() == 255


def test_transparency_lies_on_white():
    pixels = np.dstack([gradient(), np.full((8, 12), 255, np.uint8)])
    pixels[:4, :, 3] = 0
    pixels[4, :, 3] = 128
    for raw in (encoded(pixels), encoded(pixels, "TIFF"), encoded(pixels, "WEBP", lossless=True, exact=True)):
        read = decode_image(raw)
        assert (read[:4] == 255).all()
        assert np.abs(read[4].astype(float) - (pixels[4, :, :3] / 2 + 127.5)).max() <= 1.5
        assert np.array_equal(read[5:], pixels[5:, :, :3])
    palette = Image.fromarray(gradient()).quantize(8)
    seen = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    for transparency in (0, bytes([0, *[255] * 7])):
        read = decode_image(encoded(palette, transparency=transparency))
        assert np.array_equal(read, np.where((index == 0)[..., None], 255, seen))
    grey = encoded(Image.fromarray(gradient()[..., 0]), transparency=int(gradient()[0, 0, 0]))
    assert decode_image(grey)[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(UnusableImage, match="wholly transparent"):
        decode_image(encoded(np.zeros((4, 4, 4), np.uint8)))
    glyph = np.full((4, 4, 4), 255, np.uint8)
    glyph[0, 0, 3] = 0
    with pytest.raises(UnusableImage, match="blank"):
        decode_image(encoded(glyph))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
def test_jpegs_of_every_colour_space(mode):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = [220, 40, 30]
    pixels[8:] = [240, 240, 240]
    picture = Image.fromarray(pixels).convert(mode)
    read = decode_image(encoded(picture, "JPEG", quality=95, subsampling=0))
    assert np.abs(read.astype(int) - np.asarray(picture.convert("RGB"))).max() < 25


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_pictures_in_one_file_are_refused(kind):
    frames = [Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)) for i in range(3)]
    with pytest.raises(UnusableImage, match="holds several pictures"):
        decode_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert decode_image(encoded(frames[1], kind, **({"lossless": True} if kind == "WEBP" else {}))).max() == 50


def test_a_cameras_mpo_is_its_first_picture():
    frames = [Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)) for i in (2, 1)]
    raw = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(raw).astype(int) - 100).max() < 3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG2000", {}),
        ("JPEG2000", {"no_jp2": True}),
        ("AVIF", {}),
    ],
)
def test_a_file_cut_short_is_refused_or_whole(kind, options):
    pixels = np.random.default_rng(0).integers(1, 256, (12, 12, 3), dtype=np.uint8)
    raw = encoded(pixels, kind, **options)
    with quiet_pillow():
        whole = decode_image(raw)
        for length in range(len(raw)):
            try:
                read = decode_image(raw[:length])
            except UnusableImage:
                continue
            assert np.array_equal(read, whole), length


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "file is empty"),
        (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE ht'"),
        (b"version https://git-lfs.github.com", "it begins with b'version http'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
    ],
)
def test_what_is_no_image_is_refused(raw, message):
    with pytest.raises(UnusableImage, match=message):
        decode_image(raw)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with quiet_pillow():
        assert decode_image(encoded(gradient(8, 8))).shape == (8, 8, 3)
        with pytest.raises(UnusableImage, match="exceeds limit"):
            decode_image(encoded(gradient(10, 10)))


def test_crop_and_size():
    pixels = gradient(20, 30)
    assert np.array_equal(decode_image(encoded(pixels), crop=10), pixels[5:15, 10:20])
    assert decode_image(encoded(pixels), size=(6, 4)).shape == (6, 4, 3)
    assert decode_image(encoded(pixels), channels=1, size=(6, 4)).shape == (6, 4, 1)
    with pytest.raises(UnusableImage, match="has 20×30 pixels, fewer than the crop of 21"):
        decode_image(encoded(pixels), crop=21)


def test_pillow_images_arrays_and_tensors_are_one_picture():
    pixels = gradient()
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    palette = Image.fromarray(pixels).quantize(200)
    assert torch.equal(to_uint8(Image.fromarray(pixels)), expected)
    assert torch.equal(to_uint8(palette), torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1))
    assert to_uint8(Image.fromarray(pixels).convert("RGBA")).shape == (3, 8, 12)
    assert to_uint8(Image.fromarray(pixels).convert("1")).unique().tolist() == [0, 255]
    assert to_uint8(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)).tolist() == [pixels[..., 0].tolist()]
    turned = Image.open(io.BytesIO(encoded(pixels, exif=_turned())))
    assert to_uint8(turned).shape == (3, 12, 8)
    with pytest.raises(UnusableImage, match=r"\(3, 8, 12\), not \(H, W, C\)"):
        to_uint8(expected.numpy())
    with pytest.raises(UnusableImage, match="not an image"):
        to_uint8("photo.jpg")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()
