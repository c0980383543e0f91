from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline import AutoReP, FairlineError
from fairline.inference import predict
from fairline.linearize.autorep import Hysteresis
from fairline.linearize.surrogates import start_masked
from fairline.masking import MaskedReLU, masked_relus, relu_count
from tests.commands import ok
from tests.reference.autorep import Gate
from tests.reference.snl import learn_masks

TOTAL = 4 * 64 + 8 * 16 + 16 * 4
FAST = {"lam": 60.0, "lr": 1e-3, "mask_lr": 0.02, "hold": 3, "batch_size": 32, "max_epochs": 40}


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


def test_mask_learning_follows_the_published_algorithm(parts, trained):
    """Counts, λ, coefficients and weights agree with the straightforward loop, epoch by epoch."""
    data = parts[0]
    epochs = 9
    history: list[dict[str, float]] = []
    method = AutoReP(lam=1.0, lr=2e-3, mask_lr=0.02, patience=3, growth=1.5, batch_size=32, max_epochs=epochs)
    (cut,) = method.linearize(trained, data, [0.0], history=history)

    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(data), generator=generator).tolist() for _ in range(epochs)]
    weights = torch.Generator().manual_seed(0)
    fitted = masked_relus(start_masked(trained, data, "quadratic", torch.device("cpu")))
    waiting = iter(fitted.values())

    def make(shape):
        return Gate(torch.rand(shape, generator=weights), next(waiting).coefficients.detach(), 3e-3)

    def optimize(student):
        masks = [module.alpha for module in student.modules() if isinstance(module, Gate)]
        ids = {id(mask) for mask in masks}
        others = [p for p in student.parameters() if id(p) not in ids]
        return torch.optim.Adam([{"params": others}, {"params": masks, "lr": 0.02}], lr=2e-3)

    student, counts, lambdas = learn_masks(
        trained,
        data.normalized(),
        data.labels,
        epochs=epochs,
        batch_size=32,
        lr=2e-3,
        lam=1.0 / TOTAL,
        growth=1.5,
        patience=3,
        orders=orders,
        make=make,
        optimize=optimize,
    )
    assert counts[-1] < TOTAL
    assert [row["relus"] for row in history] == counts
    assert [row["lambda"] / TOTAL for row in history] == pytest.approx(lambdas)
    gates = [module for module in student.modules() if isinstance(module, Gate)]
    for mine, theirs in zip(masked_relus(cut.model).values(), gates, strict=True):
        torch.testing.assert_close(mine.coefficients, theirs.coefficients, rtol=1e-3, atol=1e-4)
    mine, theirs = dict(cut.model.named_parameters()), dict(student.named_parameters())
    for name in ("0.weight", "3.weight", "11.weight"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


@settings(max_examples=50)
@given(values=st.lists(st.floats(-0.01, 0.01), min_size=1, max_size=30), h=st.sampled_from([0.0, 0.003]))
def test_the_hysteresis(values, h):
    gate = Hysteresis((1,), h)
    state = 1
    for value in values:
        gate.update(torch.tensor([value]))
        value = float(torch.tensor(value))
        if state == 1 and value <= -float(torch.tensor(h)):
            state = 0
        elif state == 0 and value > float(torch.tensor(h)):
            state = 1
        assert int(gate.kept) == state


def test_the_straight_through_gradient_is_softplus():
    layer = MaskedReLU((2,))
    weight = layer.learn()
    with torch.no_grad():
        weight.copy_(torch.tensor([-1.0, 2.0]))
    layer.gate = Hysteresis((2,), 0.003)
    layer.gate.update(weight)
    x = torch.tensor([[-3.0, -5.0], [4.0, 1.0]])
    y = layer(x)
    assert torch.equal(y, torch.tensor([[-3.0, 0.0], [4.0, 1.0]]))
    y.sum().backward()
    # ∂y/∂m = −min(x, 0), times softplus(w) = log(1 + exp(w)).
    expected = torch.tensor([3.0, 5.0]) * torch.log1p(torch.tensor([-1.0, 2.0]).exp())
    torch.testing.assert_close(weight.grad, expected)


def test_budgets_are_exact_and_surrogates_quadratic(parts, trained):
    cuts = list(AutoReP(**FAST).linearize(trained, parts[0], [0.1, 1.0, 0.5, 7, 0.0]))
    assert [cut.relus for cut in cuts] == [TOTAL, TOTAL // 2, round(0.1 * TOTAL), 7, 0]
    for cut in cuts:
        assert relu_count(cut.model) == cut.relus
        assert all(layer.weight is None and layer.gate is None for layer in masked_relus(cut.model).values())
        assert all(layer.surrogate == "quadratic" for layer in masked_relus(cut.model).values())
        assert predict(cut.model, parts[2]).isfinite().all()
    assert torch.equal(predict(cuts[0].model, parts[2]), predict(trained, parts[2]))
    assert cuts[1].info["reached"]


def test_the_run_stays_at_each_budget(parts, trained):
    """There ReLUs change places, nothing is charged, and learning rates fall."""
    history: list[dict[str, float]] = []
    settings = {"lam": 1.0, "lr": 1e-3, "mask_lr": 0.01, "batch_size": 8, "hold": 8}
    cuts = list(AutoReP(**settings).linearize(trained, parts[0], [0.5, 0.2], history=history))
    epochs = [cut.info["epoch"] for cut in cuts]
    assert [cut.info["reached"] for cut in cuts] == [True, True]
    assert epochs[-1] == len(history)
    counts = [row["relus"] for row in history]
    crossed = [next(epoch for epoch, count in enumerate(counts, 1) if count <= cut.budget) for cut in cuts]
    assert epochs == [epoch + 8 for epoch in crossed]
    for start, stop, cut in zip(crossed, epochs, cuts, strict=True):
        # Masks would go on falling.
        assert all(0.5 * cut.budget < count < 1.1 * cut.budget for count in counts[start : stop - 1])
        rates = [row["learning_rate"] for row in history[start - 1 : stop]]
        assert rates[0] == pytest.approx(1e-3)
        assert rates == sorted(rates, reverse=True)
        assert len(set(rates)) > 6
    # Masks are then further from those that were drawn.
    (early,) = AutoReP(**{**settings, "hold": 0}).linearize(trained, parts[0], [0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([torch.rand(n, generator=generator) for n in (256, 128, 64)])
    largest = torch.zeros(TOTAL, dtype=torch.bool)
    largest[drawn.argsort(descending=True)[:224]] = True
    assert (kept(cuts[0].model) & largest).sum() < (kept(early.model) & largest).sum()


def test_the_charge_and_its_gradient():
    share = torch.tensor(100.0, requires_grad=True)
    assert AutoReP().charged(share, 40) == 60
    assert AutoReP(hold=0).charged(share, 40) == 100
    AutoReP().charged(share, 40).backward()
    assert share.grad == 1
    assert AutoReP().charged(share, 140) == 0
    for budget in (100, 140):
        (gradient,) = torch.autograd.grad(AutoReP().charged(share, budget), share)
        assert gradient == 0


def test_another_factor_of_the_square(parts, trained):
    """The square of the start is that many times its fit, and c₀ and c₁ are fitted to what it leaves."""
    images = parts[0].normalized()
    fits = {}
    for square in (0.01, 0.1, 0.2):
        student = AutoReP(square=square).start(trained, parts[0], torch.device("cpu"))
        fits[square] = next(iter(masked_relus(student).values())).coefficients.detach()[:, :, 0, 0]
    torch.testing.assert_close(fits[0.1][2], fits[0.2][2] / 2)
    torch.testing.assert_close(fits[0.01][2], fits[0.2][2] / 20)
    seen = []
    student.get_submodule("2").register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    student.eval()(images)
    x = seen[0][:, 0].flatten().double().numpy()
    rest = np.maximum(x, 0) - 0.2 * float(fits[0.1][2, 0]) * x**2
    line = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), rest, rcond=None)[0]
    np.testing.assert_allclose(fits[0.1][:2, 0], line, atol=1e-3)


def test_what_the_hysteresis_keeps_stays_when_the_cut_fills_the_budget(parts, trained):
    history: list[dict[str, float]] = []
    crossing = {**FAST, "hold": 0}
    (cut,) = AutoReP(**crossing).linearize(trained, parts[0], [0.5], history=history)
    (fewer,) = AutoReP(**crossing, exact=False).linearize(trained, parts[0], [0.5])
    assert fewer.relus == history[-1]["relus"] < cut.relus == TOTAL // 2
    assert (kept(cut.model) >= kept(fewer.model)).all()


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_coarser_masks(parts, trained, granularity):
    (cut,) = AutoReP(**FAST, granularity=granularity, surrogate="identity").linearize(trained, parts[0], [0.5])
    assert cut.relus <= TOTAL // 2
    for layer in masked_relus(cut.model).values():
        assert layer.surrogate == "identity"
        assert all(int(channel.sum()) in (0, channel.numel()) for channel in layer.kept)


def test_a_broken_run_resumes_to_the_same_networks(parts, trained, tmp_path):
    reference = list(AutoReP(**FAST).linearize(trained, parts[0], [0.6, 0.2]))
    broken = AutoReP(**FAST).linearize(trained, parts[0], [0.6, 0.2], checkpoint=tmp_path)
    next(broken)
    broken.close()
    resumed = list(AutoReP(**FAST).linearize(trained, parts[0], [0.6, 0.2], checkpoint=tmp_path))
    for a, b in itertools.zip_longest(reference, resumed):
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_on_the_command_line(runs, tmp_path):
    options = [
        "--method",
        "autorep",
        "--budgets",
        "0.5,20",
        "--option",
        "mask_lr=0.05",
        "--option",
        "hold=2",
        "--max-epochs",
        "15",
    ]
    out = ok("linearize", runs / "base", *options, "--out", tmp_path / "cut")
    assert "20 of 448 ReLUs" in out
    ok("finetune", tmp_path / "cut", "--epochs", "1", "--out", tmp_path / "students")
    said = ok("audit", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "audit")
    assert "20 of" in said or "4.5" in said
    ok("report", tmp_path / "audit")
    assert "AutoReP (quadratic)" in (tmp_path / "audit" / "report.html").read_text()
    said = ok("compare", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "compare")
    assert "autorep: quadratic, erm" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_lr": 0.0}, "mask_lr > 0"),
        ({"threshold": -1.0}, "threshold ≥ 0"),
        ({"lam": 0.0}, "AutoReP needs lam > 0"),
        ({"hold": -1}, "hold ≥ 0"),
        ({"square": -0.1}, "square ≥ 0"),
        ({"surrogate": "quartic"}, "cubic or zero, not 'quartic'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        AutoReP(**options)
