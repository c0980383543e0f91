"""Weights trained elsewhere, taken as they are: what is said of them at once."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fairline._io import read_json
from fairline.data import IMAGENET, GroupedData
from fairline.errors import FairlineError
from fairline.jobs import train_job
from fairline.jobs.first_look import first_look
from fairline.models import build
from fairline.runs import DataSpec

#: As the network was trained; the data sort them.
ORDER = ["neutral", "happy", "sad", "surprise", "fear", "disgust", "angry"]
CPU = torch.device("cpu")

BLOCKS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.short(x))
"""
MINE = """
from torch import nn
from blocks import Block

class Net(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.layers = nn.Sequential(Block(4, 8, 2), Block(8, 16, 2))
        self.fc = nn.Linear(16 * 4 * 4, num_classes)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).flatten(1))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(run_here):
    """A command in this process, and what it said on one line."""

    def run(*arguments) -> Done:
        done = run_here(*arguments)
        return Done(done.returncode, *(" ".join(said.split()) for said in (done.stdout, done.stderr)))

    return run


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """A folder of photographs of two sizes, and a network that was trained on them at 64×64 by ImageNet's scale."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "blocks.py").write_text(BLOCKS)
    (folder / "mine.py").write_text(MINE)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 216, (7, 8, 8, 3))
    rows, pixels = [], []
    for number in range(420):
        label = number % 7
        noisy = np.kron(patterns[label], np.ones((8, 8, 1))) + rng.normal(0, 30, (64, 64, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pixels.append(np.asarray(image))
        # One that must be made smaller again.
        (image.resize((128, 128)) if number == 5 else image).save(folder / "images" / f"{number}.png")
        rows.append([f"{number}.png", ORDER[label], "old" if rng.random() < 0.3 else "young"])
    with (folder / "images" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "label", "group"], *rows])
    (folder / "classes.txt").write_text("\n".join(ORDER))
    torch.manual_seed(0)
    net = build(f"{folder}/mine.py:Net", 7)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in IMAGENET)
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    labels = torch.arange(420) % 7
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for batch in torch.randperm(420).split(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.save({"state_dict": net.state_dict(), "epoch": 4}, folder / "mine.pth")
    return folder


def taken(story: Path) -> list[str]:
    data = ["--data", "folder", "--root", story / "images", "--groups", "group"]
    return ["train", *data, "--model", f"{story}/mine.py:Net", "--weights", story / "mine.pth", "--epochs", "0"]


def test_the_whole_story(story, tmp_path, run):
    done = run(*taken(story), "--out", tmp_path / "first")
    assert done.code == 0, done.err
    first = read_json(tmp_path / "first" / "first_look.json")
    # The size is that of the weights, whatever the images have.
    assert first["image_size"] == [64, 64]
    assert "near chance" in done.err
    assert "The outputs look permuted" in done.err
    assert "output 0 looks like 'neutral', output 1 looks like 'happy'" in done.err
    assert first["order"] == ORDER == (tmp_path / "first" / "classes.txt").read_text().split()
    assert "It can be exported" in done.out
    right = [*taken(story), "--classes", tmp_path / "first" / "classes.txt", "--normalization", "imagenet"]
    done = run(*right, "--out", tmp_path / "base")
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    for words in ("accuracy by group, validation part", "recall by class, validation part", "surprise", "old"):
        assert words in done.out
    found = read_json(tmp_path / "base" / "first_look.json")
    assert found["accuracy"]["overall"]["value"] > 0.9
    assert list(found["recall"]) == ORDER
    assert sum(each["n"] for each in found["recall"].values()) == found["accuracy"]["overall"]["n"]
    config = read_json(tmp_path / "base" / "config.json")
    assert (tuple(config["data"]["mean"]), tuple(config["data"]["std"])) == IMAGENET
    assert set(config["model"]["files"]) == {"mine.py", "blocks.py"}
    cut = run("linearize", tmp_path / "base", "--budgets", "0.5", "--method", "random", "--out", tmp_path / "cut")
    assert "of 2,560 ReLUs" in cut.out
    run("private", "export", tmp_path / "base", "--out", tmp_path / "export")
    shown = read_json(tmp_path / "export" / "public" / "images.json")
    assert (shown["class_names"], tuple(shown["mean"]), shown["shape"]) == (ORDER, IMAGENET[0], [3, 64, 64])
    assert run(*right, "--out", tmp_path / "base").out == done.out
    (story / "blocks.py").write_text(f"{BLOCKS}# more\n")
    again = run(*right, "--out", tmp_path / "base")
    assert again.code == 2
    assert "model.files.blocks.py is" in again.err
    later = run("linearize", tmp_path / "base", "--budgets", "0.5", "--out", tmp_path / "later")
    assert later.code == 2
    assert "blocks.py is not what it was" in later.err
    (story / "blocks.py").write_text(BLOCKS)


def test_conflicting_options_are_one_sentence(story, tmp_path, run):
    for more, said in (
        (["--normalization", "none", "--mean", "0", "--std", "1"], "given twice"),
        (["--mean", "0.5"], "--mean needs --std"),
        (["--mean", "0.5,0.5", "--std", "0.2"], "has 2 numbers, but the images have 3 channels"),
        (["--normalization", "none", "--data-option", "normalization=imagenet"], "'normalization' is given twice"),
        (["--classes", str(story / "mine.py")], "has no class"),
    ):
        done = run(*taken(story), *more, "--out", tmp_path / "out")
        assert done.code == 2, done.err
        assert said in done.err
        assert not (tmp_path / "out").exists()


POOLED = """
from torch import nn
def net(num_classes):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, num_classes)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), *pooled)
"""


@pytest.mark.parametrize("weights", [True, False])
def test_a_size_that_nothing_says_is_asked_for(story, tmp_path, weights):
    (tmp_path / "pooled.py").write_text(POOLED)
    model = f"{tmp_path}/pooled.py:net"
    given = {"weights": tmp_path / "pooled.pth"} if weights else {}
    torch.save(build(model, 7).state_dict(), tmp_path / "pooled.pth")
    data = DataSpec("folder", str(story / "images"))
    with pytest.raises(FairlineError, match=r"differ in size .*64×64 and 128×128.*--image-size 64"):
        train_job(tmp_path / "out", data, model, epochs=0 if weights else 1, **given)
    asked = replace(data, options={"image_size": 16})
    run = train_job(tmp_path / "out", asked, model, epochs=0 if weights else 1, **given)
    assert run.config["model"]["image_size"] == 16


def test_images_of_one_size_keep_it(story, tmp_path):
    (tmp_path / "images").mkdir()
    rows = ["file_name,label"]
    for number in range(40):
        Image.fromarray(np.full((20, 24, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"{number}.png,{number % 2}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "pooled.py").write_text(POOLED)
    data = DataSpec("folder", str(tmp_path / "images"))
    run = train_job(tmp_path / "out", data, f"{tmp_path}/pooled.py:net", epochs=1)
    assert run.config["model"]["image_size"] == [20, 24]
    # A network of this package has a size of its own.
    assert train_job(tmp_path / "cnn", data, "cnn", {"width": 2}, epochs=1).config["model"]["image_size"] == 32


def test_weights_of_another_architecture_are_said_to_be_so(story, tmp_path):
    torch.save(build("cnn", 7, width=2).state_dict(), tmp_path / "cnn.pth")
    with pytest.raises(FairlineError, match="weights of another architecture"):
        train_job(
            tmp_path / "out",
            DataSpec("folder", str(story / "images")),
            f"{story}/mine.py:Net",
            weights=tmp_path / "cnn.pth",
            epochs=0,
        )


class Seen(nn.Module):
    """Outputs of images whose pixels tell their label."""

    def __init__(self, classes: int, wrong: Tensor, mean: float = 0.0, std: float = 1.0, order=None) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(classes) if order is None else torch.tensor(order))
        self.register_buffer("wrong", wrong)
        self.mean, self.std, self.classes = mean, std, classes

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x[:, 0, 0, 0] * self.std + self.mean) * 255
        shift = self.wrong[(x[:, 0, 1, 1] * self.std + self.mean).mul(255).round().long().clamp(0, 255)]
        label = (pixels / 20 - 1).round().long().clamp(0, self.classes - 1)
        return nn.functional.one_hot(self.order[(label + shift) % self.classes], self.classes).float()


def parts_of(classes: int, n: int = 250) -> dict[str, GroupedData]:
    images = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    images[:, 0, 0, 0] = (20 * (labels + 1)).to(torch.uint8)
    images[:, 0, 1, 1] = torch.arange(n).to(torch.uint8)
    names = tuple(f"c{label}" for label in range(classes))
    data = GroupedData(images, labels, labels, names, names, mean=(0.0,), std=(1.0,))
    return {"train": data, "val": data}


def errors(share: float, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(256, generator=generator) < share
    return torch.where(wrong, torch.randint(1, classes, (256,), generator=generator), 0)


@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_network_that_is_read_right_is_not_doubted(classes, share):
    found = first_look(Seen(classes, errors(share, classes)), parts_of(classes), CPU)
    assert found["warnings"] == []
    assert found["order"] is None
    assert abs(found["accuracy"]["overall"]["value"] - (1 - share)) < 0.1


@pytest.mark.parametrize(
    ("classes", "order"), [(2, [1, 0]), (5, [1, 0, 2, 3, 4]), (10, [3, 4, 5, 6, 7, 8, 9, 0, 1, 2])]
)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_permuted_outputs_are_named(classes, order, share):
    found = first_look(Seen(classes, errors(share, classes), order=order), parts_of(classes), CPU)
    # Output order[i] stands for class i.
    assert found["order"] == [f"c{order.index(place)}" for place in range(classes)]
    said = found["warnings"][-1]
    assert f"output {order[0]} looks like 'c0'" in said
    moved = sum(place != each for place, each in enumerate(order))
    assert said.count("looks like") == moved
    assert ("near chance" in found["warnings"][0]) == (moved == classes)


def test_pixels_of_another_scale_are_named():
    found = first_look(Seen(5, errors(0.1, 5), 0.5, 0.5), parts_of(5), CPU)
    (said,) = (each for each in found["warnings"] if "scale" in each)
    assert "--mean 0.5 --std 0.5" in said
    assert found["order"] is None
    both = first_look(Seen(5, errors(0.1, 5), 0.5, 0.5, [1, 2, 3, 4, 0]), parts_of(5), CPU)
    assert both["order"] == ["c4", "c0", "c1", "c2", "c3"]
    assert "--mean 0.5 --std 0.5" in both["warnings"][-1]


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_guesses_are_near_chance_and_no_order_is_made_up(classes):
    class Guesses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), classes)

    data = parts_of(classes)
    for seed in range(5):
        torch.manual_seed(seed)
        (said,) = first_look(Guesses(), data, CPU)["warnings"]
        assert "near chance" in said


def test_what_stands_in_the_way_of_an_export_is_said():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2].tanh()

    found = first_look(Odd(), parts_of(2), CPU)
    assert not found["exports"]
    assert "cannot be exported for private inference yet: Private inference has no operator" in found["export"]
