"""What a comparison says of the null front, held against its numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairline.audit.comparison import BASE
from fairline.audit.null_front import shifted
from fairline.jobs.compare import _against_null, _compared
from fairline.report.comparison import group_order, pareto_front, prepare
from fairline.report.null_front import (
    ABOVE,
    BELOW,
    UNTOLD,
    acts_on_groups,
    answer,
    distances,
    lines,
    summary,
    undoing,
    undone_table,
)
from tests.audit.test_null_front import TOTAL, population

NAMES = np.array(["many", "few"])


def compared(*seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table and the shifts of a comparison of made-up networks, whose validation images are those of the part."""
    tables, shifts = [], []
    for seed in seeds:
        groups, between = population(seed)
        for (method, relus), own in between.items():
            what = {"base": f"seed {seed}", "method": method, "relus": relus, "total": TOTAL}
            images = {"sample": range(len(groups)), "label": NAMES[groups], "group": NAMES[groups]}
            right = (own[0] <= 0) & (own[1] >= 0)
            tables.append(pd.DataFrame({**what, **images, "correct": right, "right_from": own[0], "right_to": own[1]}))
            shifts += [shifted(own, NAMES[groups]).assign(**what, part=part) for part in ("test", "val")]
    images, shifts = pd.concat(tables), pd.concat(shifts)
    by_seed = [[part for _, part in whole.groupby("base", sort=False)] for whole in (images, shifts)]
    frame = _compared(by_seed[0], None, 50, 0)
    frame = pd.concat([frame, _against_null(*by_seed, "erm", 50, 0)], ignore_index=True)
    return prepare(frame.assign(train_n=frame["group"].map({"many": 800.0, "few": 200.0}))), shifts


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_sentence_is_that_of_its_numbers(seeds):
    frame, _ = compared(*seeds)
    found = {(row["method"], row["budget"]): row for row in distances(frame)}
    assert set(found) == {("erm", "100 %"), ("fair", "100 %"), ("erm", "2 %"), ("fair", "2 %")}
    rows = frame[frame["measure"] == "above_null"].set_index(["method", "budget"])
    worst = frame[(frame["measure"] == "accuracy") & (frame["group"] == "worst group")].set_index(["method", "budget"])
    for key, row in rows.iterrows():
        said = found[key]["said"]
        if key[0] == "erm":
            assert found[key]["answer"] == ""
            assert "It is a point of the free line" in said
            continue
        assert found[key]["answer"] == answer(row)
        assert f"gives the worst group {worst.loc[key, 'value'] - row['value'] / 100:.1%}" in said
        assert f"it has {worst.loc[key, 'value']:.1%}" in said
    assert "Beyond its control" in found["fair", "2 %"]["said"]
    assert "Beyond its control" not in found["fair", "100 %"]["said"]
    assert summary(frame, "2 %").count("“fair”") == 1


@given(st.floats(-9, 9), st.floats(0, 9) | st.just(float("nan")))
def test_a_distance_is_beyond_chance_only_where_its_limits_are(value, half):
    row = {"value": value, "low": value - half, "high": value + half}
    excluded = abs(value) > half
    assert (answer(row) == UNTOLD) == (not excluded)
    if excluded:
        assert answer(row) == (ABOVE if value > 0 else BELOW)


def test_what_a_shift_undoes_is_told_of_whom_linearization_hit_most():
    frame, _ = compared(0)
    (said,) = undoing(frame)
    own = frame[(frame["method"] == "erm") & (frame["budget"] == "2 %") & (frame["group"] == "few")]
    values = own.set_index("measure")["value"]
    assert said.startswith(f"With 2 % of the ReLUs “few” loses {values['drop_points']:.1f} points under “erm”")
    assert f"{values['undone']:+.1f} points" in said
    table = undone_table(frame, "2 %", group_order(frame))
    assert [part["who"] for part in table] == ["overall", "worst group", "many", "few"]
    assert all(len(part["rows"]) == 2 for part in table)
    assert table[3]["rows"][0]["cells"][1]["value"] == f"{values['undone']:+.1f}".replace("-", "−")


def test_the_drawn_line_is_the_front_and_methods_lie_on_the_picture():
    frame, shifts = compared(0, 1)
    drawn = lines(shifts, frame, "test")
    assert set(drawn["of"]) == {"erm", BASE}
    assert (drawn["front"] >= drawn["worst"] - 1e-12).all()
    own = drawn[(drawn["of"] == "erm") & (drawn["budget"] == "2 %")].set_index("tau")
    accuracy = frame[(frame["measure"] == "accuracy") & (frame["method"] == "erm") & (frame["budget"] == "2 %")]
    plain = accuracy.set_index("group")["value"]
    assert own.loc[0.0, "overall"] == pytest.approx(plain["overall"])
    assert own.loc[0.0, "worst"] == pytest.approx(plain["worst group"])
    panel = pareto_front(frame, drawn)[-1].to_dict()
    without = pareto_front(frame)[-1].to_dict()
    assert len(panel["layer"]) == len(without["layer"]) + 5  # two lines, a path, dots and words
    assert "erm" in str(panel)


def test_a_shift_acts_on_groups_only_where_classes_do_not_cross_them():
    images = pd.DataFrame({"label": ["x", "y", "y"], "group": ["a", "b", "b"]})
    assert acts_on_groups(images)
    assert not acts_on_groups(images.assign(group=["a", "b", "a"]))
