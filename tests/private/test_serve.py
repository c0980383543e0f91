from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fairline.errors import FairlineError
from fairline.private.serve import Preprocessing, read_images
from tests.data.pictures import encoded, gradient


def test_images_are_read_as_the_loaders_read_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = gradient(8, 12)
    (tmp_path / "upright.png").write_bytes(encoded(pixels))
    (tmp_path / "phone.png").write_bytes(encoded(np.ascontiguousarray(np.rot90(pixels)), exif=exif.tobytes()))
    (tmp_path / "deep.tif").write_bytes(encoded(pixels[..., 0].astype(np.uint16) * 257))
    files = sorted(tmp_path.iterdir())
    colour = Preprocessing(shape=(3, 8, 12), mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b"))
    read = read_images(files, colour)
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert read.shape == (3, 3, 8, 12)
    torch.testing.assert_close(read[2], expected)
    assert torch.equal(read[1], read[2])
    torch.testing.assert_close(read[0], expected[:1].expand(3, -1, -1))
    grey = Preprocessing(shape=(1, 4, 6), mean=(0.0,), std=(1.0,), class_names=("a", "b"))
    assert read_images(files, grey).shape == (3, 1, 4, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.png: file does not exist"),
        (b"<html>", "a.png: not a readable image"),
        (encoded(np.full((4, 4), 900, np.uint16)), "a.png: would be black"),
    ],
)
def test_what_is_no_image_is_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    preprocessing = Preprocessing(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3, class_names=("a", "b"))
    with pytest.raises(FairlineError, match=message):
        read_images([tmp_path / "a.png"], preprocessing)
