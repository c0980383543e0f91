"""Classes rebalanced after training: folded, free, and the optimum where it is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.objectives.post_hoc import TAUS, adjust_in_place, balanced_scale
from fairline.private.export import to_graph

METHODS = ["logit_adjust", "tau_norm", "weight_scale"]


def output_rows(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def moved(model: nn.Module, parts, method: str, tau: float) -> torch.Tensor:
    """Logits on the validation part as the papers' formulas have them."""
    train, val, _ = parts
    before = fl.predict(model, val).double()
    if method == "logit_adjust":
        return before - tau * (torch.bincount(train.labels).double() / len(train)).log()
    if method == "tau_norm":
        return before / output_rows(model).weight.detach().double().norm(dim=1) ** tau
    return before * balanced_scale(fl.predict(model, train).double(), train.labels) ** tau


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tau", [-1.0, 0.3, 1.0, 2.7])
def test_logits_move_as_the_papers_say(parts, trained, method, tau):
    after = fl.predict(fl.adjust(trained, parts[0], method=method, tau=tau), parts[1]).double()
    torch.testing.assert_close(after, moved(trained, parts, method, tau), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_strength_of_zero_leaves_the_network_and_the_network_is_never_changed(parts, trained, method):
    train, _, test = parts
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    same = fl.adjust(trained, train, method=method, tau=0.0)
    assert torch.equal(fl.predict(same, test), fl.predict(trained, test))
    fl.adjust(trained, train, method=method, tau=2.0)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_it_minimises_the_balanced_error_where_the_posterior_is_known():
    """With the true posterior p(y|x), τ = 1 is the Bayes classifier of balanced classes: argmax p(x|y)."""
    shares = torch.tensor([0.8, 0.15, 0.05])
    likelihood = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]])  # p(x|y), rows y, three images x
    posterior = (shares[:, None] * likelihood).T.log()
    moved = posterior - shares.log()
    assert posterior.argmax(1).tolist() == [0, 0, 0]
    assert moved.argmax(1).tolist() == likelihood.argmax(0).tolist() == [0, 1, 2]


@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_learned_factors_are_the_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(300, 3, generator=generator, dtype=torch.float64)
    # Labels that a temperature of each class explains, of unequal frequency.
    planted = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    labels = torch.multinomial((logits * planted).softmax(1), 1, generator=generator).flatten()
    factors = balanced_scale(logits, labels)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        # A class at a time: the mean of the classes' means.
        terms = nn.functional.cross_entropy(logits * scale, labels, reduction="none")
        return torch.stack([terms[labels == label].mean() for label in range(3)]).mean()

    probe = factors.clone().requires_grad_()
    loss(probe).backward()
    assert probe.grad is not None
    assert probe.grad.abs().max() < 1e-5
    assert loss(factors) <= loss(torch.ones(3, dtype=torch.float64)) + 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_private_inference_costs_what_it_did(parts, trained, method):
    train, val, _ = parts
    example = val.normalized(slice(1))
    before, after = (
        fl.private.estimate(to_graph(each, example), protocol="cheetah").row()
        for each in (trained, fl.adjust(trained, train, val, method=method))
    )
    for name, value in before.items():
        assert after[name] == value or (math.isnan(after[name]) and math.isnan(value)), name


def counted(logits: torch.Tensor, reference: nn.Module, val) -> tuple[float, float, float]:
    """Overall and worst-group accuracy, and the largest loss."""
    after = logits.argmax(1) == val.labels
    before = fl.predict(reference, val).argmax(1) == val.labels
    groups = [val.groups == group for group in range(val.num_groups)]
    worst = min(float(after[own].double().mean()) for own in groups)
    losses = [100 * float(before[own].double().mean() - after[own].double().mean()) for own in groups]
    return float(after.double().mean()), worst, max(losses)


@pytest.mark.parametrize("method", METHODS)
def test_the_strength_is_the_one_that_the_rule_names(parts, trained, method):
    train, val, _ = parts
    found = {tau: counted(moved(trained, parts, method, tau), trained, val) for tau in TAUS}
    for within in (0.0, 1.0, 5.0):
        said = adjust_in_place(fl.masking.copy_model(trained), train, val, method=method, within=within)
        allowed = {tau: row for tau, row in found.items() if found[0.0][0] - row[0] <= within / 100 + 1e-9}
        best = max(worst for _, worst, _ in allowed.values())
        assert said["tau"] == min(tau for tau, row in allowed.items() if row[1] == best)
        assert [row["tau"] for row in said["tried"]] == list(TAUS)
    said = adjust_in_place(
        fl.masking.copy_model(trained), train, val, method=method, rule="largest_loss", reference=trained
    )
    least = min(loss for _, _, loss in found.values())
    assert said["tau"] == min(tau for tau, row in found.items() if row[2] == pytest.approx(least))


@pytest.mark.parametrize("taus", [(0.5, 2.0), (2.0, 0.0, 0.5), (1, 2, 3)])
def test_of_several_strengths_one_is_chosen_or_none(parts, trained, taus):
    train, val, _ = parts
    said = adjust_in_place(fl.masking.copy_model(trained), train, val, tau=taus)
    tried = [0.0, *(tau for tau in taus if tau)]
    assert [row["tau"] for row in said["tried"]] == tried
    found = {tau: counted(moved(trained, parts, "logit_adjust", tau), trained, val) for tau in tried}
    allowed = {tau: row[1] for tau, row in found.items() if found[0.0][0] - row[0] <= 0.01 + 1e-9}
    assert said["tau"] == max(allowed, key=allowed.get)
    one = adjust_in_place(fl.masking.copy_model(trained), train, val, tau=[2.0])
    assert one == {"tau": 2.0, "tried": []}


@pytest.mark.parametrize("taus", [np.array([0.5, 2.0], np.float32), (tau / 2 for tau in (1, 4)), [Fraction(1, 2), 2]])
def test_strengths_may_be_any_numbers(parts, trained, taus):
    said = adjust_in_place(fl.masking.copy_model(trained), *parts[:2], tau=taus)
    assert [row["tau"] for row in said["tried"]] == [0.0, 0.5, 2.0]


@pytest.mark.parametrize("tau", [[], {0.5: 1.0}, [1.0, 1.0], [1.0, math.inf], "1", [1.0, True], [0.5, None]])
def test_what_is_no_strength_is_refused(parts, trained, tau):
    with pytest.raises(FairlineError, match="or several different ones to choose from, not"):
        fl.adjust(trained, *parts[:2], tau=tau)


def test_several_strengths_need_validation_data(parts, trained):
    with pytest.raises(FairlineError, match="Of several τ one is chosen on validation data"):
        fl.adjust(trained, parts[0], tau=[0.5, 1.0])


def test_it_gives_a_rare_class_back(parts, trained):
    """A shift that hides the rarest class is undone."""
    train, val, _ = parts
    rarest = int(torch.bincount(train.labels).argmin())
    hidden = fl.masking.copy_model(trained)
    with torch.no_grad():
        output_rows(hidden).bias[rarest] -= 2.0
    own = val.labels == rarest
    before, after = (
        float((fl.predict(each, val).argmax(1) == val.labels)[own].double().mean())
        for each in (hidden, fl.adjust(hidden, train, val, within=100.0))
    )
    assert after > before


@pytest.mark.parametrize("method", METHODS)
@given(
    tau=st.one_of(st.floats(-40, 40), st.floats(-1e5, 1e5), st.floats(allow_nan=False, allow_infinity=False)),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_strength_is_refused_or_does_what_it_says(parts, trained, method, tau, scale):
    """No network is handed on that overflows, or whose logits are all gone."""
    model = fl.masking.copy_model(trained)
    with torch.no_grad():
        output_rows(model).weight *= scale
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = ""
    try:
        adjust_in_place(model, parts[0], method=method, tau=tau)
    except FairlineError as error:
        said = str(error)
    if said:
        assert said.endswith("beyond what float32 can hold; take a τ nearer to 0.")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        # Learned factors come as near to 0 as the images ask for, so any τ may be too large.
        size = float(moved(model, parts, method, tau).abs().max())
        assert not 1e-25 < size < 1e12
        return
    after = fl.predict(model, parts[1]).double()
    original = fl.masking.copy_model(model)
    original.load_state_dict(before)
    expected = moved(original, parts, method, tau)
    assert torch.isfinite(after).all()
    assert after.any()
    # Terms of either sign may be far above their sum.
    size = float(expected.abs().max())
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * size)


def headless() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(dim=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": math.nan}, "τ is a finite number, or several different ones to choose from, not nan"),
        ({"tau": math.inf}, "τ is a finite number, .* not inf"),
        ({"tau": "1"}, "τ is a finite number, .* not 1"),
        ({"method": "magic"}, "not 'magic'"),
        ({"rule": "coin"}, "not 'coin'"),
        ({"within": -1.0}, "0 or more, not -1"),
        ({"rule": "largest_loss"}, "give a reference"),
    ],
)
def test_bad_settings(parts, trained, options, said):
    with pytest.raises(FairlineError, match=said):
        fl.adjust(trained, *parts[:2], **options)


def test_bad_data(parts, trained):
    train, val, _ = parts
    rare = train.select(torch.nonzero(train.labels != 2).flatten())
    with pytest.raises(FairlineError, match="class “class 2” has no training image"):
        fl.adjust(trained, rare, val)
    few = val.select(torch.nonzero(val.groups != 1).flatten())
    with pytest.raises(FairlineError, match="choosing τ needs every group"):
        fl.adjust(trained, train, few)
    with pytest.raises(FairlineError, match="not its output layer"):
        fl.adjust(headless(), train, val)
    assert np.isfinite(fl.predict(trained, val).numpy()).all()
