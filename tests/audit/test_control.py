"""What the control explains, counted again image by image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.audit.cells import cells
from fairline.audit.control import Control, beside, control_of
from fairline.audit.intervals import mean_interval
from fairline.audit.paired import change_interval
from fairline.audit.verdict import verdict
from fairline.data.grouped import OVERALL


def images(seed: int, n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A network's predictions and its control's, which come in another order."""
    draw = np.random.default_rng(seed)
    own = pd.DataFrame(
        {
            "index": draw.permutation(n),
            "label": draw.choice(["cat", "dog"], n),
            "group": draw.choice(["old", "young"], n, p=[0.7, 0.3]),
            "correct": draw.random(n) < draw.random(),
            "reference_correct": draw.random(n) < draw.random(),
        }
    )
    control = own[["index"]].assign(correct=draw.random(n) < draw.random()).sample(frac=1, random_state=seed)
    return own, control


def decisive(judged, own: pd.DataFrame, control: pd.DataFrame) -> tuple[int, int, int, int, int]:
    """Images of the set that decides: all, right of base, network and control, and of the control alone."""
    kind, group, label = (judged.decisive[key] for key in ("kind", "group", "class"))
    whole = dict(zip(control["index"], control["correct"], strict=True))
    n = before = after = kept = lost = 0
    for image in own.to_dict("records"):
        if group not in (OVERALL, image["group"]) or (kind in ("class", "cell") and label != image["label"]):
            continue
        n += 1
        before += image["reference_correct"]
        after += image["correct"]
        kept += whole[image["index"]]
        lost += whole[image["index"]] and not image["correct"]
    return n, before, after, kept, lost


@given(seed=st.integers(0, 2**20), n=st.integers(40, 200))
@settings(max_examples=40)
def test_against_the_images_themselves(seed, n):
    own, control = images(seed, n)
    counted = cells(beside(own, control))
    judged = verdict([counted])
    told = Control.of("control", judged, [counted])
    size, before, after, kept, lost = decisive(judged, own, control)
    assert told.change == pytest.approx(100 * (kept - before) / size)
    assert told.beyond == pytest.approx(100 * (after - kept) / size)
    # What the finetune does and what linearization does make up the whole change.
    assert told.change + told.beyond == pytest.approx(judged.decisive["change"])
    low, high = change_interval(lost, lost + after - kept, size)
    assert (told.low, told.high) == pytest.approx((100 * float(low), 100 * float(high)))


@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_over_seeds_the_base_networks_are_the_unit(seed):
    parts = [images(seed + number, 120) for number in range(3)]
    counted = [cells(beside(own, control)) for own, control in parts]
    judged = verdict(counted)
    told = Control.of("control", judged, counted)
    beyond = []
    for own, control in parts:
        n, _, after, kept, _ = decisive(judged, own, control)
        beyond.append(100 * (after - kept) / n)
    assert told.beyond == pytest.approx(np.mean(beyond))
    assert (told.low, told.high) == pytest.approx(mean_interval(np.array(beyond)))


def test_the_control_was_trained_alike():
    about = pd.DataFrame(
        [
            ("a", "finetune", "snl", "erm", 10),
            ("b", "finetune", "random", "erm", 100),
            ("c", "finetune", "snl", "erm", 100),
            ("d", "finetune", "snl", "lagrangian", 10),
            ("e", "linearize", "snl", "", 100),
        ],
        columns=["model", "stage", "method", "objective", "relus"],
    ).set_index("model")
    about["total_relus"] = 100
    assert [control_of(about.loc[name], about) for name in about.index] == ["c", None, None, None, None]
    assert control_of(about.loc["a"], about.drop(index="c")) == "b"


def test_a_control_of_the_same_method_is_that_of_the_same_run():
    """Two finetunes of one objective with other settings: each has its own control, or none."""
    rows = [("one/budget-10", 10), ("one/budget-100", 100), ("two/budget-10", 10), ("two/budget-100", 100)]
    about = pd.DataFrame(rows, columns=["model", "relus"]).assign(
        stage="finetune", method="snl", objective="lagrangian", total_relus=100
    )
    named = about.set_index("model")
    assert control_of(named.loc["one/budget-10"], named) == "one/budget-100"
    assert control_of(named.loc["two/budget-10"], named) == "two/budget-100"
    assert control_of(about.iloc[2], named) == "two/budget-100"
    assert control_of(named.loc["two/budget-10"], named.drop(index="two/budget-100")) is None
    # Masks of other methods that keep all ReLUs are alike; of two nobody knows whose.
    other = named.drop(index="two/budget-100").assign(method=["random", "random", "snl"])
    assert control_of(other.loc["two/budget-10"], other) == "one/budget-100"
    more = pd.concat([other, other.loc[["one/budget-100"]].rename(index={"one/budget-100": "three/budget-100"})])
    assert control_of(more.loc["two/budget-10"], more) is None
