"""Networks that SNL's published code has linearized are known by what their layers compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.masking.published import take_over_published
from fairline.private import to_graph
from tests.weights.networks import EXAMPLE, Alpha, published, small


class Noted(Alpha):
    """The formula in other words."""

    def __init__(self, formula, mask: Tensor, parameter: bool = True) -> None:
        nn.Module.__init__(self)
        self.formula = formula
        if parameter:
            self.gate = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("gate", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.gate)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3).float()


FORMULAS = {
    "published": lambda x, a: F.relu(x) * a.expand_as(x) + (1 - a.expand_as(x)) * x,
    "difference": lambda x, a: x + a * (x.relu() - x),
    "minimum": lambda x, a: x - a * x.clamp(max=0),
    "where": lambda x, a: torch.where(a > 0, x.clamp_min(0), x),
    "products": lambda x, a: torch.mul(torch.relu(x), a) + x - x * a,
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (4, 8, 8), (1, 4, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("parameter", [True, False])
def test_the_formula_is_known_in_any_notation(formula, shape, parameter):
    model = small(0).eval()
    mask = random_mask(*shape)
    model.relu1 = Noted(FORMULAS[formula], mask, parameter)
    model.block[2] = Around(Noted(FORMULAS[formula], mask.clone(), parameter))
    masked = mask_relus(model, EXAMPLE)
    assert list(masked_relus(masked)) == ["relu1", "block.2"]
    assert relu_count(masked) == relu_count(model, EXAMPLE) == 2 * int(mask.expand(1, 4, 8, 8).sum())
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(masked(x), model(x))
    assert to_graph(model, x).relus == relu_count(masked)


def test_a_mask_of_what_is_cut():
    model = small(0).eval()
    mask = random_mask(1, 4, 8, 8)
    model.relu1 = Noted(lambda x, a: F.relu(x) * (1 - a) + a * x, mask)
    masked = mask_relus(model, EXAMPLE)
    assert torch.equal(masked_relus(masked)["relu1"].kept, mask[0] == 0)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(masked(x), model(x))


def test_other_relus_are_masked_too_and_stay_whole():
    model = small(0).eval()
    model.relu1 = Alpha(4, 8)
    model.relu1.alphas.data = random_mask(1, 4, 8, 8)
    kept = int(model.relu1.alphas.sum())
    assert relu_count(model, EXAMPLE) == kept + 256
    assert to_graph(model, EXAMPLE).relus == kept + 256


def test_a_published_network_trains_on_with_fixed_masks():
    model = published(0)
    masked = mask_relus(model, EXAMPLE).train()
    x = torch.randn(4, 3, 8, 8)
    masked(x).sum().backward()
    model.train()(x).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if "alphas" not in name}
    found = dict(masked.named_parameters())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name].grad, grad)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, a: x * a,
        lambda x, a: F.relu(x) * a,
        lambda x, a: F.relu(x * a),
        lambda x, a: F.leaky_relu(x) * a + (1 - a) * x,
        lambda x, a: F.gelu(x) * a + (1 - a) * x,
        lambda x, a: F.relu(x) + a,
        lambda x, a: torch.where(a > 0, F.relu(x), x * x),
    ],
)
def test_other_layers_of_one_tensor_are_left_alone(formula):
    model = small(0)
    model.relu1 = Noted(formula, torch.ones(1, 4, 8, 8))
    assert take_over_published(model, EXAMPLE) == []
    assert isinstance(model.relu1, Noted)


def test_a_mask_that_is_still_learned_is_refused():
    model = small(0)
    model.relu1 = Noted(FORMULAS["published"], torch.full((1, 4, 8, 8), 0.4))
    with pytest.raises(FairlineError, match=r"'relu1' is still being learned \(it holds 0\.4\)"):
        mask_relus(model, EXAMPLE)


def test_a_layer_in_two_places_is_refused():
    model = small(0)
    model.block[2] = model.relu1 = Alpha(4, 8)
    with pytest.raises(FairlineError, match="masks 2 activations"):
        mask_relus(model, EXAMPLE)


def test_case_32():
    mask = random_mask(1, 8, 16, 16)
    layer = Alpha(8, 16)
    layer.alphas.data = mask
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        layer,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    assert relu_count(model, x) == to_graph(model, x).relus == int(mask.sum())
