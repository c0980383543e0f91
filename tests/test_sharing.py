"""Units that share a sign, against the definition unit by unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline._io import load_tensors, save_tensors
from fairline.errors import FairlineError
from fairline.masking import (
    MaskedReLU,
    copy_model,
    layer_table,
    load_masks,
    mask_relus,
    masked_relus,
    patches,
    prototypes,
    relu_count,
    save_masks,
)
from fairline.masking.sharing import Sharing, count_signs, effective
from fairline.masking.sharing import shared_relu as fast
from tests.reference.sharing import block_relu, shared_relu

EXAMPLE = torch.zeros(1, 1, 8, 8)


def sharing(signs: torch.Tensor, kept: torch.Tensor | None = None) -> MaskedReLU:
    layer = MaskedReLU(tuple(signs.shape[1:]))
    layer.share(signs)
    if kept is not None:
        layer.set_mask(kept)
    return layer


@st.composite
def blocks(draw, channels: int = 3):
    return draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=channels, max_size=channels))


@settings(max_examples=60)
@given(blocks(), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_patches_of_any_size_have_the_definitions_value_and_gradient(each, height, width, seed):
    """Also where they do not divide the sides, or are larger than those."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    layer = sharing(patches((3, height, width), each))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(mine), block_relu(theirs, each)
    assert torch.equal(y, expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(mine.grad, theirs.grad)
    assert layer.num_kept == sum(-(-height // h) * -(-width // w) for h, w in each)


@settings(max_examples=60)
@given(st.data())
def test_any_votes_have_the_definitions_value_and_gradient(data):
    units = data.draw(st.integers(1, 12))
    votes = data.draw(st.lists(st.integers(-1, 4), min_size=units, max_size=units))
    decides = [data.draw(st.sampled_from([-1, *votes])) for _ in range(units)]
    signs = torch.tensor([decides, votes])
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    x = torch.randn(3, units, generator=torch.Generator().manual_seed(units), dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer = sharing(signs, kept)
    slow = torch.stack([torch.where(kept, signs[0], -1), signs[1]])
    y, expected = layer(mine), shared_relu(theirs, slow)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(mine.grad, theirs.grad)
    assert layer.num_kept == len({sign for sign, own in zip(decides, kept.tolist(), strict=True) if own} - {-1})
    # Numbered anew, and without signs that decide nothing, it is the same.
    found = layer.effective_signs
    assert torch.equal(fast(x, Sharing.of(found)), y)
    assert count_signs(found) == layer.num_kept
    assert sorted(set(found[0].tolist()) - {-1}) == list(range(layer.num_kept))
    assert torch.equal(effective(found, found[0] >= 0), found)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.4, 1.0]))
def test_a_sign_for_each_unit_is_a_masked_relu(seed, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 4, 5, generator=generator)
    kept = torch.rand(2, 4, 5, generator=generator) < share
    plain = MaskedReLU((2, 4, 5))
    plain.set_mask(kept)
    layer = sharing(patches((2, 4, 5), (1, 1)), kept)
    assert torch.equal(layer(x), plain(x))
    assert layer.num_kept == plain.num_kept


def test_prototype_channels_decide_for_others():
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    layer = sharing(prototypes((3, 2, 2), [1, 1, 2]))
    gate = (x > 0)[:, [1, 1, 2]]
    assert torch.equal(layer(x), torch.where(gate, x, 0.0))
    assert layer.num_kept == 8


def test_what_is_cut_still_votes():
    signs = patches((1, 1, 2), (1, 2))
    layer = sharing(signs, torch.tensor([[[True, False]]]))
    assert layer(torch.tensor([[[[1.0, -3.0]]]])).tolist() == [[[[0.0, -3.0]]]]
    assert layer(torch.tensor([[[[-1.0, 3.0]]]])).tolist() == [[[[-1.0, 3.0]]]]


def test_infinities_other_floats_and_memory_orders():
    layer = sharing(patches((2, 4, 4), (2, 2)))
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(last), layer(x))
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    x[0, 0, 0, 0], x[1, 0, 0, 0] = -torch.inf, torch.inf
    y = layer(x)
    assert (y[0, 0, :2, :2] == 0).all()
    assert y[1, 0, 0, 0] == torch.inf


def test_second_derivatives_and_vmap():
    layer = sharing(patches((1, 2, 4), (2, 2)))
    x = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = torch.func.hessian(lambda v: layer(v[None]).pow(3).sum())(x[0]).view(8, 8)
    assert torch.allclose(hessian, torch.diag(6 * layer(x[:1]).flatten()))
    each = torch.func.vmap(torch.func.grad(lambda v: layer(v[None]).square().sum()))(x)
    torch.testing.assert_close(each, 2 * layer(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5), nn.ReLU())
    return mask_relus(network.eval(), EXAMPLE)


@pytest.fixture
def shared(model):
    copied = copy_model(model)
    layer = masked_relus(copied)["1"]
    layer.share(patches(layer.shape, [(1, 1), (2, 2), (8, 8)]))
    layer.set_mask(torch.tensor([True, True, False]).view(3, 1, 1))
    return copied


def same(a, b):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a(x), b(x))
    assert relu_count(a) == relu_count(b) == 64 + 16 + 5


def test_counts_are_of_signs(model, shared):
    assert relu_count(model) == 197
    assert list(layer_table(shared)) == [("1", 80, 192), ("4", 5, 5)]
    assert "kept=80, deciding 128 units" in repr(shared)


def test_signs_survive_copies_files_and_states(model, shared, tmp_path):
    same(copy_model(shared), shared)
    fresh = copy_model(model)
    fresh.load_state_dict(shared.state_dict())
    same(fresh, shared)
    # Networks that lie channels last turn every buffer with four axes.
    last = copy_model(shared).to(memory_format=torch.channels_last)
    own, other = masked_relus(last)["1"], masked_relus(shared)["1"]
    own.set_mask(own.kept)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(own(x), other(x))
    # A state without them takes them away, one without masks does not.
    fresh.load_state_dict(model.state_dict())
    assert relu_count(fresh) == 197
    shared.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("weight")}, strict=False)
    assert relu_count(shared) == 85
    save_masks(tmp_path / "masks.safetensors", shared, method="block_relu", budget=90, seed=0)
    info = load_masks(tmp_path / "masks.safetensors", fresh)
    assert tuple(info.shared) == ("1",)
    same(fresh, shared)
    save_masks(tmp_path / "plain.safetensors", model, method="random", budget=90, seed=0)
    assert load_masks(tmp_path / "plain.safetensors", fresh).shared == ()
    assert relu_count(fresh) == 197


def test_files_that_lost_their_signs_are_one_sentence(model, shared, tmp_path):
    file = tmp_path / "masks.safetensors"
    save_masks(file, shared, method="block_relu", budget=90, seed=0)
    tensors, metadata = load_tensors(file)
    signs = tensors.pop("1.signs")
    save_tensors(file, tensors, metadata)
    with pytest.raises(FairlineError, match="does not hold the signs that units of '1' share"):
        load_masks(file, model)
    for wrong, message in ((signs[:, :2], "integers of shape"), (signs.clamp_min(5) * 0 + signs[:1], None)):
        save_tensors(file, {**tensors, "1.signs": wrong}, metadata)
        if message:
            with pytest.raises(FairlineError, match=message):
                load_masks(file, model)
    # Nothing was changed.
    assert relu_count(model) == 197 or message is None


def test_bad_signs_are_one_sentence():
    layer = MaskedReLU((2, 3, 3))
    for signs, message in (
        (torch.zeros(2, 2, 3, 3), "are integers of shape"),
        (torch.zeros(2, 3, 3, dtype=torch.int64), "are integers of shape"),
        (torch.tensor([1, -1]).view(2, 1, 1, 1).expand(2, 2, 3, 3), "only where units vote for it"),
        (torch.full((2, 2, 3, 3), -2), "a number from 0 on"),
    ):
        with pytest.raises(FairlineError, match=message):
            layer.share(signs)
    for given_blocks in ((0, 2), [(1, 1)], [(1, 1), (2, 0)]):
        with pytest.raises(FairlineError, match="a height and a width of at least 1"):
            patches((2, 3, 3), given_blocks)
    with pytest.raises(FairlineError, match="shape \\(C, H, W\\)"):
        patches((5,), (1, 1))
    for of in ([0], [1, 0], [0, 2], [-1, 1]):
        with pytest.raises(FairlineError, match="needs a prototype"):
            prototypes((2, 3), of)


def test_what_does_not_go_with_shared_signs():
    layer = sharing(patches((2, 3, 3), (2, 2)))
    with pytest.raises(FairlineError, match="no mask can be learned"):
        layer.learn()
    with pytest.raises(FairlineError, match="no other surrogate can stand beside"):
        layer.use_surrogate("quadratic")
    layer.share(None)
    layer.use_surrogate("quadratic")
    with pytest.raises(FairlineError, match="the identity stands"):
        layer.share(patches((2, 3, 3), (2, 2)))
