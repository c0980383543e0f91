from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import fairline as fl
from fairline.audit.correlation import spearman
from fairline.errors import FairlineError
from tests.audit.networks import network, small_data


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 40), ties=st.booleans())
def test_spearman_by_scipy(seed, n, ties):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, 3))
    if ties:
        x, y = x.round(), (y > 0).astype(float)
    for column, rho in enumerate(spearman(x, y)):
        if np.ptp(x[:, column]) == 0 or np.ptp(y[:, column]) == 0:
            assert np.isnan(rho)
        else:
            assert rho == pytest.approx(spearmanr(x[:, column], y[:, column]).statistic, abs=1e-12)


MEASURES = ["margin", "gradient_norm", "boundary_distance", "correlation"]
OPTIONS = {"gradient_norm": {"per_sample": True}, "correlation": {"resamples": 200}}


def test_rows_of_an_audit():
    data, model = small_data(80), network("perceptron", dtype=torch.float32)
    report = fl.audit(model, data, measures=MEASURES, options=OPTIONS, device="cpu")
    overall, samples, table = report.overall, report.predictions, report.by_group
    accuracy = samples.groupby("group")["correct"].mean()[list(table.index)]
    for name in ("margin", "gradient_norm", "boundary_distance"):
        finite = np.isfinite(samples[name])
        expected = spearmanr(samples[name][finite], samples["correct"][finite]).statistic
        assert overall[f"{name}_correlation_samples"] == pytest.approx(expected)
        expected = spearmanr(table[name], accuracy).statistic
        assert overall[f"{name}_correlation_groups"] == pytest.approx(expected)
        limits = report.frame.set_index("measure")[["low", "high"]]
        low, high = limits.loc[f"{name}_correlation_samples"]
        assert -1 <= low < high <= 1
        low, high = limits.loc[f"{name}_correlation_groups"]
        # Three groups whose order no resample changes leave no spread, and that is no certainty.
        assert np.isnan(low) or -1 <= low < high <= 1
        assert overall[f"{name}_correlation_samples_low"] <= overall[f"{name}_correlation_samples"]
    # A large gradient is that of a sample far from its label.
    assert overall["gradient_norm_correlation_samples"] < 0
    rows = report.frame.set_index("measure")["n"]
    assert rows["margin_correlation_samples"] == 80
    assert rows["margin_correlation_groups"] == 3


def test_limits_are_those_of_drawing_images():
    data, model = small_data(80), network("perceptron", dtype=torch.float32)
    report = fl.audit(
        model, data, measures=["margin", "correlation"], options={"correlation": {"resamples": 2000}}, device="cpu"
    )
    samples, rng = report.predictions, np.random.default_rng(1)
    by_group = [part.index.to_numpy() for _, part in samples.groupby("group")]
    margin, correct = samples["margin"].to_numpy(), samples["correct"].to_numpy()
    drawn = []
    for _ in range(1000):
        picked = np.concatenate([rng.choice(index, len(index)) for index in by_group])
        drawn.append(spearmanr(margin[picked], correct[picked]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    overall = report.overall
    assert overall["margin_correlation_samples_low"] == pytest.approx(low, abs=0.03)
    assert overall["margin_correlation_samples_high"] == pytest.approx(high, abs=0.03)


def test_the_order_of_measures_does_not_matter_to_the_job_but_something_must_be_there():
    data, model = small_data(), network("perceptron", dtype=torch.float32)
    with pytest.raises(FairlineError, match="needs one of gradient_norm, margin"):
        fl.audit(model, data, measures=["correlation"])
    with pytest.raises(FairlineError, match="at least one resample"):
        fl.audit(model, data, measures=["margin", "correlation"], options={"correlation": {"resamples": 0}})


def test_groups_without_mistakes_leave_no_correlation():
    data = small_data(40, classes=2, groups=2)
    right = fl.GroupedData(data.images, torch.zeros_like(data.labels), data.groups, ("a", "b"), data.group_names)
    model = network("perceptron", 2, dtype=torch.float32)
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([50.0, 0.0]))
    report = fl.audit(model, right, measures=["margin", "correlation"])
    assert not report.frame["measure"].str.contains("correlation").any()
