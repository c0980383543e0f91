"""The simple baselines: reweighting, logit adjustment, the last layer retrained."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.objectives import Batch, LogitAdjust, Reweighting
from fairline.objectives.last_layer import _mean_of, output_layer, retrain_last_layer
from tests.conftest import make_data
from tests.objectives.problems import SHARE, N, solve


def test_inverse_frequency_ends_between_the_groups():
    assert solve(Reweighting()) == pytest.approx(0.5, abs=1e-3)
    assert solve(Reweighting(by="class")) == pytest.approx(0.5, abs=1e-3)
    assert solve(Reweighting(beta=0.0)) == pytest.approx(SHARE, abs=1e-3)
    assert solve(Reweighting(beta=1 - 1e-9)) == pytest.approx(0.5, abs=1e-3)


def test_effective_numbers():
    beta = 0.99
    small, large = (1 - beta ** (N * SHARE)) / (1 - beta), (1 - beta ** (N * (1 - SHARE))) / (1 - beta)
    # The optimum of a·c² + b·(1 − c)² is b / (a + b).
    a, b = N * (1 - SHARE) / large, N * SHARE / small
    assert solve(Reweighting(beta=beta)) == pytest.approx(b / (a + b), abs=1e-3)
    data = make_data(300, classes=3)
    objective = Reweighting(beta=beta)
    objective.start(data)
    assert float(objective.weights[data.groups].mean()) == pytest.approx(1, rel=1e-5)


def test_logit_adjustment_minimises_the_balanced_error():
    """On a table of p(x, y) the minimiser's scores are ``log p(y|x) − τ·log π_y`` up to a constant."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (3, 4), generator=generator) * torch.tensor([1, 1, 3, 8])
    x = torch.arange(3).repeat_interleave(counts.sum(1))
    y = torch.cat([torch.arange(4).repeat_interleave(row) for row in counts])
    data = fl.GroupedData(torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8), y, y.clone(), tuple("abcd"), tuple("abcd"))
    batch = Batch(data.images.float(), y, y, torch.arange(len(y)))
    for tau in (0.0, 1.0, 2.0):
        objective = LogitAdjust(tau=tau)
        objective.start(data)
        logits = torch.zeros(3, 4, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def closure(logits=logits, objective=objective, optimizer=optimizer):
            optimizer.zero_grad()
            loss = objective.reduce(objective.losses(logits[x], None, batch), batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        priors = counts.sum(0) / counts.sum()
        expected = counts.float().log() - tau * priors.log()
        found = logits.detach()
        torch.testing.assert_close(
            found - found.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True), atol=5e-3, rtol=0
        )


def test_logit_adjustment_leaves_the_distillation_alone():
    data = make_data(200, classes=3)
    objective = LogitAdjust(tau=1.0, temperature=2.0)
    objective.start(data)
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.zeros(5, 1, 2, 2), data.labels[:5], data.groups[:5], torch.arange(5))
    ce = F.cross_entropy(student + (torch.bincount(data.labels) / len(data)).log(), batch.labels, reduction="none")
    kd = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="none").sum(1) * 4
    torch.testing.assert_close(objective.losses(student, teacher, batch), ce + kd)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reweighting(beta=1.0), "beta=1"),
        (lambda: Reweighting(by="hair"), "group or class, not 'hair'"),
        (lambda: LogitAdjust(tau=-1.0), "tau=-1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(FairlineError, match=message):
        make()


def test_the_features_are_what_the_last_layer_sees(parts, trained):
    layer, features, _ = output_layer(trained, parts[1])
    with torch.no_grad():
        logits = torch.from_numpy(features).float() @ layer.weight.T + layer.bias
    torch.testing.assert_close(logits, fl.predict(trained, parts[1]))


def test_the_last_layer_becomes_the_regression_on_balanced_features(parts, trained):
    """With every group of one size, one subset is the whole, and the result is scikit-learn's on it."""
    val = parts[1]
    size = int(val.counts()["n"].min())
    index = torch.cat([torch.nonzero(val.groups == g).flatten()[:size] for g in range(3)])
    balanced = val.select(index)
    _, features, _ = output_layer(trained, balanced)
    before = copy.deepcopy(trained.state_dict())
    said = retrain_last_layer(trained, balanced, strengths=[0.1], repeats=2)
    assert said["strength"] == 0.1
    assert said["per_cell"] == size
    mean, std = features.mean(0), features.std(0)
    std[std == 0] = 1
    model = LogisticRegression(C=0.1, max_iter=1000).fit((features - mean) / std, balanced.labels.numpy())
    expected = model.predict_proba((features - mean) / std)
    found = fl.predict(trained, balanced).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    last = [name for name, module in trained.named_modules() if isinstance(module, nn.Linear)][-1]
    assert changed == {f"{last}.weight", f"{last}.bias"}


def test_images_may_be_balanced_by_class(trained):
    crossed = make_data(390, classes=3, groups=2, seed=3)
    sizes = {"group": crossed.groups.bincount(), "class": crossed.labels.bincount()}
    for balance, n in sizes.items():
        assert retrain_last_layer(trained, crossed, balance=balance, repeats=1)["per_cell"] == n.min()
    assert sizes["group"].min() != sizes["class"].min()


def test_it_repairs_a_layer_that_ignores_the_minority(parts, trained):
    held_out = parts[0]
    with torch.no_grad():
        layer = [m for m in trained.modules() if isinstance(m, nn.Linear)][-1]
        layer.bias += torch.tensor([0.0, 0.0, -50.0])
    before = fl.audit(trained, parts[2]).by_group["accuracy"]
    masked = fl.mask_relus(trained, held_out.normalized(slice(2)))
    retrain_last_layer(masked, held_out)
    after = fl.audit(masked, parts[2]).by_group["accuracy"]
    assert before["class 2"] == 0
    assert after.min() > 0.5
    assert fl.relu_count(masked) > 0


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 3)

    def forward(self, x):
        return self.a(x.flatten(1)) * 2


def test_what_cannot_be_retrained(parts, trained):
    val = parts[1]
    with pytest.raises(FairlineError, match="not its output layer"):
        retrain_last_layer(TwoHeads(), val)
    with pytest.raises(FairlineError, match=r"no nn\.Linear"):
        retrain_last_layer(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), val)
    with pytest.raises(FairlineError, match="has no bias"):
        retrain_last_layer(nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)), val)
    with pytest.raises(FairlineError, match="group, class or group_and_class"):
        retrain_last_layer(trained, val, balance="age")
    for strengths in ([], [0.0], [1.0, math.nan], [math.inf], ["strong"]):
        with pytest.raises(FairlineError, match=r"The strength of a retrained last layer is "):
            retrain_last_layer(trained, val, strengths=strengths)
    for repeats in (0, 1.5, math.nan, "often"):
        with pytest.raises(FairlineError, match=f"one subset at least, a whole number: repeats={repeats}"):
            retrain_last_layer(trained, val, repeats=repeats)
    small = val.select(torch.cat([torch.nonzero(val.groups != 2).flatten(), torch.nonzero(val.groups == 2)[0]]))
    with pytest.raises(FairlineError, match="“class 2” has one held-out image"):
        retrain_last_layer(trained, small)


def test_a_class_is_averaged_over_the_fits_that_held_it():
    """One subset without a rare class takes nothing from it; a class that none held is chosen nowhere."""
    rng = np.random.default_rng(0)
    features = 50 * rng.normal(size=(300, 4))
    fits = []
    for held in ([0, 1, 2], [0, 1], [0, 1, 2]):
        weight, bias = np.full((4, 4), np.nan), np.full(4, np.nan)
        weight[held], bias[held] = rng.normal(size=(len(held), 4)), rng.normal(size=len(held))
        fits.append((weight, bias))
    weight, bias = _mean_of(fits, features)
    assert weight[0] == pytest.approx(np.mean([fit[0][0] for fit in fits], axis=0))
    assert bias[1] == pytest.approx(np.mean([fit[1][1] for fit in fits]))
    assert weight[2] == pytest.approx((fits[0][0][2] + fits[2][0][2]) / 2)
    assert bias[2] == pytest.approx((fits[0][1][2] + fits[2][1][2]) / 2)
    logits = features @ weight.T + bias
    assert np.isfinite(logits).all()
    assert (logits[:, 3] < logits[:, :3].min()).all()


def test_a_retrained_layer_still_knows_a_class_that_few_subsets_hold(trained, parts):
    """Subsets of balanced groups are as small as the smallest group, and miss a rare class now and then."""
    val = parts[1]
    rare = val.labels == 2
    few = torch.cat([torch.where(~rare)[0], torch.where(rare)[0][:3]])
    data = val.select(few)
    groups = torch.zeros(len(data), dtype=torch.long)
    groups[:10] = 1
    data = replace(data, groups=groups, group_names=("many", "few"))
    network = copy.deepcopy(trained)
    retrain_last_layer(network, data, strengths=[1.0], repeats=20, balance="group")
    bias = output_layer(network, data)[0].bias.detach()
    # By a fit that missed it the class lost a hundred.
    assert float(bias.max() - bias.min()) < 50
