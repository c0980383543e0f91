from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.audit.accuracy import group_means, relative_drop
from fairline.data import GroupedData
from fairline.errors import FairlineError
from tests.conftest import make_data


class Oracle(nn.Module):
    """Reads the wanted class from the first pixel, so that a test decides what is right."""

    def __init__(self, classes: int, pixel: int = 0):
        super().__init__()
        self.classes, self.pixel = classes, pixel

    def forward(self, x):
        wanted = (x[:, 0, 0, self.pixel] * 255).round().long()
        return 8.0 * torch.nn.functional.one_hot(wanted, self.classes).float()


def told(labels, groups, first, second=None) -> GroupedData:
    """Data on which ``Oracle(…, 0)`` predicts ``first`` and ``Oracle(…, 1)`` predicts ``second``."""
    images = torch.zeros(len(labels), 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(first)
    images[:, 0, 0, 1] = torch.tensor(first if second is None else second)
    names = [tuple(f"{what}{i}" for i in range(max(x) + 1)) for what, x in (("c", labels), ("g", groups))]
    return GroupedData(images, torch.tensor(labels), torch.tensor(groups), *names, mean=(0.0,), std=(1.0,))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4))
def test_point_values_by_counting(seed, groups):
    rng = np.random.default_rng(seed)
    n = 60
    group = np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])
    labels = np.concatenate([[0, 1, 2], rng.integers(0, 3, n - 3)])
    after, before = rng.integers(0, 3, n), rng.integers(0, 3, n)
    data = told(labels.tolist(), group.tolist(), after.tolist(), before.tolist())
    report = fl.audit(Oracle(3), data, Oracle(3, 1), resamples=20, device="cpu")
    logits = 8.0 * np.eye(3)[after]
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), labels]
    accuracies, drops = [], []
    for g in range(groups):
        inside = group == g
        row = report.by_group.loc[f"g{g}"]
        hits = sum(1 for i in range(n) if inside[i] and after[i] == labels[i])
        hits_before = sum(1 for i in range(n) if inside[i] and before[i] == labels[i])
        assert row["n"] == inside.sum()
        assert row["accuracy"] == pytest.approx(hits / inside.sum())
        assert row["loss"] == pytest.approx(loss[inside].mean())
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        if hits_before:
            drops.append((hits_before - hits) / hits_before * 100)
            assert row["relative_drop"] == pytest.approx(drops[-1])
        else:
            assert np.isnan(row["relative_drop"])
        accuracies.append(hits / inside.sum())
    assert report.overall["accuracy"] == pytest.approx((after == labels).mean())
    assert report.overall["n"] == n
    gaps = report.gaps["value"]
    assert gaps["accuracy_gap"] == pytest.approx(max(accuracies) - min(accuracies))
    assert gaps["worst_group_accuracy"] == pytest.approx(min(accuracies))
    if drops:
        assert gaps["relative_drop_gap"] == pytest.approx(max(drops) - min(drops))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    chances=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    seed=st.integers(0, 10_000),
)
def test_no_interval_is_without_width(sizes, chances, seed):
    """Groups of one or two images, all right, all wrong, the same in both networks: limits around the value, apart."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    n = len(group)
    labels = [0, 1] + [0] * (n - 2)
    answers = [[y if right else 1 - y for y, right in zip(labels, rng.random(n) < c, strict=True)] for c in chances]
    report = fl.audit(Oracle(2), told(labels, group.tolist(), *answers), Oracle(2, 1), resamples=200, device="cpu")
    shares = {"accuracy", "relative_drop", "accuracy_gap", "worst_group_accuracy", "relative_drop_gap"}
    rows = report.frame[report.frame["measure"].isin(shares) & report.frame["value"].notna()]
    # A single group that has a drop leaves nothing to compare.
    apart = rows[(rows["measure"] != "relative_drop_gap") | (report.by_group["relative_drop"].notna().sum() > 1)]
    assert (apart["low"] < apart["high"]).all()
    assert ((apart["low"] <= apart["value"] + 1e-9) & (apart["value"] <= apart["high"] + 1e-9)).all()
    losses = report.frame[report.frame["measure"] == "loss"]
    assert (losses["low"].isna() | (losses["low"] < losses["high"])).all()


def test_more_images_that_are_all_right_say_more():
    widths = []
    for n in (1, 2, 10, 100):
        data = told([0, 1] * n, [0, 1] * n, [0, 1] * n)
        row = fl.audit(Oracle(2), data, Oracle(2, 1), device="cpu").by_group.loc["g0"]
        assert row["accuracy"] == row["accuracy_high"] == 1
        assert row["relative_drop_low"] < 0 < row["relative_drop_high"]
        widths.append([1 - row["accuracy_low"], row["relative_drop_high"] - row["relative_drop_low"]])
    assert (np.diff(widths, axis=0) < 0).all()
    assert widths[-1][0] < 0.05


def test_drop_is_undefined_where_the_reference_is_never_right():
    data = told([0] * 6, [0] * 3 + [1] * 3, [0] * 6, [1] * 3 + [0] * 3)
    data = GroupedData(data.images, data.labels, data.groups, ("c0", "c1"), data.group_names, mean=(0.0,), std=(1.0,))
    report = fl.audit(Oracle(2), data, Oracle(2, 1), device="cpu")
    assert np.isnan(report.by_group.loc["g0", "relative_drop"])
    assert report.by_group.loc["g1", "relative_drop"] == 0
    assert relative_drop(0.0, 0.5) is not None
    assert np.isnan(relative_drop(0.0, 0.5))


def test_metric_frame_and_pandas_agree(monkeypatch):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"group": rng.choice(list("bca"), 50), "x": rng.random(50), "y": rng.random(50)})
    through_fairlearn = group_means(frame)
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    alone = group_means(frame)
    pd.testing.assert_frame_equal(through_fairlearn[0].sort_index(), alone[0].sort_index(), check_names=False)
    pd.testing.assert_series_equal(through_fairlearn[1], alone[1], check_names=False)


def test_the_table_is_tidy_and_survives_parquet(parts, trained, tmp_path):
    report = fl.audit(trained, parts[2], trained, name="m", split="test", resamples=50)
    frame = report.to_frame()
    assert list(frame.columns) == ["model", "split", "group", "class", "measure", "value", "low", "high", "n"]
    assert not frame.duplicated(["model", "split", "group", "class", "measure"]).any()
    assert set(frame["group"]) == {*parts[2].group_names, "overall"}
    report.to_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), frame)
    assert (report.by_group["relative_drop"].dropna() == 0).all()
    assert report.predictions["correct"].mean() == pytest.approx(report.overall["accuracy"])
    again = fl.audit(trained, parts[2], trained, name="m", split="test", resamples=50)
    pd.testing.assert_frame_equal(again.to_frame(), frame)
    assert list(report.by_group.index) == list(parts[2].group_names)


def test_groups_may_differ_from_classes(trained):
    data = make_data(90, classes=3, groups=2)
    report = fl.audit(trained, data)
    assert list(report.by_group.index) == ["group 0", "group 1"]


def test_bad_requests(parts, trained):
    with pytest.raises(FairlineError, match="no measure 'beauty'; choose among accuracy"):
        fl.audit(trained, parts[2], measures=["beauty"])
    with pytest.raises(FairlineError, match="at least one resample"):
        fl.audit(trained, parts[2], resamples=0)
    data = parts[2]
    empty = GroupedData(data.images, data.labels, data.groups, data.class_names, (*data.group_names, "nobody"))
    with pytest.raises(FairlineError, match="'nobody' has no image"):
        fl.audit(trained, empty)
