"""The null front against shifted networks, linear programmes and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fairline.audit.above_null import Shiftable, above_null, curves
from fairline.audit.comparison import BASE
from fairline.audit.null_front import area_between, chosen_tau, front, right_at, right_between, shifted
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.objectives.post_hoc import TAUS, adjust, adjust_in_place
from tests.reference import null_front as reference

TOTAL = 1000
GROUPS = ("many", "few")


@given(st.data())
def test_an_image_is_right_between_two_strengths(drawn):
    """Also where logits or shares are equal, and where a network has outputs that are no class."""
    classes, more, n = drawn.draw(st.integers(2, 4)), drawn.draw(st.integers(0, 2)), drawn.draw(st.integers(1, 8))
    numbers = st.lists(st.integers(-3, 3), min_size=classes + more, max_size=classes + more)
    logits = np.array([drawn.draw(numbers) for _ in range(n)], np.float32)
    labels = np.array([drawn.draw(st.integers(0, classes - 1)) for _ in range(n)])
    counts = np.array([drawn.draw(st.integers(1, 5)) for _ in range(classes)], float)
    shares = torch.from_numpy(counts / counts.sum())
    between = right_between(torch.from_numpy(logits), torch.from_numpy(labels), shares)
    for tau in (*TAUS, -0.7, 0.3, 5.0):
        expected = reference.right(logits, labels, shares.numpy(), tau)
        assert np.array_equal(right_at(between, tau), expected), tau


def test_shifted_networks_are_those_of_adjust(trained, parts):
    train, val, test = parts
    shares = torch.bincount(train.labels, minlength=3) / len(train)
    between = right_between(predict(trained, test), test.labels, shares)
    for tau in (0.0, 0.5, 1.0, 3.0):
        own = predict(adjust(trained, train, tau=tau), test).argmax(1) == test.labels
        assert np.array_equal(own.numpy(), right_at(between, tau))
    table = shifted(between, np.asarray(test.group_names)[test.groups.numpy()])
    assert sorted(table["tau"].unique()) == list(TAUS)
    at_one = table[table["tau"] == 1].set_index("group")["accuracy"]
    right = right_at(between, 1.0)
    for position, name in enumerate(test.group_names):
        assert at_one[name] == right[test.groups.numpy() == position].mean()
    assert at_one["overall"] == pytest.approx(right.mean())
    assert at_one["worst group"] == at_one[list(test.group_names)].min()
    of_val = right_between(predict(trained, val), val.labels, shares)
    chosen = chosen_tau(shifted(of_val, np.asarray(val.group_names)[val.groups.numpy()]))
    assert chosen == adjust_in_place(trained, train, val)["tau"]


def test_a_class_without_images_cannot_be_shifted():
    with pytest.raises(FairlineError, match="Class 1 has no training image"):
        right_between(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.tensor([1.0, 0.0]))


#: Accuracies of hundredths, so that equal ones occur.
POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=7).map(
    lambda pairs: np.array(pairs, float).T / 100
)


@given(POINTS, st.integers(0, 25))
def test_the_front_is_what_coins_reach(points, x):
    overall, worst = points
    found = front(np.array([x / 100]), overall[:, None], worst[:, None])[0]
    assert found == pytest.approx(reference.front(x / 100, overall, worst), abs=1e-8)


@given(POINTS)
def test_the_front_falls_and_no_strength_lies_above_it(points):
    overall, worst = points
    at = np.linspace(-0.05, 0.3, 36)
    heights = front(at, np.tile(overall[:, None], 36), np.tile(worst[:, None], 36))
    assert (np.diff(heights) <= 1e-12).all()
    own = front(overall, np.tile(overall[:, None], len(overall)), np.tile(worst[:, None], len(overall)))
    assert (own >= worst - 1e-12).all()
    # Left of all points the best of all; at the end and beyond, the last point.
    assert heights[0] == worst.max()
    assert heights[-1] == worst[overall == overall.max()].max()


@settings(max_examples=15)
@given(POINTS, POINTS)
def test_areas_are_those_of_thin_strips(one, other):
    area, width = area_between(*(each[:, None] for each in (*one, *other)))
    low, high = max(one[0].min(), other[0].min()), min(one[0].max(), other[0].max())
    if low >= high:
        assert np.isnan(area[0])
        assert np.isnan(width[0])
        return
    assert width[0] == pytest.approx(high - low)
    assert area[0] == pytest.approx(reference.area(*one, *other), abs=3e-4)
    back, _ = area_between(*(each[:, None] for each in (*other, *one)))
    assert back[0] == pytest.approx(-area[0])


def test_a_front_that_is_raised_has_its_height_for_a_distance():
    overall, worst = np.array([[0.8], [0.75], [0.6]]), np.array([[0.2], [0.4], [0.5]])
    area, width = area_between(overall, worst + 0.03, overall, worst)
    assert (area[0], width[0]) == pytest.approx((0.03 * 0.2, 0.2))
    assert area_between(overall, worst, overall, worst)[0][0] == pytest.approx(0)


def population(seed: int, n: int = 400) -> tuple[np.ndarray, dict]:
    """Images of two groups that are their classes, seen by a base network, a cut one, and one with better logits."""
    rng = np.random.default_rng(seed)
    groups = (rng.random(n) < 0.25).astype(np.int64)
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    signal, noise = np.where(groups == 1, 1.0, -1.0), rng.normal(size=(4, n))
    # Of two classes the logit of the second is all: a prior, a signal and noise that the networks share in part.
    seen = {
        (BASE, TOTAL): -1.1 + 1.6 * signal + noise[0],
        ("erm", TOTAL): -1.1 + 1.6 * signal + 0.9 * noise[0] + 0.4 * noise[3],
        ("erm", 20): -1.6 + 1.2 * signal + 0.8 * noise[0] + 0.6 * noise[1],
        ("fair", TOTAL): -1.1 + 1.9 * signal + 0.9 * noise[0] + 0.4 * noise[3],
        ("fair", 20): -0.9 + 1.9 * signal + 0.8 * noise[0] + 0.6 * noise[2],
    }
    between = {
        column: right_between(torch.tensor(np.stack([np.zeros(n), z], 1)), torch.from_numpy(groups), shares)
        for column, z in seen.items()
    }
    return groups, between


def shiftable(seed: int, n: int = 400, only: tuple | None = None) -> Shiftable:
    groups, between = population(seed, n)
    between = {column: between[column] for column in only or between}
    return Shiftable(groups, between, dict.fromkeys(between, 1.0), TOTAL)


def moved(between: tuple, tau: float) -> tuple:
    """A network whose biases are shifted already."""
    return between[0] - tau, between[1] - tau


def pick(frame, method, measure, group="worst group", relus=20):
    rows = frame[(frame["method"] == method) & (frame["measure"] == measure) & (frame["relus"] == relus)]
    rows = rows[rows["group"] == group]
    assert len(rows) == 1
    return rows.iloc[0]


def by_hand(one: Shiftable, column, baseline) -> float:
    overall, worst = reference.accuracies(right_at(one.between[column], 0.0), one.groups)
    points = [reference.accuracies(right_at(one.between[baseline], tau), one.groups) for tau in TAUS]
    return 100 * (worst - reference.front(overall, *np.array(points).T))


def test_distances_by_hand():
    one = shiftable(0)
    frame = above_null([one], GROUPS, "erm", resamples=200)
    fair = by_hand(one, ("fair", 20), ("erm", 20))
    assert pick(frame, "fair", "above_null")["value"] == pytest.approx(fair, abs=1e-6)
    beyond = fair - by_hand(one, ("fair", TOTAL), ("erm", TOTAL))
    assert pick(frame, "fair", "above_null_beyond_control")["value"] == pytest.approx(beyond, abs=1e-6)
    overall = [right_at(one.between["erm", 20], tau).mean() for tau in TAUS]
    past = 100 * (right_at(one.between["fair", 20], 0.0).mean() - max(overall))
    assert pick(frame, "fair", "past_null", "overall")["value"] == pytest.approx(past)
    for measure in ("above_null", "past_null", "above_null_beyond_control"):
        rows = frame[frame["measure"] == measure]
        assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()
    # What a shift of both gives is not the linearized network's alone.
    few = {
        (column, tau): 100 * right_at(one.between[column], tau)[one.groups == 1].mean()
        for column in ((BASE, TOTAL), ("erm", 20))
        for tau in (0.0, 1.0)
    }
    drop = few[(BASE, TOTAL), 0.0] - few[("erm", 20), 0.0]
    undone = few[("erm", 20), 1.0] - few[("erm", 20), 0.0]
    beyond_base = undone - (few[(BASE, TOTAL), 1.0] - few[(BASE, TOTAL), 0.0])
    for measure, value in (("drop_points", drop), ("undone", undone), ("undone_beyond_base", beyond_base)):
        row = pick(frame, "erm", measure, "few")
        assert row["value"] == pytest.approx(value)
        assert row["n"] == (one.groups == 1).sum()
    assert pick(frame, "erm", "tau", "overall")["value"] == 1
    assert not frame.duplicated(["relus", "method", "group", "measure"]).any()


def test_the_free_line_is_not_above_itself():
    """A shift of the baseline is a method on the line, wherever its strength lies."""
    one = shiftable(1)
    for tau in TAUS:
        one.between["moved", 20] = moved(one.between["erm", 20], tau)
        frame = above_null([Shiftable(one.groups, one.between, {}, TOTAL)], GROUPS, "erm", resamples=20)
        assert pick(frame, "moved", "above_null")["value"] <= 1e-9
        assert pick(frame, "moved", "past_null", "overall")["value"] <= 1e-9
        own = pick(frame, "erm", "above_null")
        assert own["value"] <= own["high"] <= 0


def test_several_seeds_give_students_interval_and_one_its_images():
    replicates = [shiftable(seed) for seed in range(4)]
    row = pick(above_null(replicates, GROUPS, "erm"), "fair", "above_null")
    each = [by_hand(one, ("fair", 20), ("erm", 20)) for one in replicates]
    expected = stats.ttest_1samp(each, 0).confidence_interval()
    assert row["value"] == pytest.approx(np.mean(each), abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert row["replicates"] == 4


def test_a_method_with_several_strengths_has_an_area():
    one = shiftable(2)
    names = [(f"fair mu={tau:g}", 20) for tau in (2, 3)]
    one.between.update({name: moved(one.between["fair", 20], tau) for name, tau in zip(names, (2, 3), strict=True)})
    one = Shiftable(one.groups, one.between, {}, TOTAL)
    frame = above_null([one], GROUPS, "erm", resamples=200)
    own = [reference.accuracies(right_at(one.between[name], 0.0), one.groups) for name in names]
    null = [reference.accuracies(right_at(one.between["erm", 20], tau), one.groups) for tau in TAUS]
    area = 1e4 * reference.area(*np.array(own).T, *np.array(null).T)
    row = pick(frame, "fair mu=*", "area_above_null")
    assert row["value"] == pytest.approx(area, abs=3)
    assert row["low"] < row["value"] < row["high"]
    mean = pick(frame, "fair mu=*", "mean_above_null")
    width = min(max(a for a, _ in own), max(a for a, _ in null)) - max(min(a for a, _ in own), min(a for a, _ in null))
    assert mean["value"] == pytest.approx(row["value"] / (100 * width))
    assert mean["low"] < mean["value"] < mean["high"]
    # Strengths that are all past the front's end have no overall accuracy in common with it.
    one.between.update(dict.fromkeys(names, one.between["fair", 20]))
    past = above_null([one], GROUPS, "erm", resamples=20)
    assert pick(past, names[0][0], "past_null", "overall")["value"] > 0
    assert not past["measure"].isin(["area_above_null", "mean_above_null"]).any()


def test_what_is_not_there_is_not_told():
    one = shiftable(3)
    lone = Shiftable(one.groups, {("late", 5): one.between["fair", 20], **one.between}, {}, TOTAL)
    frame = above_null([lone], GROUPS, "erm", resamples=20)
    assert set(frame["measure"]) == {"above_null", "past_null", "above_null_beyond_control"}
    assert not (frame["relus"] == 5).any()
    assert not ((frame["measure"] == "above_null_beyond_control") & (frame["relus"] == TOTAL)).any()


@given(st.lists(st.floats(1e-5, 1e5).map(lambda value: f"{value:g}"), min_size=1, max_size=5, unique=True))
def test_curves_are_methods_that_differ_in_one_number(numbers):
    methods = ["erm", *(f"random: lagrangian mu={number} cap=1, last layer" for number in numbers), "arl T=a"]
    expected = {"random: lagrangian mu=* cap=1, last layer": methods[1:-1]} if len(numbers) > 1 else {}
    found = curves(methods)
    if len(numbers) > 1:
        expected["random: lagrangian mu=* cap=1, last layer"] = methods[1:-1]
    assert found == expected


def test_limits_hold_the_truth_about_as_often_as_they_say():
    only = (("fair", 20), ("erm", 20))
    truth = by_hand(shiftable(99, 200_000, only), *only)
    held = 0
    for seed in range(100):
        one = shiftable(seed, only=only)
        row = pick(
            above_null([Shiftable(one.groups, one.between, {}, TOTAL)], GROUPS, "erm", resamples=200),
            "fair",
            "above_null",
        )
        held += row["low"] <= truth <= row["high"]
    assert held >= 90
