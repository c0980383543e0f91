"""Verdicts of a comparison's methods, over images and over seeds, and what its page says of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fairline.audit.comparison import BASE
from fairline.audit.verdict import CANNOT_TELL, MAY, MAY_NOT
from fairline.errors import FairlineError
from fairline.jobs.compare import _compared
from fairline.report.comparison import headline, order, prepare, table, verdict_table
from fairline.report.verdict import methods

TOTAL = 1000

#: Images of a group and class, and how many of them the base network gets right.
SETS = {
    ("women", "cat"): (600, 500),
    ("women", "dog"): (200, 150),
    ("men", "cat"): (500, 400),
    ("men", "dog"): (150, 120),
}


def seen(base: str, lost: dict[tuple[str, int], dict[tuple[str, str], int]]) -> pd.DataFrame:
    """Predictions of a comparison: what each method and budget loses of each set."""
    columns = {(BASE, TOTAL): {}, **lost}
    tables = []
    for (method, relus), losses in columns.items():
        rows = []
        for (group, label), (n, right) in SETS.items():
            correct = np.arange(n) < right
            correct[: losses.get((group, label), 0)] = False
            rows.append(pd.DataFrame({"label": label, "group": group, "correct": correct}))
        own = pd.concat(rows, ignore_index=True)
        tables.append(own.assign(base=base, method=method, relus=relus, total=TOTAL, sample=range(len(own))))
    return pd.concat(tables, ignore_index=True)


def compared(*tables: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame = _compared(tables, None, 50, 0)
    sizes = {"women": 8000.0, "men": 6000.0}
    return prepare(frame.assign(train_n=frame["group"].map(sizes))), pd.concat(tables, ignore_index=True)


#: Both groups gain; the dogs lose.
DOGS = {("women", "dog"): 40, ("men", "dog"): 30}
MILD = {("women", "cat"): 4, ("men", "dog"): 1}


def test_one_base_network_is_judged_by_its_images():
    frame, images = compared(seen("a", {("erm", TOTAL): MILD, ("erm", 20): DOGS, ("fair", 20): MILD}))
    found = {(each.variant, each.relus): each for each in methods(frame, images)}
    assert list(found) == [("erm", TOTAL), ("erm", 20), ("fair", 20)]
    assert {key: each.answer for key, each in found.items()} == {
        ("erm", TOTAL): MAY,
        ("erm", 20): MAY_NOT,
        ("fair", 20): MAY,
    }
    lost = found["erm", 20]
    assert (lost.verdict.decisive["class"], lost.verdict.seeds) == ("dog", 1)
    assert lost.control is not None
    assert lost.control.change == pytest.approx(0, abs=1)
    assert "mostly the ReLUs" in lost.control_told()
    assert found["erm", TOTAL].is_control
    # At 100 % of the ReLUs masks are all alike, but "fair" was finetuned otherwise.
    assert found["fair", 20].control is None
    assert methods(frame, images, within=30)[1].answer == MAY
    assert methods(frame, images, critical=["dog"])[2].answer != MAY


def test_two_seeds_judge_a_method_by_its_seeds():
    small = {("erm", TOTAL): {}, ("erm", 20): DOGS}
    worse = {("erm", TOTAL): {("men", "cat"): 3}, ("erm", 20): {**DOGS, ("women", "dog"): 42}}
    frame, images = compared(seen("a", small), seen("b", worse))
    _, cut = methods(frame, images)
    assert cut.verdict.seeds == 2
    dogs = cut.verdict.cells.set_index(["group", "class"]).loc[("overall", "dog")]
    assert dogs["change"] == pytest.approx(-100 * np.mean([70 / 350, 72 / 350]))
    # Of two seeds Student's interval is wide, but they agree that far.
    assert dogs["low"] < dogs["change"] < dogs["high"] < 0
    assert cut.answer in (MAY_NOT, CANNOT_TELL)
    assert "2 seeds" in cut.reason()
    assert "so near to the tolerance" not in cut.reason()
    assert cut.control is not None
    # Seeds that agree wholly tell no limits, and so nothing.
    frame, images = compared(seen("a", small), seen("b", small))
    assert methods(frame, images)[1].answer == CANNOT_TELL
    assert {row["change"].partition(" ")[2] for row in verdict_table(methods(frame, images))} == {"no limits"}


def test_the_headline_says_what_the_verdicts_say():
    frame, images = compared(seen("a", {("erm", 20): DOGS, ("fair", 20): {("women", "dog"): 35, ("men", "dog"): 25}}))
    found = methods(frame, images)
    told = headline(frame, found)
    assert told[0].startswith("No network may ship within 5 points.")
    assert "“fair” has the highest worst-group accuracy" in told[1]
    assert "Against the base network it may not ship" in told[1]
    frame, images = compared(seen("a", {("erm", 20): DOGS, ("fair", 20): MILD}))
    told = headline(frame, methods(frame, images))
    assert told[0].startswith("fair, 2 % of the ReLUs may ship")
    assert "Against the base network it may ship" in told[1]


def test_what_is_no_better_than_the_baseline_is_no_winner():
    """Also where it comes first in the alphabet, and where nobody gets anything of the worst group right."""
    for lost in (DOGS, dict.fromkeys(SETS, 600)):
        frame, images = compared(seen("a", {("erm", 20): lost, ("dull", 20): lost}))
        told = headline(frame, methods(frame, images))
        assert "no method has a higher worst-group accuracy than “erm”" in told[1]


def test_the_table_has_everyone_and_a_comparison_of_an_earlier_version_its_groups():
    frame, images = compared(seen("a", {("erm", 20): DOGS, ("fair", 20): MILD}))
    people = ["overall", "worst group", "women", "men", "class “cat”", "class “dog”"]
    people += [f"class “{label}” in group “{group}”" for group in ("women", "men") for label in ("cat", "dog")]
    assert order(frame) == people
    rows = table(frame, "2 %")
    assert [part["who"] for part in rows] == people
    assert all(len(part["rows"]) == 2 and "gain" in part["rows"][1] for part in rows)
    old = prepare(frame[frame["class"] == ""].drop(columns=["class", "who", "budget"]))
    assert [part["who"] for part in table(old, "2 %")] == people[:4]
    assert methods(old, images.drop(columns="label")) == []
    assert "“fair” has the highest" in headline(old, [])[0]


def test_bad_input_is_one_sentence():
    frame, images = compared(seen("a", {("erm", 20): DOGS}))
    with pytest.raises(FairlineError, match="from 0 to 100, not -1"):
        methods(frame, images, within=-1)
    with pytest.raises(FairlineError, match="no class 'cow' to be critical of"):
        methods(frame, images, critical=["cow"])
