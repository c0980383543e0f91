"""Sets of images and verdicts, on constructed predictions."""

import gc
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fairline.audit.cells import cells
from fairline.audit.verdict import CANNOT_TELL, LEAST, MAY, MAY_NOT, verdict
from fairline.errors import FairlineError


def images(*sets):
    """Predictions of (group, class, n, right before, lost, gained)."""
    rows = []
    for group, label, n, before, lost, gained in sets:
        reference = np.arange(n) < before
        own = reference.copy()
        own[:lost] = False
        own[before : before + gained] = True
        rows.append(pd.DataFrame({"group": group, "label": label, "correct": own, "reference_correct": reference}))
    return pd.concat(rows, ignore_index=True)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.booleans(), st.booleans()), min_size=1))
def test_sets_are_all_there_once_and_counted_right(rows):
    table = pd.DataFrame(rows, columns=["group", "label", "correct", "reference_correct"])
    found = cells(table)
    seen = []
    for row in found.to_dict("records"):
        chosen = table
        if row["group"] != "overall":
            chosen = chosen[chosen["group"] == row["group"]]
        if row["kind"] in ("class", "cell"):
            chosen = chosen[chosen["label"] == row["class"]]
        assert row["n"] == len(chosen) > 0
        assert row["before"] == chosen["reference_correct"].sum()
        assert row["after"] == chosen["correct"].sum()
        assert row["lost"] == (chosen["reference_correct"] & ~chosen["correct"]).sum()
        assert row["gained"] == (chosen["correct"] & ~chosen["reference_correct"]).sum()
        if row["kind"] != "overall":
            seen.append(tuple(chosen.index))
    assert len(seen) == len(set(seen))
    sets = {tuple(part.index) for keys in ("group", "label", ["group", "label"]) for _, part in table.groupby(keys)}
    assert set(seen) == sets


def test_a_class_that_is_a_group_is_named_once_and_may_be_critical():
    table = images(("White", "White", 50, 40, 0, 0), ("Black", "Black", 50, 30, 0, 0))
    found = cells(table)
    assert found["kind"].tolist() == ["overall", "group", "group"]
    assert found["class"].tolist() == ["", "White", "Black"]
    assert verdict([found], critical=["Black"]).cells["critical"].tolist() == [False, False, True]


def test_a_class_that_no_group_shows_forbids():
    """Skin lesions: no group loses, and half of the melanomas are lost."""
    lesions = images(
        *((sex, "nevus", 650, 520, 10, 60) for sex in ("women", "men")),
        ("women", "melanoma", 60, 24, 12, 0),
        ("men", "melanoma", 63, 24, 11, 0),
    )
    found = verdict([cells(lesions)])
    assert found.answer == MAY_NOT
    groups = found.cells[found.cells["kind"] == "group"]
    assert (groups["change"] > 0).all()
    assert (found.decisive["kind"], found.decisive["class"]) in [("class", "melanoma"), ("cell", "melanoma")]
    melanoma = found.cells[(found.cells["kind"] == "class") & (found.cells["class"] == "melanoma")].iloc[0]
    assert melanoma["change"] == pytest.approx(-100 * 23 / 123)
    assert melanoma["flag"] == "loss"
    before, after = found.balanced()
    assert before == pytest.approx((1040 / 1300 + 48 / 123) / 2)
    assert after < before


def test_what_is_shown_to_be_harmless_may_ship_and_what_is_not_shown_may_not():
    many = images(("a", "x", 3000, 2000, 20, 20), ("b", "y", 3000, 2000, 25, 20))
    assert verdict([cells(many)], within=2).answer == MAY
    few = images(("a", "x", 300, 200, 2, 2), ("b", "y", 30, 20, 1, 0))
    found = verdict([cells(few)], within=5)
    assert (found.answer, found.decisive["group"]) == (CANNOT_TELL, "b")
    assert found.decisive["needed"] > 30


def test_so_many_images_do_tell():
    few = images(("a", "x", 3000, 2000, 2, 2), ("b", "y", 60, 40, 3, 1))
    needed = verdict([cells(few)], within=5).decisive["needed"]
    factor = math.ceil(needed / 60)
    more = images(("a", "x", 3000, 2000, 2, 2), ("b", "y", 60 * factor, 40 * factor, 3 * factor, factor))
    assert verdict([cells(more)], within=5).answer == MAY


def test_gains_at_worst():
    found = verdict([cells(images(("a", "x", 900, 600, 10, 40), ("b", "y", 900, 600, 5, 60)))])
    assert found.answer == MAY
    assert found.decisive["group"] == "a"
    assert found.decisive["change"] > 0


def test_a_critical_class_may_not_fall():
    table = cells(images(("a", "x", 2000, 1500, 40, 10), ("a", "y", 2000, 1500, 0, 30), ("b", "y", 500, 300, 0, 0)))
    assert verdict([table]).answer == MAY
    assert verdict([table], critical=["x"]).answer == MAY_NOT
    unsure = cells(images(("a", "x", 2000, 1500, 12, 10), ("a", "y", 2000, 1500, 0, 30), ("b", "y", 500, 300, 0, 0)))
    assert verdict([unsure], critical=["x"]).answer == CANNOT_TELL


def test_chance_among_many_sets_forbids_nothing():
    """A loss that is one in fifty by chance, among fifty groups."""
    sets = [(f"g{i}", "x", 100, 60, 6, 6) for i in range(49)]
    found = verdict([cells(images(*sets, ("odd", "x", 100, 60, 10, 2)))], within=5)
    odd = found.cells[found.cells["group"] == "odd"].iloc[0]
    assert odd["high"] < 0
    assert odd["flag"] == ""
    assert found.answer == CANNOT_TELL


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=8))
def test_probabilities_are_corrected_by_holms_method(changed):
    """The k-th smallest of m, times m − k + 1, and no smaller than those before it."""
    table = cells(images(*((f"g{i}", "x", 60, 30, lost, gained) for i, (lost, gained) in enumerate(changed))))
    found = verdict([table])
    z = [
        0.0
        if row["lost"] + row["gained"] == 0
        else (row["gained"] - row["lost"]) / math.sqrt(row["lost"] + row["gained"])
        for row in table.to_dict("records")
    ]
    plain = [2 * norm.sf(abs(each)) for each in z]
    largest = 0.0
    for place, at in enumerate(sorted(range(len(plain)), key=plain.__getitem__)):
        largest = max(largest, min(1.0, plain[at] * (len(plain) - place)))
        assert found.cells["p"][at] == pytest.approx(largest, rel=1e-6, abs=1e-12)


def test_a_verdict_leaves_the_garbage_collector_as_it_was():
    table = cells(images(("a", "x", 60, 30, 3, 1), ("b", "y", 60, 30, 3, 1)))
    assert gc.get_freeze_count() == 0
    verdict([table])
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        verdict([table])
        # What is frozen may die, but is not let go.
        assert 0.9 * frozen < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_tiny_cells_are_told_and_no_obstacle():
    table = images(
        ("a", "x", 2000, 1500, 5, 5),
        ("a", "y", 2000, 1500, 5, 5),
        ("b", "x", LEAST - 1, 5, 5, 0),
        ("b", "y", 2000, 900, 0, 0),
    )
    found = verdict([cells(table)])
    assert found.answer == MAY
    assert found.too_small == 1


def seeds(*losses):
    return [
        cells(images(("a", "x", 400, 300, 4, 4 + seed % 2), ("b", "y", 200, 150, lost, 0)))
        for seed, lost in enumerate(losses)
    ]


def test_seeds_are_the_unit_where_there_are_several():
    assert verdict(seeds(30, 31, 32, 30, 31)).answer == MAY_NOT
    assert verdict(seeds(1, 2, 3, 1, 2)).answer == MAY
    two = verdict(seeds(1, 12))
    assert (two.answer, two.seeds) == (CANNOT_TELL, 2)
    assert two.decisive["needed"] > 2


def test_seeds_that_agree_wholly_say_nothing_of_others():
    found = verdict(seeds(3, 3, 3))
    assert found.answer == CANNOT_TELL
    assert math.isnan(found.decisive["low"])


@pytest.mark.parametrize("within", [-1, 100, math.nan, math.inf])
def test_a_tolerance_is_a_percentage(within):
    with pytest.raises(FairlineError, match="percentage points"):
        verdict(seeds(1), within)


def test_a_critical_class_is_one_of_the_classes():
    with pytest.raises(FairlineError, match=r"no class 'z'.*x, y"):
        verdict(seeds(1), critical=["z"])
