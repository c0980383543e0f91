from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.errors import FairlineError
from fairline.private import cheapest, frontier
from fairline.private.frontier import pareto
from tests.reference import private as reference

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
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


@pytest.mark.parametrize(
    ("within", "cost", "sure", "found"),
    [
        (0, "bytes", False, "base"),
        (3, "bytes", False, "half"),
        (10.0001, "bytes", False, "tenth"),
        (10.0001, "bytes", True, "half"),
        (60, "bytes", False, "cheap"),
        (60, "seconds", False, "tenth"),
        (3, "seconds", False, "base"),
    ],
)
def test_the_cheapest_that_keeps_every_group(within, cost, sure, found):
    table = frontier(audit(), costs())
    assert cheapest(table, within, cost=cost, sure=sure)["model"] == found


def test_none_may_be_cheap_enough():
    table = frontier(audit(), costs())
    assert cheapest(table[table["model"] == "cheap"], 5) is None


def test_a_tie_goes_to_the_one_whose_worst_group_loses_least():
    table = frontier(audit(), costs(bytes=[1.0, 1.0, 1.0, 1.0]))
    assert cheapest(table, 60)["model"] == "base"


def test_bad_input_is_one_sentence():
    table = frontier(audit(), costs())
    with pytest.raises(FairlineError, match="not 'euros'"):
        cheapest(table, 5, cost="euros")
    with pytest.raises(FairlineError, match="from 0 on"):
        cheapest(table, -1)
    with pytest.raises(FairlineError, match="no network 'unknown'"):
        frontier(audit(), costs(model=["base", "half", "tenth", "unknown"]))
