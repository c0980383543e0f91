"""``fairline train --weights`` and ``fairline import``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fairline._io import load_tensors, read_json
from fairline.models import build
from fairline.runs import load_network
from tests.commands import TRAIN, ok
from tests.weights.test_files import Trap

CNN = [*TRAIN[:7], "--epochs", "0"]


def cnn(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("cnn", 10, 1, 8, width=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    state = {f"module.{name}": value for name, value in cnn().state_dict().items()}
    torch.save({"epoch": 9, "state_dict": state}, folder / "checkpoint.pth.tar")
    ok(*CNN, "--weights", folder / "checkpoint.pth.tar", "--out", folder / "base")
    return folder / "base"


def test_a_checkpoint_is_taken_as_it_is(base):
    taken = load_tensors(base / "networks" / "base" / "model.safetensors")[0]
    assert taken.keys() == cnn().state_dict().keys()
    assert all(torch.equal(value, taken[name]) for name, value in cnn().state_dict().items())


def test_bad_files_are_one_sentence(refused, base, tmp_path):
    torch.save(cnn().state_dict(), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("weights: none")
    torch.save({"state_dict": cnn().state_dict(), "hook": Trap(tmp_path / "sprung")}, tmp_path / "code.pt")
    torch.save(cnn(), tmp_path / "module.pt")
    torch.save(build("cnn", 10, 1, 8, width=8).state_dict(), tmp_path / "wide.pt")
    for name, words in (
        ("cut.pt", "not a whole file"),
        ("empty.pt", "is empty"),
        ("text.pt", "is neither"),
        ("code.pt", "holds more than weights"),
        ("module.pt", ".state_dict()"),
        ("wide.pt", "'0.weight' has shape (8, 1, 3, 3) there and (4, 1, 3, 3) in the model"),
        ("none.pt", "does not exist"),
        ("", "is a folder"),
    ):
        said = refused(*CNN, "--weights", tmp_path / name, "--out", tmp_path / "out")
        assert words in said
        assert words in refused("import", base, "--weights", tmp_path / name, "--out", tmp_path / "out")
    assert "cuts no ReLU" in refused("import", base, "--out", tmp_path / "out")
    assert "cuts no ReLU" in refused("import", base, "--weights", tmp_path / "whole.pt", "--out", tmp_path / "out")
    np.savez(tmp_path / "masks.npz", np.ones((4, 8, 8)))
    assert "it holds 1 tensors" in refused("import", base, "--masks", tmp_path / "masks.npz", "--out", tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def test_a_network_linearized_elsewhere_goes_the_whole_way(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 8, 8), (1, 8, 4, 4), (1, 16, 2, 2)]
    masks = [(torch.rand(shape, generator=generator) < 0.2).float() for shape in shapes]
    kept = sum(int(mask.sum()) for mask in masks)
    state = cnn(1).state_dict() | {f"alpha{place}.alphas": mask for place, mask in enumerate(masks)}
    torch.save({"state_dict": state}, tmp_path / "snl.pth.tar")
    said = ok("import", base, "--weights", tmp_path / "snl.pth.tar", "--out", tmp_path / "snl")
    assert f"{kept} of 448 ReLUs" in said
    network, info = load_network(tmp_path / "snl" / "networks" / f"budget-{kept}")
    assert (info.relus, info.total, info.method, info.stage) == (kept, 448, "imported", "linearized")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in cnn(1).state_dict().items())
    ok("finetune", tmp_path / "snl", "--epochs", "1", "--out", tmp_path / "students")
    ok("audit", tmp_path / "students", "--resamples", "50", "--out", tmp_path / "audit")
    np.savez(tmp_path / "masks.npz", *masks)
    said = ok("import", base, "--masks", tmp_path / "masks.npz", "--out", tmp_path / "masks")
    assert f"{kept} of 448 ReLUs" in said
    again = load_network(tmp_path / "masks" / "networks" / f"budget-{kept}")[0]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in cnn(0).state_dict().items())


def test_a_network_of_the_published_code_keeps_its_masks(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch.nn as nn\n"
        "from tests.weights.networks import Alpha\n"
        "def network(num_classes):\n"
        "    first = nn.Conv2d(1, 4, 3, padding=1)\n"
        "    return nn.Sequential(first, Alpha(4, 8), nn.Flatten(), nn.Linear(256, num_classes))\n"
    )
    mask = (torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))
    state = {"0.weight": model[0].weight, "0.bias": model[0].bias, "1.alphas": mask}
    state |= {"3.weight": model[2].weight, "3.bias": model[2].bias}
    torch.save({"state_dict": state}, tmp_path / "snl.pth.tar")
    own = [*TRAIN[:4], f"{tmp_path}/mine.py:network", "--weights", tmp_path / "snl.pth.tar"]
    ok(*own, "--epochs", "0", "--out", tmp_path / "base")
    info = read_json(tmp_path / "base" / "networks" / "base" / "network.json")
    assert (info["relus"], info["total"]) == (int(mask.sum()), 256)
    network, _ = load_network(tmp_path / "base" / "networks" / "base")
    assert torch.equal(network.get_submodule("1").kept, mask[0].bool())
    ok(*own, "--epochs", "1", "--out", tmp_path / "trained")
    network, _ = load_network(tmp_path / "trained" / "networks" / "base")
    assert torch.equal(network.get_submodule("1").kept, mask[0].bool())
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["weights"]["digest"]
