"""Masks from dicts, lists and files: by name or in order, and never into the wrong layer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.models import build
from fairline.weights import import_masks
from tests.weights.networks import EXAMPLE, published, small


def masked():
    return mask_relus(small(0), EXAMPLE)


def random_masks(seed: int, layers) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.shape, generator=generator) < 0.4 for name, layer in layers.items()}


@settings(max_examples=60)
@given(
    named=st.booleans(),
    suffix=st.sampled_from(["", ".mask", ".alphas", ".kept"]),
    prefix=st.sampled_from(["", "module.", "net.student."]),
    batch=st.booleans(),
    dtype=st.sampled_from([torch.bool, torch.float32, torch.float64, torch.uint8, torch.int64]),
    kind=st.sampled_from(["dict", "list", "npz", "npz in order", "torch", "safetensors"]),
)
def test_masks_come_back_from_any_form(named, suffix, prefix, batch, dtype, kind):
    model = masked()
    layers = masked_relus(model)
    expected = random_masks(3, layers)
    names = [f"{prefix}{name}{suffix}" if named else f"masks.{place}" for place, name in enumerate(layers)]
    tensors = {
        key: (mask[None] if batch else mask).to(dtype) for key, mask in zip(names, expected.values(), strict=True)
    }
    arrays = {key: value.numpy() for key, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "masks.npz" if kind.startswith("npz") else "masks")
        if kind == "npz":
            np.savez(path, **arrays)
        elif kind == "npz in order":
            np.savez(path, *arrays.values())
        elif kind == "torch":
            torch.save({"masks": tensors, "epoch": 3}, path)
        elif kind == "safetensors":
            save_file(tensors, path)
        given = {"dict": arrays, "list": list(tensors.values())}.get(kind, path)
        chosen = import_masks(model, given)
    assert list(chosen) == list(layers)
    assert all(torch.equal(layer.kept, expected[name]) for name, layer in layers.items())


def test_masks_of_channels_and_layers_are_spread():
    model = masked()
    channels = torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1)
    import_masks(model, {"relu1": channels, "block.2": torch.zeros(1, 1, 1)})
    layers = masked_relus(model)
    assert torch.equal(layers["relu1"].kept, channels.bool().expand(4, 8, 8))
    assert layers["block.2"].num_kept == 0


def test_a_checkpoint_of_the_published_code_masks_our_resnet(tmp_path):
    """Its layers are called alpha1 and alpha2 where ours are called relu1 and relu2."""
    model = mask_relus(build("resnet18", 5, 3, 8, width=4), EXAMPLE)
    layers = masked_relus(model)
    expected = random_masks(0, layers)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("kept")}
    for name, mask in expected.items():
        state[name.replace("relu", "alpha") + ".alphas"] = mask[None].float()
    torch.save({"arch": "resnet18_in", "state_dict": state}, tmp_path / "snl_best_checkpoint.pth.tar")
    chosen = import_masks(model, tmp_path / "snl_best_checkpoint.pth.tar")
    assert chosen["layer1.0.relu1"] == "state_dict.layer1.0.alpha1.alphas"
    assert all(torch.equal(layer.kept, expected[name]) for name, layer in layers.items())


def test_numbers_of_two_digits_are_an_order(tmp_path):
    model = mask_relus(build("resnet18", 5, 3, 8, width=4), EXAMPLE)
    layers = masked_relus(model)
    expected = random_masks(0, layers)
    save_file({f"alpha{place}": mask for place, mask in enumerate(expected.values())}, tmp_path / "m.safetensors")
    assert len(layers) > 10
    import_masks(model, tmp_path / "m.safetensors")
    assert all(torch.equal(layer.kept, expected[name]) for name, layer in layers.items())


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([torch.ones(4, 8, 8)], r"2 layers of ReLUs \('relu1', 'block\.2'\).*it holds 1 tensors"),
        ([], "it holds 0 tensors"),
        ([torch.ones(4, 8, 8), torch.ones(4, 8, 4)], r"'1' has shape \(4, 8, 4\), the activation of 'block\.2'"),
        ({"relu1": torch.ones(4, 8, 8)}, "none is named after 'block.2'"),
        ({"relu1.a": torch.ones(4, 8, 8), "relu1.b": torch.ones(4, 8, 8)}, "none is named after 'block.2'"),
        (
            {"relu1.a": torch.ones(4, 8, 8), "relu1.b": torch.ones(4, 8, 8), "block.2": torch.ones(4, 8, 8)},
            "several are named after one layer",
        ),
        ([torch.ones(4, 8, 8), torch.full((4, 8, 8), 0.25)], r"'block\.2' holds 0\.25, not zeros and ones"),
        ([torch.ones(4, 8, 8), torch.full((4, 8, 8), torch.nan)], "holds nan"),
        ({"a": np.array(["x"])}, "not of numbers"),
        (
            {f"{kind}{i}": torch.ones(4, 8, 8) for i in range(2) for kind in ("alpha", "beta")},
            "several sets of tensors fit",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_changes(masks, words):
    model = masked()
    with pytest.raises(FairlineError, match=words):
        import_masks(model, masks)
    assert relu_count(model) == 512


def test_safetensors_keep_no_order(tmp_path):
    save_file({"b": torch.ones(4, 8, 8), "a": torch.zeros(4, 8, 8)}, tmp_path / "m.safetensors")
    with pytest.raises(FairlineError, match="does not hold the masks"):
        import_masks(masked(), tmp_path / "m.safetensors")


def test_a_network_without_masks_is_refused():
    with pytest.raises(FairlineError, match="Small has no masks to set; mask it first"):
        import_masks(small(0), [])


def test_masks_of_a_published_checkpoint(tmp_path):
    expected = published(4)
    torch.save({"state_dict": expected.state_dict()}, tmp_path / "snl.pth.tar")
    model = masked()
    import_masks(model, tmp_path / "snl.pth.tar")
    assert torch.equal(masked_relus(model)["relu1"].kept, expected.relu1.alphas[0].bool())
