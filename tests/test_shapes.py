"""Images that are not square, through every architecture and from the command line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.models import REGISTRY, build, image_sides, rescaled
from fairline.private import to_graph
from fairline.runs import ModelSpec, NetworkInfo, load_info, load_network, save_network
from fairline.training import random_crop_and_flip
from tests.commands import fairline, ok
from tests.data.pictures import encoded


def example(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("size", [(16, 24), (40, 17), (224, 224)])
def test_every_architecture_takes_them(name, size):
    torch.manual_seed(0)
    model = build(name, 4, image_size=size, width=2).eval()
    images = example(*size)
    masked = mask_relus(model, images).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, output: seen.append(output[0].numel()))
    with torch.no_grad():
        expected = model(images)
    assert expected.shape == (2, 4)
    assert relu_count(masked) == sum(seen)
    torch.testing.assert_close(masked(images), expected)
    for layer in masked_relus(masked).values():
        layer.set_mask(torch.rand(layer.mask.shape) < 0.5)
    with torch.no_grad():
        torch.testing.assert_close(to_graph(masked, images)(images), masked(images), rtol=1e-4, atol=1e-4)


def test_photographs_are_trained_linearized_and_explained():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randint(0, 200, (60, 3, 224, 160), generator=generator) + 50 * labels[:, None, None, None]
    names = ("a", "b")
    data = fl.GroupedData(images.to(torch.uint8), labels, labels.clone(), names, names)
    train, val, test = data.split(0)
    model = build("cnn", 2, image_size=(224, 160), width=2)
    fl.train(model, train, val, epochs=1, batch_size=16)
    (cut,) = fl.Magnitude().linearize(model, train, [0.5])
    fl.finetune(cut.model, model, train, val, epochs=1, batch_size=16)
    assert cut.relus * 2 == relu_count(model, train.normalized(slice(1)))
    report = fl.audit(
        cut.model, test, reference=model, measures=["accuracy", "gradient_norm", "curvature", "boundary_distance"]
    )
    assert report.by_group["gradient_norm"].notna().all()


def test_reshaped_networks_take_them():
    smaller, _ = rescaled(build("resnet18", 4, image_size=(16, 32), width=4), 0.5, 0.5)
    assert relu_count(smaller, example(16, 32)) * 8 == relu_count(build("resnet18", 4, width=4), example(16, 32))


@pytest.mark.parametrize(("size", "stride"), [((15, 64), 1), ((64, 15), 1), (8, 1), ((64, 30), 2)])
def test_what_vgg_cannot_take_is_one_sentence(size, stride):
    with pytest.raises(FairlineError, match=f"need {15 * stride + 1} pixels a side, not"):
        build("vgg19", 4, image_size=size, width=2, stem_stride=stride)
    smallest = (15 * stride + 1, 64)
    assert build("vgg19", 4, image_size=smallest, width=2, stem_stride=stride)(example(*smallest)).shape == (2, 4)


OWN = """
from torch import nn

def layers(in_channels):
    return nn.Conv2d(in_channels, 2, 1), nn.ReLU()

def square(num_classes, in_channels, image_size):
    return nn.Sequential(*layers(in_channels), nn.Flatten(), nn.Linear(2 * image_size**2, num_classes))

def pooled(num_classes, in_channels):
    return nn.Sequential(*layers(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, num_classes))

def small(num_classes, in_channels):
    return nn.Sequential(*layers(in_channels), nn.Flatten(), nn.Linear(2 * 8 * 8, num_classes))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "images").mkdir()
    lines = ["file_name,label,group"]
    for i in range(120):
        pixels = np.random.default_rng(i).integers(0, 120, (9, 14, 3)) + 60 * (i % 2)
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(pixels.astype(np.uint8)))
        lines.append(f"{i}.png,{i % 2},{['None', '<b>'][i // 2 % 2]}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


DATA = ["folder", "--root", "images", "--groups", "group", "--data-option", "image_size=6x8"]
TRAIN = ["train", "--data", *DATA, "--epochs", "1", "--model"]
AUDIT = ["--resamples", "50", "--explain", "--option", "correlation.resamples=50"]


def test_from_the_command_line(folder):
    assert "images of 3×6×8" in ok("data", *DATA, cwd=folder)
    ok(*TRAIN, "cnn", "--width", "2", "--out", "base", cwd=folder)
    spec = json.loads((folder / "base" / "networks" / "base" / "network.json").read_text())["model"]
    assert spec["image_size"] == [6, 8]
    # The same command finds the run finished.
    ok(*TRAIN, "cnn", "--width", "2", "--out", "base", cwd=folder)
    ok("linearize", "base", "--method", "snl", "--budgets", "0.5", "--max-epochs", "1", "--out", "cut", cwd=folder)
    ok("finetune", "cut", "--epochs", "1", "--out", "students", cwd=folder)
    ok("audit", "students", *AUDIT, "--out", "audit", cwd=folder)
    table = pd.read_parquet(folder / "audit" / "audit.parquet")
    assert {"None", "<b>", "overall"} <= set(table["group"])
    student = next((folder / "students" / "networks").iterdir())
    ok("private", "export", student, "--out", "shared", cwd=folder)
    assert json.loads((folder / "shared" / "public" / "images.json").read_text())["shape"] == [3, 6, 8]
    assert load_network(student)[1].relus == load_info(student).total // 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mine.py:square", r"cannot be built with image_size=(6, 8): "),
        ("mine.py:small", "shapes cannot be multiplied"),
        ("vgg19", "they need 16 pixels a side, not 6×8"),
    ],
)
def test_networks_that_take_no_such_images_are_one_sentence(folder, model, message):
    done = fairline(*TRAIN, model, "--out", "base", cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("image_size=", "'image_size=' gives no value; write none for no value."),
        ("image_size=4x", "image_size is pixels (32) or HEIGHTxWIDTH (48x64), not '4x'."),
        ("flip=maybe", "flip is true or false, not 'maybe'."),
    ],
)
def test_options_of_the_data_are_one_sentence(folder, option, message):
    data = ["folder", "--root", "images", "--data-option", option]
    for words in (["data", *data], ["train", "--data", *data, "--out", "base"]):
        done = fairline(*words, cwd=folder)
        assert done.returncode == 2
        assert done.stderr.strip().endswith(message)
        assert "Traceback" not in done.stderr


def test_a_network_of_her_own_that_pools(folder):
    ok(*TRAIN, "mine.py:pooled", "--out", "base", cwd=folder)


def test_a_spec_has_one_form(tmp_path):
    assert ModelSpec("cnn", 2, 3, (8, 8)) == ModelSpec("cnn", 2, 3, 8) == ModelSpec("cnn", 2, 3, [8, 8])
    assert image_sides(8) == image_sides((8, 8)) == (8, 8)
    spec = ModelSpec("cnn", 2, 3, (6, 8), {"width": 2})
    assert spec.example().shape == (2, 3, 6, 8)
    save_network(tmp_path, spec.build(), NetworkInfo(spec, "base", 1, 1, 1))
    assert load_network(tmp_path)[1].model == spec
    old = json.loads((tmp_path / "network.json").read_text())
    old["model"]["image_size"] = 8
    (tmp_path / "network.json").write_text(json.dumps(old))
    assert load_info(tmp_path).model == ModelSpec("cnn", 2, 3, 8, {"width": 2})
    old["model"]["image_size"] = [8, 8, 8]
    (tmp_path / "network.json").write_text(json.dumps(old))
    with pytest.raises(FairlineError, match="does not describe a network"):
        load_info(tmp_path)


def test_crops_move_by_an_eighth_of_the_shorter_side():
    images = torch.zeros(200, 1, 8, 32)
    images[:, :, 4, 16] = 1
    moved = random_crop_and_flip(images, torch.Generator().manual_seed(0), flip=False)
    rows, columns = torch.nonzero(moved[:, 0])[:, 1], torch.nonzero(moved[:, 0])[:, 2]
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([3, 4, 5], [15, 16, 17])
