from __future__ import annotations

import math

import pandas as pd
import pytest

from fairline.data.grouped import OVERALL
from fairline.report import corrections

SIZES = {"large": 500, "middle": 300, "small": 100}
#: Whole accuracy and accuracy of the affine part.
ACCURACY = {"large": (0.9, 0.81), "middle": (0.8, 0.4), "small": (0.5, 0.1), OVERALL: (0.8, 0.5)}


def table(
    gap: tuple[float, float, float] | None = (70.0, 60.0, 80.0),
    centred: tuple[float, float, float] = (50.0, 40.0, 60.0),
    *,
    count: int = 12,
    one_class: float = 0.4,
    percent: float = 2.0,
    stage: str = "finetuned",
) -> pd.DataFrame:
    """Rows of one network, as the figures take them."""
    rows = []
    for group, (whole, affine) in ACCURACY.items():
        n, gain = SIZES.get(group, 900), whole - affine
        rows += [
            (group, "accuracy", whole, whole - 0.05, whole + 0.05, n),
            (group, "affine_accuracy", affine, affine - 0.05, affine + 0.05, n),
            (group, "centred_affine_accuracy", affine, affine - 0.05, affine + 0.05, n),
            (group, "correction_gain", gain, gain - 0.1, gain + 0.1, n),
            (group, "correction_share", 100 * gain / whole, 0.0, 99.0, n),
        ]
        rows += [(group, f"correction_drop/layer{k}", 0.04 * k, 0.04 * k - 0.1, 0.04 * k + 0.1, n) for k in (1, 4)]
        if group != OVERALL:
            rows.append((group, "units_for_half", 3.0, math.nan, math.nan, n))
        if group in ("large", "small"):
            rows.append((group, "correction_compared", 1.0 if group == "small" else -1.0, math.nan, math.nan, n))
    rows += [
        (OVERALL, "corrections", count, math.nan, math.nan, 900),
        (OVERALL, "layer_corrections/layer1", count - 2, math.nan, math.nan, 900),
        (OVERALL, "layer_corrections/layer4", 2, math.nan, math.nan, 900),
        (OVERALL, "affine_one_class", one_class, math.nan, math.nan, 900),
        (OVERALL, "units_one_group", 0.5, math.nan, math.nan, 300),
        (OVERALL, "units_one_group_chance", 0.2, math.nan, math.nan, 300),
        (OVERALL, "units_exact", 1.0, math.nan, math.nan, 300),
        (OVERALL, "unit_agreement", 0.93, math.nan, math.nan, 300),
        (OVERALL, "centred_minority_correction_share_gap", *centred, 600),
    ]
    if gap is not None:
        rows.append((OVERALL, "minority_correction_share_gap", *gap, 600))
    frame = pd.DataFrame(rows, columns=["group", "measure", "value", "low", "high", "n"])
    return frame.assign(
        model="students/a",
        stage=stage,
        percent=percent,
        budget=f"{percent:g} %",
        network="base network" if stage == "base" else f"{percent:g} %",
        variant="base network" if stage == "base" else "SNL",
        train_n=frame["group"].map(SIZES).fillna(900),
    )


PREDICTIONS = pd.DataFrame({"model": "students/a", "affine_prediction": ["yes"] * 9 + ["no"]})


@pytest.mark.parametrize(
    ("gap", "centred", "words"),
    [
        ((70, 60, 80), (50, 40, 60), "the smallest groups live on the corrections more than the largest does."),
        ((-70, -80, -60), (-9, -12, -2), "live on the corrections less than the largest does, against the story."),
        ((7, -6, 20), (9, -2, 30), "Both intervals hold 0: these images cannot tell."),
        ((70, 60, 80), (9, -2, 30), "Only one of the two intervals excludes 0: weak evidence at best."),
        ((7, -6, 20), (-9, -12, -2), "Only one of the two intervals excludes 0: weak evidence at best."),
        ((70, 60, 80), (-9, -12, -2), "The two disagree, so the answer hangs on how the corrections are taken out."),
    ],
)
def test_the_verdict_follows_the_intervals(gap, centred, words):
    text = corrections.verdict(table(gap, centred), PREDICTIONS)
    assert text.endswith(words)
    start = (
        "2 % of the ReLUs: without the corrections “small”, the smallest group, would lose 80 % of its accuracy, and "
    )
    assert text.startswith(start + "“large”, the largest, would lose 10 %; the difference is ")
    assert f"{gap[0]:+d} points (95 % interval {gap[1]:+d} to {gap[2]:+d})" in text
    assert f"at its mean instead of 0 it is {centred[0]:+d} points" in text


def test_a_verdict_says_what_it_cannot_tell():
    assert "there is nothing to compare" in corrections.verdict(table(count=0), PREDICTIONS)
    assert "cannot tell, as groups are of one size" in corrections.verdict(table(None), PREDICTIONS)
    text = corrections.verdict(table(one_class=0.9), PREDICTIONS)
    assert "the affine part calls 90% of all images “yes”: it hardly classifies" in text


def test_units_in_words():
    text = corrections.units_text(table(), ["large", "small"])
    assert text.startswith("2 % of the ReLUs, 12 units: 50% of those that help a group mainly serve one (20% if")
    assert "rests on 3 for “large”, 3 for “small” of them." in text
    assert text.endswith("Every unit was taken out by itself (rank correlation of estimate and removal 0.93).")
    rows = table()
    assert corrections.units_text(rows[rows["measure"] != "units_one_group"], ["large"]) == ""


def test_the_panel_has_every_budget_and_speaks_of_the_fewest_relus():
    base = table(percent=100.0, stage="base").assign(model="base")
    frame = pd.concat([base, table(percent=10.0), table()])
    (entry,) = corrections.panel(frame, PREDICTIONS)
    assert entry["verdict"] == corrections.verdict(table(), PREDICTIONS)
    assert [text.split(", ")[0] for text in entry["units"]] == ["2 % of the ReLUs", "10 % of the ReLUs", "base network"]
    assert entry["table"]["networks"] == ["base network", "10 % of the ReLUs", "2 % of the ReLUs"]
    small = entry["table"]["rows"][2]
    assert small["group"] == "small"
    assert small["cells"][2]["affine"] == "10.0%"
    assert small["cells"][2]["gain"] == "+40.0 points [+30.0, +50.0]"
    assert small["cells"][2]["share"] == "80 % of it [+0, +99]"
    assert small["cells"][2]["sure"] == "gain"
    assert entry["table"]["rows"][0]["cells"][2]["sure"] == ""
    assert entry["table"]["gaps"] == [["+70 [+60, +80]"] * 3, ["+50 [+40, +60]"] * 3]
    assert corrections.panel(frame[frame["measure"] == "accuracy"], PREDICTIONS) == []


def test_the_figures_hold_the_numbers():
    base = table(percent=100.0, stage="base").assign(model="base")
    made = corrections.figures(pd.concat([base, table()]))
    assert list(made) == ["corrections_by_group_snl", "corrections_by_layer_snl"]
    (points,) = made["corrections_by_group_snl"].to_dict()["datasets"].values()
    assert len(points) == 2 * 3 * 3
    joined = next(row for row in points if row["group"] == "small" and row["measure"] == "accuracy")
    assert (joined["affine_accuracy"], joined["accuracy"]) == (0.1, 0.5)
    (cells,) = made["corrections_by_layer_snl"].to_dict()["datasets"].values()
    assert {cell["name"]: cell["text"] for cell in cells} == {"layer1 (10)": "", "layer4 (2)": "16"}


def test_what_stays_is_named():
    more = table().iloc[:1].assign(group=OVERALL, measure="bends_max_pool2d", value=2.0)
    (entry,) = corrections.panel(pd.concat([table(), more]), PREDICTIONS)
    assert entry["bends"] == ["max pool2d"]
