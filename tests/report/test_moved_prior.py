"""How much of a drop is a moved prior: against accuracies before and after a shift, by their definition."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairline.report.claims import CLAIMS, findings
from fairline.report.moved_prior import MOVED, MOVED_CONTROL, SHIFTED, SHIFTED_CONTROL, moved_prior
from fairline.report.paper_figures import draw_shifted
from tests.report.study_table import study_table
from tests.report.test_paper_figures import contents

GROUPS = ["large", "middle", "small"]
SEEDS = range(3)
TABLE = study_table(seeds=SEEDS)
VARIANTS = [MOVED, SHIFTED, MOVED_CONTROL, SHIFTED_CONTROL]

#: (network, shifted, seed, group): the base network under the shifts of the cut one and of the control, and those two.
accuracies = hnp.arrays(float, (4, 2, len(SEEDS), len(GROUPS)), elements=st.floats(0, 100).map(lambda x: round(x, 3)))


def by_seed(levels: np.ndarray, *, method: str = "erm", control: bool = True, study: str = "planted") -> pd.DataFrame:
    """What a comparison would say of accuracies in percent."""
    rows = []
    for seed in SEEDS:
        for place, group in enumerate(GROUPS):
            for network, base, percent in ((2, 0, 2.0), (3, 1, 100.0)):
                before, before_moved = levels[0, 0, seed, place], levels[base, 1, seed, place]
                plain, moved = levels[network, :, seed, place]
                told = {
                    "drop_points": before - plain,
                    "undone": moved - plain,
                    "undone_beyond_base": moved - plain - (before_moved - before),
                }
                about = {"study": study, "results": "utkface:race", "method": method, "class": "", "group": group}
                about |= {"seed": seed, "percent": percent, "relus": round(100 * percent), "n": 50}
                rows += [{**about, "measure": name, "value": value} for name, value in told.items()]
    table = pd.DataFrame(rows)
    return table if control else table[table["percent"] < 100]


def effects(table: pd.DataFrame, compared: pd.DataFrame) -> dict[str, float]:
    return {finding.variant: finding.effect for finding in moved_prior(table, compared)}


@settings(max_examples=30)
@given(accuracies)
def test_the_numbers_are_those_of_accuracies_before_and_after(levels):
    base, _, cut, control = 100 * (levels / 100)
    base_moved, cut_moved, control_moved = base[1], cut[1], control[1]
    smallest, largest = GROUPS.index("small"), GROUPS.index("large")
    before, after = base[0] - cut[0], base_moved - cut_moved
    expected = {
        MOVED: (before - after)[:, smallest].mean(),
        SHIFTED: (after[:, smallest] - after[:, largest]).mean(),
        MOVED_CONTROL: ((cut_moved - cut[0]) - (control_moved - control[0]))[:, smallest].mean(),
        SHIFTED_CONTROL: ((control_moved - cut_moved)[:, smallest] - (control_moved - cut_moved)[:, largest]).mean(),
    }
    assert effects(TABLE, by_seed(levels)) == pytest.approx(expected, abs=1e-9)


def test_a_drop_that_is_a_moved_prior_alone():
    """The shift of 7 points gives the smallest group all that it lost, and the base network nothing."""
    levels = np.full((4, 2, len(SEEDS), len(GROUPS)), 60.0)
    levels += np.random.default_rng(0).normal(0, 0.1, levels.shape)
    levels[2, 0, :, 2] -= 7
    found = findings(TABLE, by_seed(levels)).query("claim == 1").set_index("variant")
    assert found.loc[MOVED, "effect"] == pytest.approx(7, abs=0.5)
    assert found.loc[MOVED, "verdict"] == "holds"
    for variant in (SHIFTED, SHIFTED_CONTROL):
        assert found.loc[variant, "effect"] == pytest.approx(0, abs=0.5)
    assert "small, with 2 % of the ReLUs" in found.loc[MOVED, "note"]
    assert set(VARIANTS) <= set(CLAIMS[1].variants)


def test_only_what_was_compared_is_told():
    levels = np.random.default_rng(0).uniform(20, 90, (4, 2, len(SEEDS), len(GROUPS)))
    assert list(effects(TABLE, by_seed(levels))) == VARIANTS
    assert list(effects(TABLE, by_seed(levels, control=False))) == VARIANTS[:2]
    assert not effects(TABLE, by_seed(levels, study="another"))
    assert not effects(TABLE, by_seed(levels, method="lagrangian mu=0.5"))
    assert not set(findings(TABLE)["variant"]) & set(VARIANTS)
    assert not effects(TABLE, pd.DataFrame())


def test_another_linearizer_is_named_as_comparisons_name_it():
    levels = np.random.default_rng(0).uniform(20, 90, (4, 2, len(SEEDS), len(GROUPS)))
    table = study_table(method="deepreduce")
    assert list(effects(table, by_seed(levels, method="deepreduce: erm"))) == VARIANTS
    assert not effects(table, by_seed(levels))


def test_each_groups_drop_is_drawn_before_and_after():
    levels = np.random.default_rng(0).uniform(20, 90, (4, 2, len(SEEDS), len(GROUPS)))
    (chart,) = draw_shifted(TABLE, by_seed(levels)).values()
    found = {(row["measure"], row["budget"], row["group"]): row["value"] for row in contents(chart)}
    expected = {}
    for budget, network, base in (("2 %", 2, 0), ("100 %", 3, 1)):
        lost = {"before": levels[0, 0] - levels[network, 0], "after": levels[base, 1] - levels[network, 1]}
        for name, by_group in lost.items():
            expected |= {(name, budget, group): by_group[:, place].mean() for place, group in enumerate(GROUPS)}
    assert found == pytest.approx(expected)
    assert draw_shifted(TABLE, pd.DataFrame()) == {}


def test_masks_that_comparisons_call_otherwise_are_not_told():
    """Of two masks of one method in a study, the second would be told the first's numbers."""
    compared = by_seed(np.random.default_rng(0).uniform(40, 60, (4, 2, len(SEEDS), len(GROUPS))))
    cut = TABLE[TABLE["stage"] == "finetuned"]
    both = pd.concat([TABLE, cut.assign(masks="fast")], ignore_index=True)
    assert effects(TABLE, compared)
    assert not effects(both, compared)
    # Another method's masks have names of their own.
    assert effects(pd.concat([TABLE, cut.assign(masks="dr", method="deepreduce")], ignore_index=True), compared)
