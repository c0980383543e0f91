"""The figures show the numbers of the table, in the paper's arrangement."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fairline.charts import save_charts
from fairline.errors import FairlineError
from fairline.report.claims import findings
from fairline.report.panels import Panel, finetuned, mitigation_drop, over_seeds, rows_of, variants_of_mu
from fairline.report.paper_figures import FIGURES, draw, draw_others
from tests.report.study_table import BUDGETS, GROUPS, study_table

DIGITS = {str(digit): 1000 - 90 * digit for digit in range(10)}
RACE = Panel("utkface:race")


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    """All panels of the paper."""
    parts = []
    for data in ("utkface:race", "utkface:age", "svhn", "cifar10"):
        groups = DIGITS if data in ("svhn", "cifar10") else GROUPS
        for model in ("resnet18", "resnet34", "vgg19", "wide_resnet22_8"):
            for method in ("snl", "deepreduce"):
                several = (data, model, method) == ("utkface:race", "resnet18", "snl")
                parts.append(
                    study_table(
                        study=f"{data}_{model}_{method}",
                        data=data,
                        model=model,
                        method=method,
                        groups=groups,
                        mus=(0.005, 0.0005, 0.01) if several else (0.005,),
                        seeds=(0, 1),
                    )
                )
    return pd.concat(parts, ignore_index=True)


def contents(chart) -> list[dict]:
    """The data of a chart that have a measure."""
    specification = json.loads(chart.to_json())
    return [row for rows in specification["datasets"].values() for row in rows if "measure" in row]


@pytest.mark.parametrize(
    ("number", "titles"),
    [
        (1, ["UTKFace, race · ResNet-18 · SNL"]),
        (
            6,
            [
                "SVHN · ResNet-18 · SNL",
                "UTKFace, age · ResNet-18 · SNL",
                "UTKFace, age · ResNet-34 · SNL",
                "UTKFace, age · ResNet-18 · DeepReDuce",
                "CIFAR-10 · ResNet-18 · SNL",
                "UTKFace, race · ResNet-18 · SNL",
                "UTKFace, race · ResNet-34 · SNL",
                "UTKFace, race · ResNet-18 · DeepReDuce",
            ],
        ),
        (7, [f"UTKFace, {g} · {m} · SNL" for m in ("VGG-19", "WRN-22-8") for g in ("race", "age")]),
        (9, [f"UTKFace, {g} · ResNet-18 · {m}" for g in ("age", "race") for m in ("SNL", "DeepReDuce")]),
        (11, [f"{d} · {m} · SNL" for m in ("ResNet-18", "ResNet-34") for d in ("CIFAR-10", "SVHN")]),
        (15, ["μ = 0.0005", "μ = 0.005", "μ = 0.01"]),
    ],
)
def test_panels_stand_as_in_the_paper(everything, number, titles):
    specification = json.loads(draw(everything, [number])[number].to_json())
    panels = specification["concat"]
    if number == 15:
        panels = panels[0]["hconcat"]
    assert [panel["title"]["text"] for panel in panels] == titles
    # Panels differ in their groups, so in the width of their bars.
    assert specification["resolve"]["scale"] == {"color": "independent", "xOffset": "independent"}
    if number == 6:
        assert specification["columns"] == 4


def test_every_figure_is_drawn_and_says_its_scale(everything):
    drawn = draw(everything)
    assert list(drawn) == list(FIGURES) == [1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15]
    for number, chart in drawn.items():
        title = json.loads(chart.to_json())["title"]
        assert title["text"].startswith(f"Figure {number}:")
        assert "Planted: numbers of a test. 2 seeds; mean and 95 % interval over seeds." in " ".join(title["subtitle"])


def test_a_control_is_another_network_than_the_base():
    """Both have all ReLUs; a bar of each, and never their mean."""
    table = study_table(study="a")
    made = table[(table["stage"] == "finetuned") & (table["percent"] == table["percent"].min())]
    whole = table.loc[table["stage"] == "base", ["percent", "relus", "asked"]].iloc[0].to_dict()
    table = pd.concat([table, made.assign(**whole, value=made["value"] / 2)], ignore_index=True)
    drawn = draw(table, [3])[3].to_json()
    data = next(rows for rows in json.loads(drawn)["datasets"].values() if "budget" in rows[0])
    bars = pd.DataFrame(data).set_index(["budget", "group"])["value"]
    norms = table[(table["measure"] == "gradient_norm") & (table["finetune"].isin(["", "erm"]))]
    group = norms["group"].iloc[0]
    for budget, own in (("base network", norms["stage"] == "base"), ("100 %", norms["stage"] == "finetuned")):
        own &= (norms["percent"] == 100) & (norms["group"] == group)
        assert bars[budget, group] == pytest.approx(norms.loc[own, "value"].mean()), budget
    assert '"domain":["base network","100 %"' in re.sub(r"\s*\n\s*|(?<=[:,]) ", "", drawn)


def test_seeds_are_counted_that_are_drawn_and_base_networks_are_of_them():
    """A study under way has base networks of seeds that nothing was made of yet."""
    table = study_table(seeds=(0, 1))
    made = table[(table["seed"] == 0) | (table["stage"] == "base")]
    base = made[(made["stage"] == "base") & (made["measure"] == "accuracy") & (made["group"] == "small")]
    for number in (1, 6, 8):
        said = "".join(draw(made, [number])[number].to_dict()["title"]["subtitle"])
        assert "1 seed; 95 % interval of the images." in said
    bars = [row for row in contents(draw(made, [1])[1]) if row["budget"] == "100 %" and row["group"] == "small"]
    assert [row["value"] for row in bars] == [base.loc[base["seed"] == 0, "value"].item()]
    apart = pd.concat([study_table(study="a", seeds=(0, 1, 2)), study_table(study="b", seeds=(3, 4))])
    drawn = draw_others(apart)["relative_drop"].to_dict()["title"]["subtitle"]
    assert "2 to 3 seeds;" in " ".join(drawn)


def test_the_line_of_figure_8_is_of_networks_that_lost_relus():
    """That with all of them was trained on for as long as the lowest budget, so it is no end of the line."""
    table = study_table()
    low = table.query("measure == 'parameter_distance' and percent == 2")
    whole = low.assign(percent=100, asked=low["total_relus"], relus=low["total_relus"])
    specification = json.loads(draw(pd.concat([table, whole], ignore_index=True), [8])[8].to_json())
    layers = next(part["layer"] for part in specification["concat"] if "layer" in part)
    held = {}
    for layer in layers:
        rows = specification["datasets"][(layer.get("data") or specification["data"])["name"]]
        hollow = layer["mark"].get("fill") == "white"
        held[layer["mark"]["type"], hollow] = {row["percent"] for row in rows}
    cut = set(BUDGETS[1:])
    assert held == {
        ("line", False): cut,
        ("point", False): cut,
        ("point", True): {100},
        ("rule", False): cut | {100},
    }


@pytest.mark.parametrize(
    ("number", "seeds", "words"),
    [
        (7, [(0,), (0,)], "1 seed; 95 % interval of the images."),
        (7, [(0, 1), (0,)], "1 to 2 seeds; mean and 95 % interval over seeds (95 % interval of the images where there"),
        (12, [(0,), (0,)], "1 seed; no interval."),
        (12, [(0, 1), (0,)], "1 to 2 seeds; mean and 95 % interval over seeds (no interval where there is one)."),
    ],
)
def test_a_figure_says_what_its_intervals_are(number, seeds, words):
    model = "vgg19" if number == 7 else "resnet34"
    table = pd.concat(
        [
            study_table(study="a", model=model, seeds=seeds[0]),
            study_table(study="b", model=model, seeds=seeds[1], data="utkface:age"),
        ]
    )
    assert words in " ".join(json.loads(draw(table, [number])[number].to_json())["title"]["subtitle"])


def test_a_group_that_is_not_shown_needs_no_explanation():
    table = study_table(data="cifar10", groups=DIGITS)
    table.loc[(table["group"] == "5") & (table["measure"] == "relative_drop"), "value"] = np.nan
    assert "No bars" not in " ".join(draw(table, [11])[11].to_dict()["title"]["subtitle"])


def test_a_figure_says_why_a_group_has_no_bars():
    table = study_table(model="vgg19")
    words = "No bars where the base network gets none of a group right."
    assert words not in " ".join(draw(table, [7])[7].to_dict()["title"]["subtitle"])
    table.loc[(table["group"] == "small") & (table["measure"] == "relative_drop"), "value"] = np.nan
    assert words in " ".join(draw(table, [7])[7].to_dict()["title"]["subtitle"])


def test_figure_1_shows_means_and_intervals_over_seeds():
    table = study_table(seeds=(0, 1, 2))
    rows = contents(draw(table, [1])[1])
    accuracy = table[(table["measure"] == "accuracy") & table["finetune"].isin(["", "erm"])]
    for group in GROUPS:
        for percent in BUDGETS:
            own = accuracy.loc[(accuracy["group"] == group) & (accuracy["percent"] == percent), "value"].to_numpy()
            assert len(own) == 3
            (shown,) = (row for row in rows if (row["group"], row["percent"]) == (group, percent))
            assert shown["value"] == pytest.approx(own.mean())
            assert shown["train_n"] == GROUPS[group]
            if percent < 100:
                low, high = stats.t.interval(0.95, 2, own.mean(), stats.sem(own))
                assert (shown["low"], shown["high"]) == (pytest.approx(low), pytest.approx(high))


def test_one_seed_has_the_limits_of_the_audit():
    own = over_seeds(finetuned(rows_of(study_table(seeds=(0,)), RACE)))
    own = own[own["measure"] == "accuracy"]
    np.testing.assert_allclose(own["high"] - own["low"], 0.02)


def test_of_ten_classes_the_extremes_of_the_test_part_are_shown(everything):
    rows = contents(draw(everything, [11])[11])
    assert {row["group"] for row in rows} == {"0", "1", "8", "9"}


def test_the_mitigation_drop_is_the_papers_formula():
    table = study_table(gain=5, noise=0)
    drops = mitigation_drop(rows_of(table, RACE))
    accuracy = table[table["measure"] == "accuracy"].set_index(["seed", "percent", "group", "finetune"])["value"]
    for row in drops.itertuples():
        before, after = (accuracy[row.seed, row.percent, row.group, name] for name in ("erm", "lagrangian"))
        assert row.value == pytest.approx((before - after) / before * 100)
    assert (drops.loc[drops["group"] != "overall", "value"] < 0).all()
    assert len(drops) == 4 * 3 * 4
    never = table.copy()
    never.loc[(never["group"] == "small") & (never["finetune"] == "erm"), "value"] = 0.0
    assert "small" not in set(mitigation_drop(rows_of(never, RACE))["group"])


def test_seeds_that_keep_different_counts_are_one_budget():
    table = study_table(method="deepreduce", seeds=(0, 1))
    table.loc[(table["seed"] == 1) & (table["asked"] == 1000), ["relus", "percent"]] = [800, 8.0]
    own = over_seeds(finetuned(rows_of(table, Panel("utkface:race", method="deepreduce"))))
    assert set(own["budget"]) == {"50 %", "9 %", "2 %"}
    assert set(own["seeds"]) == {2}


def test_the_plain_mitigation_is_told_from_its_variants():
    rows = rows_of(study_table(mus=(0.005, 0.0005)), RACE)
    assert set(finetuned(rows, "lagrangian")["finetune"]) == {"lagrangian"}
    assert variants_of_mu(rows) == [(0.0005, "lagrangian-1"), (0.005, "lagrangian")]


def test_what_is_not_held_is_said():
    table = study_table()
    with pytest.raises(FairlineError, match="holds what figure 7 shows"):
        draw(table, [7])
    with pytest.raises(FairlineError, match="has no empirical figure 2; it has 1, 3"):
        draw(table, [2])
    assert draw(study_table(data="digits")) == {}


def titles(chart) -> list[str]:
    """Of a figure's panels."""
    return [panel["title"]["text"] for panel in json.loads(chart.to_json())["concat"]]


def test_any_study_is_drawn_and_the_papers_panels_are_a_selection():
    paper = study_table(seeds=(0, 1))
    own = study_table(study="own", data="folder", model="mine.py:net", seeds=(0, 1)).assign(data_label="faces")
    by_gender = study_table(study="genders", data_options='{"groups": "gender"}', seeds=(0, 1))
    table = pd.concat([paper, own, by_gender], ignore_index=True)
    assert [json.loads(chart.to_json())["title"]["text"] for chart in draw(table, [1]).values()]
    drawn = draw_others(table)
    assert {"accuracy_by_group", "overall_accuracy", "relative_drop", "gradient_norm", "hessian_max"} < set(drawn)
    assert {"margin", "mitigation_lagrangian", "explanations_1", "explanations_2"} < set(drawn)
    expected = ["faces (folder) · mine.py:net · SNL", "UTKFace, race · ResNet-18 · SNL · by gender"]
    assert titles(drawn["relative_drop"]) == expected
    assert titles(draw(table, [1])[1]) == ["UTKFace, race · ResNet-18 · SNL"]
    assert draw_others(paper) == {}
    # The numbers are those of the table.
    shown = {row["value"] for row in contents(drawn["relative_drop"])}
    drops = own.query("measure == 'relative_drop' and finetune == 'erm'").groupby(["percent", "group"])["value"].mean()
    assert all(any(abs(value - other) < 1e-9 for other in shown) for value in drops)


def test_recipes_that_share_a_panel_of_the_paper_are_drawn_apart():
    table = study_table(seeds=(0, 1))
    again = table[table["stage"] == "finetuned"].assign(masks="again")
    both = pd.concat([table, again], ignore_index=True)
    assert draw(both) == {}
    usual = "UTKFace, race · ResNet-18 · SNL"
    assert titles(draw_others(both)["relative_drop"]) == [f"{usual} · snl", f"{usual} · again"]
    two = pd.concat([table, study_table(study="other", seeds=(0, 1))], ignore_index=True)
    assert titles(draw_others(two)["relative_drop"]) == [f"{usual} · planted", f"{usual} · other"]


@pytest.mark.parametrize("data", ["digits", "utkface:race"])
@pytest.mark.parametrize(
    "missing", ["stage == 'base'", "finetune == 'erm'", "percent < 100 and seed == 0", "percent < 50"]
)
def test_whatever_a_study_holds_so_far_it_is_drawn_and_tested(data, missing):
    table = study_table(data=data, seeds=(0, 1))
    held = table.drop(table.query(missing).index)
    assert all(chart is not None for chart in [*draw(held).values(), *draw_others(held).values()])
    findings(held)


def test_of_many_groups_the_extremes_are_shown():
    table = study_table(
        study="ages", data="folder", groups={f"{age} years": 3000 - age for age in range(100)}, seeds=(0,)
    )
    shown = {row["group"] for row in contents(draw_others(table)["relative_drop"])}
    assert shown == {"0 years", "1 years", "98 years", "99 years"}


def test_files_of_three_formats(tmp_path):
    drawn = {f"figure_{number:02d}": chart for number, chart in draw(study_table(), [1, 8]).items()}
    files = save_charts(drawn, tmp_path, ("png", "svg", "pdf"))
    assert [file.name for file in files] == [f"figure_{n}.{f}" for n in ("01", "08") for f in ("png", "svg", "pdf")]
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in files[1].read_bytes()[:200]
    assert files[2].read_bytes()[:4] == b"%PDF"


def test_other_masks_of_the_method_are_left_out_and_a_second_plain_one_is_refused():
    table = study_table(seeds=(0, 1))
    fair = table[table["stage"] == "finetuned"].assign(placement="lagrangian", masks="fair", value=0.0)
    assert len(rows_of(pd.concat([table, fair]), RACE)) == len(table)
    with pytest.raises(FairlineError, match="has the masks snl and again in study planted"):
        rows_of(pd.concat([table, fair.assign(placement="", masks="again")]), RACE)
