from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.audit.cells import cells
from fairline.audit.verdict import MAY, MAY_NOT
from fairline.errors import FairlineError
from fairline.private import cheapest, frontier, judge, verdicts
from fairline.private.frontier import pareto
from tests.reference import private as reference

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    cost, score = [float(c) for c, _ in points], [float(s) for _, s in points]
    assert pareto(cost, score).tolist() == reference.pareto(cost, score)


def test_unknown_costs_are_on_no_front():
    assert pareto([1.0, math.nan], [0.1, 0.9]).tolist() == [True, False]


def audit() -> pd.DataFrame:
    """Base network with groups at 90 and 80 %, and three students."""
    rows = []
    for model, big, small, limits in (
        ("base", 0.9, 0.8, None),
        ("half", 0.9, 0.78, (4.0, 1.0)),
        ("tenth", 0.9, 0.72, (2.0, 14.0)),
        ("cheap", 0.45, 0.72, (52.0, 14.0)),
    ):
        rows += [(model, "big", "accuracy", big, 0, 0), (model, "small", "accuracy", small, 0, 0)]
        rows.append((model, "overall", "accuracy", (3 * big + small) / 4, 0, 0))
        if limits:
            for group, before, after, high in (("big", 0.9, big, limits[0]), ("small", 0.8, small, limits[1] + 4)):
                rows.append((model, group, "relative_drop", 100 * (before - after) / before, -1.0, high))
            rows.append((model, "overall", "relative_drop", 99.0, 99.0, 99.0))
    return pd.DataFrame(rows, columns=["model", "group", "measure", "value", "low", "high"])


def costs(**more) -> pd.DataFrame:
    names = ["base", "half", "tenth", "cheap"]
    return pd.DataFrame(
        {
            "model": names,
            "protocol": "cheetah",
            "bytes": [100.0, 50.0, 20.0, 10.0],
            "rounds": [9.0, 9.0, 9.0, 1.0],
            "seconds": [4.0, math.nan, 1.0, 2.0],
        }
        | more
    )


def test_accuracies_are_put_beside_costs():
    table = frontier(audit(), costs()).set_index("model")
    assert table.loc["tenth", "worst_group"] == "small"
    assert table.loc["tenth", "largest_drop"] == pytest.approx(10)
    assert table.loc["cheap", "drop_group"] == "big"
    assert table.loc["base", ["largest_drop", "drop_group"]].tolist() == [0, ""]
    assert table["on_bytes_front"].to_dict() == {"base": True, "half": True, "tenth": True, "cheap": True}
    assert table["on_rounds_front"].to_dict() == {"base": True, "half": False, "tenth": False, "cheap": True}
    assert table["on_seconds_front"].to_dict() == {"base": True, "half": False, "tenth": True, "cheap": False}


def test_protocols_have_fronts_of_their_own():
    both = pd.concat([costs(), costs(protocol="semi2k", bytes=[1.0, 2.0, 3.0, 4.0])])
    table = frontier(audit(), both)
    cheap = table[table["protocol"] == "semi2k"].set_index("model")["on_bytes_front"]
    assert cheap.to_dict() == {"base": True, "half": False, "tenth": False, "cheap": False}


def counted() -> pd.DataFrame:
    """The sets of images of the four networks: groups of 620 and 210 images, and a class that is rare in both."""
    before = {
        ("big", "usual"): (560, 520),
        ("big", "rare"): (60, 30),
        ("small", "usual"): (170, 146),
        ("small", "rare"): (40, 18),
    }
    lost = {
        "base": {},
        "half": {("big", "usual"): 3},
        "tenth": {("big", "rare"): 23, ("small", "rare"): 9},
        "cheap": {("big", "usual"): 270},
    }
    tables = []
    for model, own in lost.items():
        rows = []
        for (group, label), (n, right) in before.items():
            reference = np.arange(n) < right
            correct = reference & (np.arange(n) >= own.get((group, label), 0))
            rows.append(
                pd.DataFrame({"group": group, "label": label, "correct": correct, "reference_correct": reference})
            )
        tables.append(cells(pd.concat(rows, ignore_index=True)).assign(model=model))
    return pd.concat(tables, ignore_index=True)


def judged(within: float = 5.0, **more) -> pd.DataFrame:
    sets = counted()
    both = costs(relus=[1000, 500, 100, 10], total_relus=1000, **more)
    return judge(frontier(audit(), both, sets), verdicts(sets, within))


def test_a_lost_class_counts_though_its_groups_are_within():
    table = judged().set_index("model")
    assert table["answer"].to_dict() == {"base": "", "half": MAY, "tenth": MAY_NOT, "cheap": MAY_NOT}
    # The groups of "tenth" lose 23 of 620 and 9 of 210 images; its rare class 32 of 100.
    tenth = table.loc["tenth"]
    assert tenth["largest_loss"] == pytest.approx(100 * 23 / 60)
    assert tenth["loss_who"] == "class “rare” in group “big”"
    assert 0 < tenth["loss_low"] < tenth["largest_loss"] < tenth["loss_high"]
    assert (tenth["lowest"], tenth["lowest_who"]) == (pytest.approx(16 / 100), "class “rare”")
    assert table.loc["base", "lowest_who"] == "class “rare”"
    # Worst groups stay what they were.
    assert table["worst"].to_dict() == frontier(audit(), costs()).set_index("model")["worst"].to_dict()


def test_fronts_are_of_the_worst_group_or_class():
    table = judged().set_index("model")
    assert table["on_bytes_front"].to_dict() == {"base": False, "half": True, "tenth": False, "cheap": True}
    assert (frontier(audit(), costs())["lowest"] == frontier(audit(), costs())["worst"]).all()


@pytest.mark.parametrize(
    ("within", "cost", "found"),
    [(5, "bytes", "half"), (60, "bytes", "cheap"), (60, "seconds", "tenth"), (5, "rounds", "half")],
)
def test_the_cheapest_that_may_ship(within, cost, found):
    assert cheapest(judged(within), cost=cost)["model"] == found


def test_none_may_be_cheap_enough():
    assert cheapest(judged(0)) is None
    # "half" has no seconds.
    assert cheapest(judged(5), cost="seconds") is None


def test_a_tie_goes_to_the_one_that_loses_least():
    assert cheapest(judged(60, bytes=[1.0, 1.0, 1.0, 1.0]))["model"] == "half"


def test_bad_input_is_one_sentence():
    with pytest.raises(FairlineError, match="not 'euros'"):
        cheapest(judged(), cost="euros")
    with pytest.raises(FairlineError, match="from 0 to 100, not -1"):
        judged(-1)
    with pytest.raises(FairlineError, match="no network 'unknown'"):
        frontier(audit(), costs(model=["base", "half", "tenth", "unknown"]))
