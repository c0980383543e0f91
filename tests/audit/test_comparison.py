from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fairline.audit.comparison import BASE, Scored, compare, pareto
from fairline.errors import FairlineError
from tests.reference.bootstrap import paired_shares

TOTAL = 1000
GROUPS = ("many", "few")


def scored(
    seed: int, chances: dict[tuple[str, int], tuple[float, float]], n: int = 300, labels: bool = False
) -> Scored:
    rng = np.random.default_rng(seed)
    groups = (rng.random(n) < 0.2).astype(np.int64)
    ease = rng.random(n)
    correct = {column: ease < np.asarray(chance)[groups] for column, chance in chances.items()}
    return Scored(
        groups, correct, TOTAL, np.where(groups == 1, rng.integers(0, 2, n), 2 - (ease < 0.5)) if labels else None
    )


CHANCES = {
    (BASE, TOTAL): (0.9, 0.7),
    ("erm", TOTAL): (0.9, 0.7),
    ("fair", TOTAL): (0.88, 0.78),
    ("erm", 20): (0.88, 0.4),
    ("fair", 20): (0.85, 0.6),
    ("bad", 20): (0.8, 0.39),
}


def pick(frame, method, measure, group, relus=20):
    rows = frame[
        (frame["method"] == method)
        & (frame["measure"] == measure)
        & (frame["group"] == group)
        & (frame["relus"] == relus)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


def accuracy_of(replicate, column, group):
    values = replicate.correct[column]
    return values.mean() if group is None else values[replicate.groups == group].mean()


def test_every_measure_by_hand():
    one = scored(0, CHANCES)
    frame = compare([one], GROUPS, "erm", resamples=200)
    few = {column: accuracy_of(one, column, 1) for column in CHANCES}
    fair, erm = ("fair", 20), ("erm", 20)
    assert pick(frame, "fair", "accuracy", "few")["value"] == few[fair]
    assert pick(frame, "fair", "gain", "few")["value"] == pytest.approx(100 * (few[fair] - few[erm]))
    drop = 100 * (few[BASE, TOTAL] - few[fair]) / few[BASE, TOTAL]
    assert pick(frame, "fair", "relative_drop", "few")["value"] == pytest.approx(drop)
    mitigation = 100 * (few[erm] - few[fair]) / few[erm]
    assert pick(frame, "fair", "mitigation_drop", "few")["value"] == pytest.approx(mitigation)
    assert mitigation < 0
    control = 100 * (few["fair", TOTAL] - few["erm", TOTAL])
    beyond = 100 * (few[fair] - few[erm]) - control
    assert pick(frame, "fair", "beyond_control", "few")["value"] == pytest.approx(beyond)
    overall = accuracy_of(one, fair, None)
    assert pick(frame, "fair", "accuracy", "overall")["value"] == pytest.approx(overall)
    assert pick(frame, "fair", "accuracy", "worst group")["value"] == min(few[fair], accuracy_of(one, fair, 0))
    assert pick(frame, "fair", "accuracy", "few")["n"] == (one.groups == 1).sum()
    # No control for a method that has no network with all ReLUs, and none against itself.
    assert not ((frame["method"] == "bad") & (frame["measure"] == "beyond_control")).any()
    assert not ((frame["method"] == "erm") & (frame["measure"] == "gain")).any()
    assert not ((frame["measure"] == "beyond_control") & (frame["relus"] == TOTAL)).any()
    assert not frame.duplicated(["relus", "method", "group", "class", "measure"]).any()


def test_what_is_not_defined_has_no_limits():
    """The baseline gets none of a group right, so nothing is lost relative to it, however images are weighted."""
    one = scored(0, CHANCES)
    one.correct["erm", 20][one.groups == 1] = False
    frame = compare([one], GROUPS, "erm", resamples=200)
    row = pick(frame, "fair", "mitigation_drop", "few")
    assert row[["value", "low", "high"]].isna().all()
    undefined = frame[frame["value"].isna()]
    assert undefined[["low", "high"]].isna().all(axis=None)


def test_the_draws_are_paired():
    """Each image weighted at random, the same for both methods."""
    one = scored(1, CHANCES)
    frame = compare([one], GROUPS, "erm", resamples=20_000)
    fair, erm = one.correct["fair", 20], one.correct["erm", 20]
    for group, inside in (("few", one.groups == 1), ("overall", one.groups >= 0)):
        first, second = paired_shares(fair[inside], erm[inside], 3000, np.random.default_rng(5))
        low, high = np.quantile(100 * (first - second), [0.025, 0.975])
        row = pick(frame, "fair", "gain", group)
        assert row["low"] == pytest.approx(low, abs=0.6)
        assert row["high"] == pytest.approx(high, abs=0.6)


def test_equal_predictions_leave_a_doubt_about_their_difference():
    same = {**CHANCES, ("twin", 20): CHANCES["erm", 20], ("twin", TOTAL): CHANCES["erm", TOTAL]}
    one = compare([scored(1, same)], GROUPS, "erm", resamples=500)
    for measure, group in (
        ("gain", "few"),
        ("gain", "worst group"),
        ("mitigation_drop", "few"),
        ("beyond_control", "few"),
    ):
        row = pick(one, "twin", measure, group)
        assert row["low"] < row["value"] == 0 < row["high"]
    widths = [np.ptp(pick(one, "twin", "gain", group)[["low", "high"]]) for group in ("overall", "many", "few")]
    assert widths == sorted(widths)
    # Of several seeds that agree wholly nothing tells how far others would be.
    several = compare([scored(seed, same) for seed in range(3)], GROUPS, "erm")
    row = pick(several, "twin", "gain", "few")
    assert row["value"] == 0
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])


def test_several_seeds_give_students_interval_of_paired_differences():
    replicates = [scored(seed, CHANCES) for seed in range(4)]
    frame = compare(replicates, GROUPS, "erm")
    gains = [100 * (accuracy_of(r, ("fair", 20), 1) - accuracy_of(r, ("erm", 20), 1)) for r in replicates]
    row = pick(frame, "fair", "gain", "few")
    expected = stats.ttest_1samp(gains, 0).confidence_interval()
    assert row["value"] == pytest.approx(np.mean(gains))
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["replicates"] == 4


def test_the_pareto_front_by_brute_force():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, size=(12, 2)) / 10
    rows = [
        {"relus": 1, "percent": 1.0, "method": f"m{i}", "group": g, "measure": "accuracy", "value": v}
        for i, point in enumerate(points)
        for g, v in zip(("overall", "worst group"), point, strict=True)
    ]
    found = pareto(pd.DataFrame(rows)).set_index("method")["value"]
    for i, (a, b) in enumerate(points):
        beaten = any(c >= a and d >= b and (c, d) != (a, b) for c, d in points.tolist())
        assert found[f"m{i}"] == float(not beaten)


def test_what_cannot_be_compared():
    with pytest.raises(FairlineError, match="no method 'magic'"):
        compare([scored(0, CHANCES)], GROUPS, "magic")
    lacking = {column: chance for column, chance in CHANCES.items() if column != ("fair", 20)}
    with pytest.raises(FairlineError, match="'fair' with 20 ReLUs is missing for one of the base networks 1 and 2"):
        compare([scored(0, CHANCES), scored(1, lacking)], GROUPS, "erm")


def test_classes_are_compared_as_groups_are():
    """Classes 0 and 1 in the few, 1 and 2 in the many: 0 is the few's alone, 2 the many's, 1 in both."""
    one = scored(0, CHANCES, labels=True)
    assert one.labels is not None
    frame = compare([one], GROUPS, "erm", class_names=("x", "y", "z"), resamples=300)
    classes = frame[(frame["class"] != "") & (frame["relus"] == 20) & (frame["method"] == "fair")]
    sets = set(classes[["group", "class"]].itertuples(index=False, name=None))
    # A class in a group is left out where it is the whole class, as it is then the class's own row.
    assert sets == {("overall", "x"), ("overall", "y"), ("overall", "z"), ("many", "y"), ("few", "y")}
    fair, erm = one.correct["fair", 20], one.correct["erm", 20]
    for (group, label), part in classes.groupby(["group", "class"]):
        inside = one.labels == "xyz".index(label)
        if group != "overall":
            inside &= one.groups == GROUPS.index(group)
        rows = part.set_index("measure")
        assert set(rows.index) == {"recall", "gain", "beyond_control"}
        assert rows.loc["recall", "value"] == pytest.approx(fair[inside].mean())
        assert rows.loc["gain", "value"] == pytest.approx(100 * (fair[inside].mean() - erm[inside].mean()))
        assert rows.loc["gain", "low"] <= rows.loc["gain", "value"] <= rows.loc["gain", "high"]
        assert (rows["n"] == inside.sum()).all()
    balanced = frame[(frame["measure"] == "balanced_accuracy") & (frame["method"] == "fair") & (frame["relus"] == 20)]
    assert balanced["value"].item() == pytest.approx(np.mean([fair[one.labels == label].mean() for label in range(3)]))
    assert balanced["low"].item() < balanced["value"].item() < balanced["high"].item()
    # Groups are as they were.
    plain = compare([scored(0, CHANCES)], GROUPS, "erm", resamples=300)
    own = frame[(frame["class"] == "") & (frame["measure"] != "balanced_accuracy")].reset_index(drop=True)
    assert set(plain["class"]) == {""}
    same = ["relus", "method", "group", "measure", "value", "n"]
    pd.testing.assert_frame_equal(own[same], plain[same])


def test_a_class_that_is_a_group_is_compared_once():
    one = scored(0, CHANCES)
    frame = compare(
        [Scored(one.groups, one.correct, TOTAL, one.groups)], GROUPS, "erm", class_names=GROUPS, resamples=50
    )
    assert set(frame["class"]) == {""}
    row = pick(frame, "fair", "balanced_accuracy", "overall")
    assert row["value"] == pytest.approx(np.mean([pick(frame, "fair", "accuracy", name)["value"] for name in GROUPS]))


def test_classes_over_seeds_have_students_interval():
    replicates = [scored(seed, CHANCES, labels=True) for seed in range(4)]
    frame = compare(replicates, GROUPS, "erm", class_names=("x", "y", "z"))
    gains = [
        100 * (r.correct["fair", 20][r.labels == 0].mean() - r.correct["erm", 20][r.labels == 0].mean())
        for r in replicates
    ]
    row = frame[
        (frame["class"] == "x") & (frame["measure"] == "gain") & (frame["method"] == "fair") & (frame["relus"] == 20)
    ].iloc[0]
    expected = stats.ttest_1samp(gains, 0).confidence_interval()
    assert row["value"] == pytest.approx(np.mean(gains))
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
