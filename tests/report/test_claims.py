"""Each claim is told from its opposite, and what cannot be told is left undecided."""

from __future__ import annotations

import html
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fairline.report.claims import (
    CLAIMS,
    CONTROL,
    DISTANCE_CONTROL,
    LOWEST,
    LOWEST_CONTROL,
    POINTS,
    _of_every_group,
    findings,
    over_panels,
    summary,
)
from fairline.report.claims_page import write_claims
from fairline.report.evidence import corrected
from fairline.report.finding import FAILS, HOLDS, UNDECIDED, Finding, judge
from fairline.report.panels import variants_of_mu
from tests.report.study_table import study_table

#: Planted effects, by claim, for which it holds and for which it does not.
PLANTED = {
    1: ({"slope": 4}, {"slope": -4}),
    2: ({"ratio": 2}, {"ratio": 0.5}),
    3: ({"ratio": 2}, {"ratio": 0.5}),
    4: ({"ratio": 2}, {"ratio": 0.5}),
    5: ({"distance": 0.5}, {"distance": -0.5}),
    6: ({"loss": 0.1}, {"loss": 1.0}),
    8: ({"gain": 3}, {"gain": {"large": -3, "middle": 3, "small": 3}}),
    9: ({"mus": (0.1, 0.2, 0.3)}, {"mus": (0.1, 0.2, 0.3), "mu_effect": 3}),
    10: ({"slope": 4, "model": "vgg19"}, {"slope": -4, "model": "vgg19"}),
    11: ({"gain": 3}, {"gain": {"large": 3, "middle": 3, "small": -3}}),
}


def verdicts(table: pd.DataFrame, claim: int) -> list[str]:
    found = main(table)
    return found.loc[found["claim"] == claim, "verdict"].tolist()


def main(table: pd.DataFrame) -> pd.DataFrame:
    """The claims' own numbers, without what stands beside them."""
    return findings(table).query("variant == ''")


@pytest.mark.parametrize("claim", PLANTED)
def test_a_claim_is_told_from_its_opposite(claim):
    for effects, verdict in zip(PLANTED[claim], (HOLDS, FAILS), strict=True):
        assert verdicts(study_table(**effects), claim)[0] == verdict
        # Nothing can be said of one seed.
        assert verdicts(study_table(seeds=(0,), **effects), claim)[0] == UNDECIDED


def test_deepreduce_against_snl():
    for worse, verdict in ((8, HOLDS), (1, FAILS), (4, UNDECIDED)):
        table = pd.concat([study_table(), study_table(study="b", method="deepreduce", slope=worse, noise=0.3)])
        assert verdicts(table, 7) == [verdict]
    assert verdicts(study_table(), 7) == []


def test_the_effects_are_those_that_were_planted():
    found = findings(study_table(slope=4, ratio=3, distance=0.7, loss=0.3, gain=2, noise=0)).set_index("claim")
    first = found[~found.index.duplicated()]["effect"]
    assert first[1] == pytest.approx(4)
    assert first[2] == pytest.approx(3)
    assert first[3] == pytest.approx(3)
    assert first[4] == pytest.approx(1 / 3 - 1)
    assert first[5] == pytest.approx(0.7)
    assert first[6] == pytest.approx(-0.3 * math.log2(50))
    assert first[8] == pytest.approx(2)


def test_mitigation_must_help_every_group():
    table = study_table(gain={"large": 0.0, "middle": 3, "small": 3})
    assert (verdicts(table, 8), verdicts(table, 11)) == ([UNDECIDED], [HOLDS])
    note = findings(table).query("claim == 8")["note"].iloc[0]
    assert note.startswith("large, which gains least of 3 groups")


@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    above=st.floats(-1, 1),
    sign=st.sampled_from([1, -1]),
)
def test_the_verdict_is_that_of_one_sided_t_tests(values, above, sign):
    assume(np.std(values) > 1e-3)
    finding = judge(1, "here", values, above, sign=sign)
    sides = ("greater", "less") if sign > 0 else ("less", "greater")
    own, against = (stats.ttest_1samp(values, above, alternative=side).pvalue for side in sides)
    # A two-sided interval of 95 % leaves 2.5 % on either side.
    assume(min(abs(own - 0.025), abs(against - 0.025)) > 1e-6)
    assert finding.verdict == (HOLDS if own < 0.025 else FAILS if against < 0.025 else UNDECIDED)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (finding.low, finding.high) == (pytest.approx(low), pytest.approx(high))


def test_what_is_not_finite_is_left_out():
    finding = judge(1, "here", [1.0, 1.1, math.nan, math.inf])
    assert (finding.seeds, finding.effect) == (2, pytest.approx(1.05))
    assert judge(1, "here", []).verdict == UNDECIDED


@pytest.mark.parametrize(("never", "seeds", "verdict"), [((0, 1, 2, 3), 0, UNDECIDED), ((1,), 3, HOLDS)])
def test_a_group_that_was_never_right_has_no_drop_and_that_is_told(never, seeds, verdict):
    table = study_table(model="vgg19")
    lost = (table["group"] == "small") & (table["measure"] == "relative_drop") & table["seed"].isin(never)
    table.loc[lost, "value"] = math.nan
    found = main(table).set_index("claim")
    for claim in (1, 10):
        assert (found.loc[claim, "seeds"], found.loc[claim, "verdict"]) == (seeds, verdict)
        assert f"the base network of {len(never)} of 4 seeds gets none of small right" in found.loc[claim, "note"]
    # A seed without the measure at all has no such row.
    assert len(main(table[~lost])) == len(found)


def test_groups_of_equal_size_stand_together():
    """The planted slope grows from the first group to the last by thirds."""
    table = study_table(
        slope=6, gain={"a": 1, "b": 1, "c": 2, "d": 4}, groups={"a": 4000, "b": 3990, "c": 500, "d": 502}
    )
    found = main(table).set_index("claim")
    assert found.loc[1, "effect"] == pytest.approx(6 * (5 / 6 - 1 / 6), abs=0.1)
    assert found.loc[1, "note"] == "the 2 smallest groups against the 2 largest groups"
    assert found.loc[11, "effect"] == pytest.approx(3, abs=0.1)


def test_a_verdict_over_several_panels():
    table = pd.concat([study_table(), study_table(study="b", data="utkface:age", slope=-4)])
    words = summary(findings(table))
    assert words[1] == "holds in 1, does not hold in 1"
    assert words[2] == HOLDS
    assert words[10] == "not tested"
    assert set(words) == set(CLAIMS)


def test_what_is_undecided_is_told_with_its_side():
    single = [
        study_table(study=str(place), data=data, model=model, seeds=(0,), slope=slope)
        for place, (data, model, slope) in enumerate(
            [("utkface:race", "resnet34", 4), ("utkface:age", "resnet34", 4), ("svhn", "resnet34", -4)]
        )
    ]
    assert summary(findings(pd.concat(single)))[1] == "undecided (on its side: 2 of 3)"
    words = summary(findings(pd.concat([*single, study_table()])))
    assert words[1] == "holds in 1, undecided in 3 (on its side: 3 of 4)"
    assert words[4] == "holds in 1, undecided in 3 (on its side: 4 of 4)"
    never = study_table()
    never.loc[never["measure"] == "relative_drop", "value"] = math.nan
    assert summary(findings(never))[1] == UNDECIDED


@pytest.mark.parametrize("sign", [1, -1])
def test_the_side_is_that_of_the_threshold(sign):
    assert judge(1, "here", [sign * 3.0], above=sign * 2, sign=sign).agrees
    assert not judge(1, "here", [sign * 1.0, sign * 1.5], above=sign * 2, sign=sign).agrees
    assert judge(1, "here", []).agrees is None


def test_two_studies_of_one_panel_are_not_mixed():
    table = pd.concat([study_table(), study_table(study="again", slope=-4.0)])
    found = main(table).query("claim == 1").set_index("panel")["verdict"]
    usual = "UTKFace, race · ResNet-18 · SNL"
    assert dict(found) == {f"{usual} · planted": "holds", f"{usual} · again": "does not hold"}
    # A base network of both is one.
    assert len(findings(table).query("claim == 3")) == 1


def test_any_data_groups_network_and_masks_are_tested():
    own = {"data": "folder", "model": "files/mine.py:net", "method": "random"}
    mine = study_table(**own).assign(data_label="faces")
    by_age = study_table(**own).assign(data_label="ages", data_options='{"groups": "age"}')
    found = findings(pd.concat([mine, by_age]))
    assert set(found["verdict"]) == {"holds"}
    titles = {"faces (folder) · mine.py:net · random", "ages (folder) · mine.py:net · random · by age"}
    assert set(found.query("claim == 6")["panel"]) == titles


def test_what_claims_do_not_speak_of_is_left_out():
    table = study_table()
    without_plain = table[table["finetune"] != "erm"]
    assert findings(without_plain).empty
    one_group = table[table["group"].isin(["large", "overall"])]
    assert findings(one_group).empty


def test_the_page_says_scale_claims_and_sources(tmp_path):
    table = with_control(study_table())
    target = write_claims(table, findings(table), tmp_path / "claims.html")
    page = html.unescape(target.read_text(encoding="utf-8"))
    assert "Scale of what follows: Planted: numbers of a test." in page
    for claim in CLAIMS.values():
        assert claim.text in page
    assert "ccccccccc" in page
    assert "0123456789abcdef" in page
    assert 'id="figure_1"' in page
    # A forest of what is tested: the first claim has four more numbers where there is a control.
    drawn = {f"forest_{claim}_0" for claim in (1, 2, 3, 4, 5, 6, 8, 11)} | {f"forest_1_{place}" for place in range(5)}
    assert set(re.findall(r'<div class="chart" id="(forest_\w+)"', page)) == drawn
    assert "Fewer than two panels have a spread over seeds" in page
    assert "Not drawn, as no study here holds what they show: 5, 7, 11, 12, 13, 14, 15." in page


def test_findings_have_the_fields_that_they_promise():
    assert list(findings(study_table()).columns) == list(Finding.__dataclass_fields__)


def test_rows_of_classes_change_no_claim():
    """A class has rows under its group and under overall, of measures that groups have as well."""
    table = study_table()
    classes = table.assign(**{"class": "a class", "value": table["value"] + 9})
    found = findings(table)
    pd.testing.assert_frame_equal(findings(pd.concat([table, classes], ignore_index=True)), found)
    assert (found["verdict"] != UNDECIDED).any()


#: The planted accuracies: 0.9 of the largest and 0.5 of the smallest group.
LARGE, SMALL = 0.9, 0.5


def test_in_points_a_group_of_which_little_is_right_loses_little():
    table = pd.concat([study_table(slope=4), study_table(study="b", method="deepreduce", slope=8, noise=0.3)])
    found = findings(table).set_index(["claim", "variant"]).sort_index()
    first = found.loc[(1, POINTS)]
    assert first["effect"].tolist() == pytest.approx([4 * SMALL, 8 * SMALL], abs=0.1)
    worse = found.loc[(7, POINTS)].iloc[0]
    assert worse["effect"] == pytest.approx(4 * math.log2(50) * SMALL, abs=0.2)
    assert worse["verdict"] == HOLDS


def with_control(table: pd.DataFrame, masks: str = "snl", gain: float = 0.1) -> pd.DataFrame:
    """And the network that kept all its ReLUs, whose smallest group is better by a gain."""
    base = table[(table["stage"] == "base") & (table["measure"] == "accuracy")]
    better = base["value"] + gain * (base["group"] == "small")
    more = {"stage": "finetuned", "method": "snl", "masks": masks, "objective": "erm", "finetune": "erm"}
    return pd.concat([table, base.assign(value=better, **more)], ignore_index=True)


@pytest.mark.parametrize("masks", ["snl", "whole"])
def test_the_control_takes_what_further_training_gave(masks):
    """The network lost 10 points of the smallest group beside a base network, 20 beside one that was trained on."""
    table = study_table(slope=4, noise=0.01)
    found = findings(with_control(table, masks)).query("claim == 1").set_index("variant")
    # A control alone is no panel.
    assert found.index.is_unique
    lost = 4 * math.log2(50) * SMALL
    assert found.loc[LOWEST, "effect"] == pytest.approx(lost, abs=0.1)
    assert found.loc[LOWEST_CONTROL, "effect"] == pytest.approx(lost + 10, abs=0.1)
    assert found.loc[CONTROL, "effect"] > 0
    assert "the control is that of the masks " + masks in found.loc[CONTROL, "note"]
    # Of each accuracy the drop from the control: 0 where nothing is cut, if it has a network there.
    halvings = np.log2([1.0, *(100 / np.array([50, 10, 2]))])
    after = SMALL * (1 - 0.04 * halvings[1:])
    drops = [0.0, *(100 * (0.6 - after) / 0.6)]
    own = slice(None) if masks == "snl" else slice(1, None)
    assert found.loc[CONTROL, "effect"] == pytest.approx(np.polyfit(halvings[own], drops[own], 1)[0], abs=0.1)
    assert not {CONTROL, LOWEST, LOWEST_CONTROL} & set(findings(table)["variant"])


@pytest.mark.parametrize("masks", ["snl", "whole"])
@pytest.mark.parametrize(("moved", "verdict"), [(2.0, HOLDS), (9.0, FAILS)])
def test_the_weights_move_by_further_training_too(masks, moved, verdict):
    """They move the further, the fewer ReLUs are kept; that need not be further than with all of them kept."""
    table = study_table(distance=0.5)
    low = table.query("measure == 'parameter_distance' and percent == 2 and finetune == 'erm'")
    value = moved + 0.1 * low["seed"]
    whole = low.assign(masks=masks, percent=100, asked=low["total_relus"], relus=low["total_relus"], value=value)
    found = findings(pd.concat([table, whole], ignore_index=True)).query("claim == 5")
    against = found.set_index("variant").loc[DISTANCE_CONTROL]
    expected = (low["value"] - value).mean()
    assert (against["verdict"], against["effect"]) == (verdict, pytest.approx(expected))
    assert against["note"].startswith("at 2 % of the ReLUs; the control is that of the masks " + masks)
    assert DISTANCE_CONTROL not in set(findings(table)["variant"])


def test_mitigation_is_judged_on_networks_that_lost_relus():
    table = study_table(gain=3, noise=0.01)
    whole = with_control(table, gain=0.0)
    fair = whole[(whole["stage"] == "finetuned") & (whole["percent"] == 100)]
    fair = fair.assign(objective="lagrangian", finetune="lagrangian", value=0.1)
    both = pd.concat([whole, fair], ignore_index=True)
    found, expected = (main(each).query("claim in (8, 11)")["effect"].tolist() for each in (both, table))
    assert found == pytest.approx(expected)


def test_what_chance_gives_one_of_many_tests_does_not_stand():
    """Six panels of nothing, one of which seems to hold, and one that does."""
    tables = [study_table(study=f"s{place}", noise=2.0, slope=0.2, gain=0) for place in range(2)]
    found = findings(pd.concat([*tables, study_table(study="sure", noise=0.01)]))
    assert found["p_holm"].tolist() == pytest.approx(corrected(found["p"].tolist()), nan_ok=True)
    assert (found.loc[found["p_holm"] < 0.05, "corrected"] == found.loc[found["p_holm"] < 0.05, "verdict"]).all()
    assert (found.loc[~(found["p_holm"] < 0.05), "corrected"] == UNDECIDED).all()
    decided = found["verdict"] != UNDECIDED
    assert (found.loc[decided & (found["claim"] != 8), "p"] < 0.05).all()
    assert (found["corrected"] != UNDECIDED).any()
    # Undecided panels of several seeds, and no others, are told how many they need: more than they have.
    assert (found["needed"].notna() == (~decided & (found["seeds"] > 1) & found["p"].notna())).all()
    assert (found["needed"].dropna() > found["seeds"][found["needed"].notna()]).all()


def test_many_groups_make_one_loss_less_surprising():
    table = study_table(gain={"large": -1.0, "middle": 3, "small": 3}, noise=0.5)
    (found,) = findings(table).query("claim == 8").to_dict("records")
    rows = table[table["measure"] == "accuracy"].set_index(["seed", "percent", "finetune", "group"])["value"]
    lost = 100 * (rows.xs("lagrangian", level="finetune") - rows.xs("erm", level="finetune"))
    lost = lost.xs("large", level="group").groupby("seed").mean()
    assert found["p"] == pytest.approx(3 * stats.ttest_1samp(lost, 0).pvalue)


def test_panels_together():
    table = pd.concat([study_table(), study_table(study="b", data="utkface:age", ratio=3, noise=0.2)])
    summed = over_panels(findings(table)).set_index(["claim", "variant"])
    own = summed.loc[(2, "")]
    assert (own["panels"], own["pooled"], own["on_side"], own["signed"]) == (2, 2, 2, 2)
    # A ratio's mean is that of logarithms.
    assert 2 < own["mean"] < 3
    assert own["mean"] == pytest.approx(math.sqrt(6), rel=0.05)
    assert own["tau"] == pytest.approx(math.log(1.5) / math.sqrt(2), rel=0.05)
    assert own["low"] < own["mean"] < own["high"]
    one = over_panels(findings(study_table(seeds=(0,)))).set_index(["claim", "variant"]).loc[(2, "")]
    assert one["pooled"] == 0
    assert math.isnan(one["mean"])
    assert over_panels(findings(study_table()[:0])).empty


def test_seeds_that_agree_tell_nothing_of_others():
    """Two seeds of a small group often do, and rounding is no spread."""
    for values in ([5.0, 5.0], [100 * (0.9 - 0.8), 100 * (0.8 - 0.7)], [0.0, 0.0, 0.0]):
        found = judge(1, "here", values)
        assert (found.verdict, found.seeds, found.effect) == (UNDECIDED, len(values), pytest.approx(values[0]))
        assert all(map(math.isnan, (found.low, found.high, found.p, found.spread, found.needed)))
    assert judge(1, "here", [5.0, 5.001]).verdict == HOLDS
    assert judge(1, "here", [0.0, 0.0]).agrees is None


def test_groups_of_one_size_are_not_set_against_each_other():
    whole = main(study_table(groups={"a": 500, "b": 500, "c": 502}))
    assert set(whole["claim"]) == {5, 6, 8}
    # Two sizes, of several groups each.
    assert {1, 2, 3, 4, 11} <= set(main(study_table(groups={"a": 500, "b": 502, "c": 90, "d": 90}))["claim"])


@given(
    means=st.lists(st.sampled_from([-2.0, -0.5, 0.5, 2.0]), min_size=2, max_size=6),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 5),
)
def test_every_group_must_gain_and_one_must_surely_lose(means, spread, seed):
    rng = np.random.default_rng(seed)
    gains = [mean + spread * rng.normal(size=3) for mean in means]
    found = _of_every_group([judge(8, "here", own, note=f"group {place}") for place, own in enumerate(gains)])
    p = [stats.ttest_1samp(own, 0).pvalue for own in gains]
    lost = [each for each, own in zip(p, gains, strict=True) if own.mean() <= 0]
    together = min(1.0, len(gains) * min(lost)) if lost else max(p)
    assert found.p == pytest.approx(together)
    assume(abs(together - 0.05) > 1e-9)
    assert (found.verdict == FAILS) == bool(lost and together < 0.05)
    assert (found.verdict == HOLDS) == (not lost and together < 0.05)
    assert math.isnan(found.needed) == (found.verdict != UNDECIDED)
    assert not found.needed <= 3
    least = int(np.argmin([own.mean() for own in gains]))
    told = int(np.argmin([each if own.mean() <= 0 else 2 for each, own in zip(p, gains, strict=True)]))
    place = told if found.verdict == FAILS else least
    assert found.note.startswith(f"group {place}, which ")
    assert found.effect == pytest.approx(gains[place].mean())


def test_a_minimum_has_neither_sign_test_nor_mean():
    table = pd.concat([study_table(), study_table(study="b", data="utkface:age")])
    summed = over_panels(findings(table)).set_index(["claim", "variant"])
    assert (summed.loc[(8, ""), ["on_side", "signed", "pooled"]] == [2, 2, 0]).all()
    assert summed.loc[(8, ""), ["p_sign", "mean", "tau"]].isna().all()
    assert summed.loc[(11, ""), ["p_sign", "mean", "tau"]].notna().all()


def test_values_of_mu_are_those_that_differ_in_nothing_else():
    table = study_table(mus=(0.1, 0.2), mu_effect=1.0, noise=0.01)
    held = table[table["objective"] == "lagrangian"]
    options = held["objective_options"].map(lambda text: json.dumps({**json.loads(text), "on": "val"}))
    held = held.assign(objective_options=options, finetune="held-" + held["finetune"], value=0.1)
    both = pd.concat([table, held], ignore_index=True)
    assert variants_of_mu(both) == variants_of_mu(table) == [(0.1, "lagrangian"), (0.2, "lagrangian-1")]
    assert main(both).query("claim == 9")["effect"].tolist() == pytest.approx([1.0], abs=0.1)
    # One value, held out or not, is no range; without one it is the default.
    one = both[both["finetune"].isin(["erm", "lagrangian", "held-lagrangian", ""])]
    assert len(variants_of_mu(one)) == 1
    assert main(one).query("claim == 9").empty
    plain = one.assign(objective_options="{}")
    assert variants_of_mu(plain) == [(5e-3, "lagrangian")]


def test_methods_are_set_against_each_other_on_the_same_base_networks():
    snl, other = study_table(), study_table(study="b", method="deepreduce", slope=8, noise=0.3)
    assert len(verdicts(pd.concat([snl.assign(cell="one"), other.assign(cell="one")]), 7)) == 1
    assert verdicts(pd.concat([snl.assign(cell="one"), other.assign(cell="two")]), 7) == []
    wide = study_table(study="c", model="wide_resnet22_8")
    for scale, told in (("Planted: numbers of a test.", True), ("Another.", False)):
        (note,) = main(pd.concat([snl, wide.assign(scale=scale)])).query("claim == 10")["note"]
        assert ("ResNet-18" in note) == told


def test_the_slope_of_distances_is_of_networks_that_lost_relus():
    table = study_table(distance=0.5)
    low = table.query("measure == 'parameter_distance' and percent == 2 and finetune == 'erm'")
    whole = low.assign(percent=100, asked=low["total_relus"], relus=low["total_relus"], value=90.0 + low["seed"])
    with_it = main(pd.concat([table, whole], ignore_index=True)).query("claim == 5")
    assert with_it["effect"].tolist() == main(table).query("claim == 5")["effect"].tolist()
