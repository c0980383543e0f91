"""Every architecture of ``tests/architectures.py``: masked it is what it was, and goes all the way."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU, copy_model, layer_table, mask_relus, masked_relus, relu_count
from tests.architectures import ARCHITECTURES, STEPS, journey
from tests.reference.relus import everything

MASKED = {name: (make, count) for name, (make, count) in ARCHITECTURES.items() if count is not None}

#: Where an export ends, and on what.
NOT_EXPORTED = {
    "SE-Net (one ReLU object)": "no operator 'sigmoid'",
    "U-Net": "no operator 'conv_transpose2d'",
    "CNN with a transformer encoder": "no operator 'transpose'",
    "ViT with ReLU": "cannot be exported",
    "Siamese (a shared encoder)": "no operator 'getitem'",
    "hooks": "no operator 'pad'",
    "spectral_norm and parametrizations": "input that does not come from the image",
    "DropPath and dropout of channels": "a factor that is not a number",
    "logits in a tuple": "no 'sub' with a constant",
    "a recurrence with a shared ReLU": "cannot be exported",
    "nn.RNN with tanh": "no operator 'permute'",
    "ReLU, Hardswish, GELU, PReLU and clamp": "no operator 'hardswish'",
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_it_is_the_same_function_in_both_modes(name):
    make, count = MASKED[name]
    torch.manual_seed(0)
    model, images = make(), torch.randn(4, 3, 16, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    masked = mask_relus(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert relu_count(masked) == sum(total for _, _, total in layer_table(masked)) == count
    assert isinstance(masked, type(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(model.state_dict()) <= set(masked.state_dict())
    model = copy_model(model)
    for training in (True, False, True):
        for seed in range(2):
            expected = everything(model, images, training=training, seed=seed)
            found = everything(masked, images, training=training, seed=seed)
            for key, value in expected.items():
                other = found[key]
                assert (value is None) == (other is None), key
                # torch's transformer layers have another way of their own in evaluation.
                assert value is None or torch.allclose(value, other, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", MASKED)
def test_each_mask_acts_on_its_relu_alone(name):
    """Cut one layer at a time: outputs move, also while training, in a copy, and back when it is restored."""
    make, _ = MASKED[name]
    torch.manual_seed(1)
    images = torch.randn(4, 3, 16, 16)
    masked = mask_relus(make(), images)
    for each in masked.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    for training in (False, True):
        whole = everything(masked, images, training=training, seed=0)["output 0"]
        for key, layer in masked_relus(masked).items():
            inputs: list[torch.Tensor] = []
            handle = layer.register_forward_hook(lambda _, args, output, inputs=inputs: inputs.append(args[0]))
            layer.set_mask(torch.tensor(False))
            cut = everything(copy.deepcopy(copy_model(masked)), images, training=training, seed=0)["output 0"]
            handle.remove()
            layer.set_mask(torch.tensor(True))
            # Once, and again where a checkpoint runs it a second time.
            assert len(inputs) in ((1, 2) if training else (1,)), key
            assert inputs[0].shape == (4, *layer.shape)
            assert not (inputs[0] < 0).any() or not torch.equal(cut, whole), key
        assert torch.equal(everything(masked, images, training=training, seed=0)["output 0"], whole) or training


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_way(name, tmp_path, caplog):
    make, count = ARCHITECTURES[name]
    found = journey(make, tmp_path)
    if count is None:
        assert list(found) == ["mask"]
        sentence = found["mask"]
    else:
        assert list(found)[: STEPS.index("export")] == list(STEPS[: STEPS.index("export")])
        assert set(list(found.values())[:-1]) == {"works"}
        sentence = list(found.values())[-1]
        assert NOT_EXPORTED.get(name, "works") in sentence
    assert sentence.count("\n") == 0


def test_what_cannot_be_masked_is_named():
    with pytest.raises(FairlineError, match=r"no ReLU to mask; .* ReLU6 \('stem.2' and 4 more\)"):
        mask_relus(ARCHITECTURES["MobileNetV2 with ReLU6"][0](), torch.zeros(1, 3, 16, 16))
    with pytest.raises(FairlineError, match=r"inside 'rnn' \(RNN\), .* no mask enters"):
        mask_relus(ARCHITECTURES["nn.RNN with ReLU"][0](), torch.zeros(1, 3, 16, 16))


def test_what_else_is_nonlinear_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "fairline"):
        mask_relus(ARCHITECTURES["ReLU, Hardswish, GELU, PReLU and clamp"][0](), torch.zeros(1, 3, 16, 16))
    assert r"Hardswish ('body.3'), GELU ('body.5'), PReLU ('prelu')" in caplog.text
    caplog.clear()
    mask_relus(ARCHITECTURES["VGG with BatchNorm"][0](), torch.zeros(1, 3, 16, 16))
    assert not caplog.text


def test_the_networks_own_parts_stay():
    """Methods, attributes, hooks, per-module modes and defaults."""
    images = torch.randn(4, 3, 16, 16)
    frozen = mask_relus(ARCHITECTURES["a backbone without gradient"][0]().train(), images)
    assert frozen.training
    assert not frozen.backbone.training
    face = mask_relus(ARCHITECTURES["logits in a ModelOutput, labels=None"][0](), images)
    loss = face(pixel_values=images, labels=torch.tensor([0, 1, 2, 3])).loss
    assert loss.requires_grad
    assert face.features(images).shape == (4, 4)
    assert isinstance(face.relu, MaskedReLU)
    hooked = mask_relus(ARCHITECTURES["hooks"][0](), images)
    hooked(images)
    assert hooked.records[0].shape == (4, 4, 16, 16)
