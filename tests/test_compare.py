"""`fairline compare` and `ablate`, and the page that they write."""

from __future__ import annotations

import html
import json
import math
import re
import shutil

import pandas as pd
import pytest

from fairline.jobs import compare_job
from fairline.jobs.method_names import method_names
from fairline.report.comparison import drop_by_budget, judged, masks_of, prepare, warnings
from fairline.report.verdict import signed
from fairline.runs import Run
from tests.commands import FINETUNE, LINEARIZE, fairline, ok
from tests.test_cli import contents, kill_when
from tests.test_report import CHROMIUM, browser


def test_every_network_is_in_the_comparison(runs, compared):
    table = pd.read_parquet(compared / "comparison.parquet")
    methods = {"not finetuned", "erm", "lagrangian mu=0.5", "masks lagrangian mu=0.5 protect, erm"}
    assert set(table["method"]) == methods
    assert set(table["relus"]) == {224, 45, 20}
    assert set(table["baseline"]) == {"erm"}
    # The numbers are those of the audit.
    audit = pd.read_parquet(runs / "audit" / "audit.parquet")
    audit = audit[(audit["stage"] == "finetuned") & (audit["measure"] == "accuracy")]
    own = table[(table["method"] == "erm") & (table["measure"] == "accuracy") & (table["group"] != "worst group")]
    merged = own.merge(audit, on=["relus", "group"])
    assert len(merged) == 3 * 11
    assert (merged["value_x"] - merged["value_y"]).abs().max() < 1e-12
    layers = pd.read_parquet(compared / "layers.parquet")
    kept = layers.groupby(["method", "relus"])["kept"].sum()
    assert all(count == relus for (_, relus), count in kept.items())


def test_an_interrupted_comparison_goes_on(runs, compared, tmp_path):
    out = tmp_path / "compared"
    sources = [str(runs / name) for name in ("snl", "students", "repaired", "fair_students")]
    arguments = ["compare", *sources, "--resamples", "100", "--out", str(out)]
    assert kill_when(arguments, (out / "config.json").exists)
    ok(*arguments)
    mine, other = contents(out), contents(compared)
    assert mine == other


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_is_drawn_in_a_browser_without_a_network(compared, tmp_path):
    document = browser("--dump-dom", (compared / "comparison.html").as_uri(), profile=tmp_path / "profile")
    drawn = re.sub(r"<script.*?</script>", "", document, flags=re.S)
    assert "could not be drawn" not in drawn
    # Gains of the smallest budget (the others are folded), Pareto fronts, distances from the null front and layers of
    # three, drops of each group; no network has all its ReLUs, so there is no control to draw.
    frame = prepare(pd.read_parquet(compared / "comparison.parquet"))
    assert len(re.findall(r'<svg[^>]*class="marks"', document)) == 1 + 3 * 3 + len(drop_by_budget(frame))
    assert "Add the budget 1.0 to the linearize run" in drawn


def test_the_page_says_the_numbers_of_the_table(compared):
    table = pd.read_parquet(compared / "comparison.parquet")
    text = html.unescape((compared / "comparison.html").read_text(encoding="utf-8")).replace("\u00a0", " ")
    gains = table[(table["measure"] == "gain") & (table["group"] != "overall")]
    for value, low, high in gains[["value", "low", "high"]].to_numpy():
        assert f"{signed(value)}<br>[{signed(low)}, {signed(high)}]" in text
    drops = table[table["measure"] == "mitigation_drop"]["value"]
    for value in drops.dropna():
        assert f'<td class="number">{signed(value)} %</td>' in text
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "One base network" in text


def test_every_network_is_shifted_without_a_further_pass(compared):
    """What is kept of each image says what every shift gets right."""
    table, front, images = (
        pd.read_parquet(compared / f"{name}.parquet") for name in ("comparison", "null_front", "predictions")
    )
    assert ((images["right_from"] <= 0) & (images["right_to"] >= 0)).equals(images["correct"])
    of_test = front[front["part"] == "test"]
    plain = of_test[of_test["tau"] == 0].merge(table[(table["measure"] == "accuracy")], on=["method", "relus", "group"])
    assert len(plain) == 4 * 3 * 12
    assert (plain["value"] - plain["accuracy"]).abs().max() < 1e-12
    assert set(front["part"]) == {"test", "val"}
    assert set(front["method"]) == {"base network", *table["method"]}
    # τ is the one that fairline adjust would choose on the validation part.
    chosen = table[table["measure"] == "tau"].set_index(["method", "relus"])["value"]
    assert len(chosen) == 4 * 3
    for (method, relus), own in front[front["part"] == "val"].groupby(["method", "relus"]):
        wide = own.pivot_table(index="tau", columns="group", values="accuracy")
        allowed = wide[wide["overall"] >= wide["overall"].iloc[0] - 0.01 - 1e-9]
        if method != "base network":
            assert allowed["worst group"].idxmax() == chosen[method, relus]


def test_the_page_says_where_each_method_lies(compared):
    table = pd.read_parquet(compared / "comparison.parquet")
    text = html.unescape((compared / "comparison.html").read_text(encoding="utf-8")).replace("\u00a0", " ")
    own = table[(table["measure"] == "above_null") & (table["method"] != "erm")]
    assert len(own) == 3 * 3
    for value, low, high in own[["value", "low", "high"]].to_numpy():
        words = "lies above the free line" if low > 0 else "cannot be told apart from the free line"
        words = "lies below the free line" if high < 0 else words
        assert f"{signed(value)} points (95 % interval {signed(low)} to {signed(high)})" in text
        assert f"It {words}: " in text
    for value in table.loc[table["measure"] == "undone", "value"]:
        assert f'<td class="number">{signed(value)}' in text
    # Digits are their own groups, so that a shift of classes is one of groups.
    assert "cannot favour one group" not in text


def test_a_comparison_of_an_earlier_version_has_its_page(compared, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(compared, old)
    (old / "null_front.parquet").unlink()
    table, images = pd.read_parquet(old / "comparison.parquet"), pd.read_parquet(old / "predictions.parquet")
    new = ["above_null", "past_null", "drop_points", "undone", "undone_beyond_base", "tau"]
    table[~table["measure"].isin(new)].to_parquet(old / "comparison.parquet")
    images.drop(columns=["right_from", "right_to"]).to_parquet(old / "predictions.parquet")
    ok("report", old, "--figures", tmp_path / "figures")
    assert "free line" not in (old / "comparison.html").read_text(encoding="utf-8").lower()
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == {"gain", "pareto", "drop", "layers"}


def test_figures_and_page_by_the_report_command(compared, tmp_path):
    ok("report", compared, "--out", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert (tmp_path / "page.html").stat().st_size > 100_000
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == {
        "gain",
        "pareto",
        "above_null",
        "drop",
        "layers",
    }


def test_masks_are_named_by_what_placed_them(compared):
    layers = pd.read_parquet(compared / "layers.parquet")
    assert set(layers["linearizer"]) == {"snl"}
    assert set(masks_of(layers)) == {"plain distillation", "lagrangian mu=0.5 protect"}
    others = pd.concat([layers, layers[layers["placement"] == ""].assign(linearizer="coordinate_descent")])
    assert set(masks_of(others)) == {"SNL", "SNL, lagrangian mu=0.5 protect", "coordinate descent"}


def test_drops_are_drawn_as_the_table_has_them(compared):
    frame = prepare(pd.read_parquet(compared / "comparison.parquet"))
    drawn = [panel.to_dict()["datasets"] for panel in drop_by_budget(frame)]
    rows = [row for data in drawn for part in data.values() for row in part if row.get("value") is not None]
    own = frame[(frame["measure"] == "relative_drop") & (frame["group"] != "worst group")]
    assert sorted(row["value"] for row in rows) == pytest.approx(sorted(own["value"].dropna()))


def test_a_panel_without_a_drop_says_why(compared):
    frame = prepare(pd.read_parquet(compared / "comparison.parquet"))
    group = next(name for name in frame["group"] if name not in ("overall", "worst group"))
    frame.loc[(frame["group"] == group) & (frame["measure"] == "relative_drop"), "value"] = float("nan")
    titles = [panel.to_dict()["title"] for panel in drop_by_budget(frame)]
    assert {"text": group, "subtitle": "no drop: a base network gets none right"} in titles
    assert group not in titles


@pytest.mark.slow
def test_ablation_compares_every_value(runs, tmp_path):
    out = tmp_path / "ablation"
    said = ok("ablate", runs / "snl", *FINETUNE, "--vary", "mu=0.5,2.0", "--out", out)
    assert "lagrangian mu=2" in said
    table = pd.read_parquet(out / "compare" / "comparison.parquet")
    # Beside the values, their curve, where it has overall accuracies that shifts have.
    assert set(table["method"]) - {"lagrangian mu=*"} == {"erm", "lagrangian mu=0.5", "lagrangian mu=2"}
    curve = table[table["method"] == "lagrangian mu=*"]
    assert set(curve["measure"]) <= {"area_above_null", "mean_above_null"}
    metrics = pd.read_parquet(out / "mu-2" / "metrics.parquet")
    assert metrics.filter(like="lambda[").iloc[-1].max() > 0


def test_a_finetune_killed_with_its_multipliers_goes_on(runs, compared, tmp_path):
    out = tmp_path / "repaired"
    arguments = ["finetune", str(runs / "snl"), *FINETUNE, "--objective", "lagrangian", "--mu", "0.5"]
    arguments += ["--select", "last", "--out", str(out)]
    assert kill_when(arguments, (out / "checkpoint" / "budget-224.safetensors").exists)
    ok(*arguments)
    assert contents(out) == contents(runs / "repaired")


def test_networks_whose_last_layer_was_retrained(runs, tmp_path):
    """On validation images enough for every digit: a balanced split of balanced digits."""
    base = ["train", "--data", "digits", "--balanced", "--model", "cnn", "--width", "4", "--epochs", "3"]
    ok(*base, "--batch-size", "64", "--lr", "0.05", "--out", tmp_path / "base")
    ok("linearize", tmp_path / "base", "--budgets", "0.2", "--max-epochs", "2", "--out", tmp_path / "snl")
    ok("last-layer", tmp_path / "snl", "--out", tmp_path / "retrained")
    ok("audit", tmp_path / "retrained", "--resamples", "50", "--out", tmp_path / "audit")
    folders, labels = [tmp_path / "snl", tmp_path / "retrained"], {"not finetuned", "last layer"}
    for method, named in {"afr": "AFR", "self": "SELF"}.items():
        ok("last-layer", tmp_path / "snl", "--method", method, "--out", tmp_path / method)
        tried = pd.read_parquet(tmp_path / method / "metrics.parquet")
        (best,) = tried.loc[tried["chosen"], "worst_group_accuracy"]
        assert best == tried["worst_group_accuracy"].max()
        ok("last-layer", tmp_path / "snl", "--method", method, "--strength", "7", "--out", tmp_path / f"{method}-7")
        assert pd.read_parquet(tmp_path / f"{method}-7" / "metrics.parquet")["strength"].tolist() == [7]
        folders += [tmp_path / method, tmp_path / f"{method}-7"]
        labels |= {named, f"{named} strength=7"}
    class_on_train, within = ["--balance", "class", "--part", "train"], ["--within", "0"]
    for named, given in {"by class on train": class_on_train, "within=0": within}.items():
        ok("last-layer", tmp_path / "snl", *given, "--out", tmp_path / named)
        folders += [tmp_path / named]
        labels |= {f"last layer {named}"}
    assert "last layer" in ok("compare", *folders, "--resamples", "50", "--out", tmp_path / "compare")
    table = pd.read_parquet(tmp_path / "compare" / "comparison.parquet")
    assert set(table["method"]) == labels
    ruled = table[table["method"] == "last layer within=0"]
    assert set(ruled["tried"]) == {5}
    chosen = pd.read_parquet(tmp_path / "within=0" / "metrics.parquet").query("chosen")["strength"].item()
    assert set(ruled["strength"]) == {"none" if math.isnan(chosen) else f"strength={chosen:g}"}
    gain = table[(table["measure"] == "gain") & (table["group"] == "overall") & (table["method"] == "last layer")]
    assert gain["value"].item() > 10
    folders = ("snl", "retrained", "afr", "self")
    masks = [(tmp_path / n / "networks/budget-90/masks.safetensors").read_bytes() for n in folders]
    assert len(set(masks)) == 1


def test_networks_whose_classes_were_rebalanced(runs, tmp_path):
    said = ok("adjust", runs / "students", "--rule", "largest_loss", "--out", tmp_path / "adjusted")
    tried = pd.read_parquet(tmp_path / "adjusted" / "metrics.parquet")
    assert "largest loss of a group" in said
    for name, own in tried.groupby("network"):
        (chosen,) = own.loc[own["chosen"], "tau"]
        assert chosen == own.loc[own["largest_loss"].idxmin(), "tau"]
        assert f"{name}: τ = {chosen:g}" in said
        masks = [
            (tmp_path / "adjusted", runs / "students")[i] / "networks" / name / "masks.safetensors" for i in (0, 1)
        ]
        assert masks[0].read_bytes() == masks[1].read_bytes()
    assert "τ = 2" in ok("adjust", runs / "students", "--tau", "2", "--out", tmp_path / "fixed")
    said = ok("compare", runs / "students", tmp_path / "fixed", "--resamples", "50", "--out", tmp_path / "compare")
    assert "logit adjust tau=2" in said
    # A network of the null front is the one that adjust makes.
    table, front = (pd.read_parquet(tmp_path / "compare" / f"{name}.parquet") for name in ("comparison", "null_front"))
    made = table[(table["method"] == "erm, logit adjust tau=2") & (table["measure"] == "accuracy")]
    drawn = front[(front["method"] == "erm") & (front["tau"] == 2) & (front["part"] == "test")]
    both = made[made["class"] == ""].merge(drawn, on=["relus", "group"])
    assert len(both) == 3 * 12
    assert (both["value"] - both["accuracy"]).abs().max() < 1e-12
    distance = table[(table["method"] == "erm, logit adjust tau=2") & (table["measure"] == "above_null")]
    assert (distance["value"] < 1e-9).all()
    ok("audit", tmp_path / "adjusted", "--resamples", "50", "--out", tmp_path / "audit")
    assert set(pd.read_parquet(tmp_path / "audit" / "audit.parquet")["objective"]) == {"", "erm + logit adjust"}
    ok("compile", tmp_path / "adjusted", "--networks", "budget-20", "--out", tmp_path / "compiled")


def test_replicates_must_have_the_same_data(runs, tmp_path):
    base = ["train", "--data", "digits", "--balanced", "--model", "cnn", "--width", "4", "--epochs", "1"]
    ok(*base, "--out", tmp_path / "base")
    ok("linearize", tmp_path / "base", "--budgets", "0.5", "--max-epochs", "1", "--out", tmp_path / "snl")
    done = fairline("compare", str(runs / "snl"), str(tmp_path / "snl"), "--out", str(tmp_path / "c"))
    assert done.returncode == 2
    assert "were trained on different data" in done.stderr
    assert not (tmp_path / "c").exists()


def test_emptied_layers_are_a_method_and_a_budget_may_be_one_method_s_alone(runs, tmp_path):
    """The headline speaks of the smallest budget that the baseline has."""
    ok("linearize", runs / "base", *LINEARIZE, "--empty-layers", "0.5", "--out", tmp_path / "emptied")
    ok("linearize", runs / "base", "--budgets", "10", "--method", "random", "--out", tmp_path / "few")
    sources = [runs / "snl", tmp_path / "emptied", tmp_path / "few"]
    ok("compare", *sources, "--resamples", "50", "--out", tmp_path / "compare")
    table = pd.read_parquet(tmp_path / "compare" / "comparison.parquet")
    budgets = table.groupby("method")["relus"].agg(set).to_dict()
    assert budgets["not finetuned"] == budgets["masks layers emptied=0.5, not finetuned"] == {224, 45, 20}
    assert budgets["random: not finetuned"] == {10}
    page = (tmp_path / "compare" / "comparison.html").read_text(encoding="utf-8")
    assert "With 4.5 % of the ReLUs" in html.unescape(page).replace("\u00a0", " ")


def test_settings_tell_methods_apart_where_nothing_else_does(runs, tmp_path):
    """Of what differs, and of nothing else; the first run's go without saying, and so do defaults."""
    ok("linearize", runs / "base", *LINEARIZE, "--lam", "0.002", "--out", tmp_path / "snl")
    finetune = ("finetune", tmp_path / "snl", *FINETUNE)
    ok(*finetune, "--out", tmp_path / "dearer")
    ok(*finetune, "--epochs", "3", "--seed", "5", "--out", tmp_path / "longer")
    ok("finetune", runs / "snl", *FINETUNE, "--epochs", "1", "--objective", "ldam", "--out", tmp_path / "other")
    sources = [runs / "students", tmp_path / "dearer", tmp_path / "longer", tmp_path / "other"]
    run = compare_job(sources, tmp_path / "compared", resamples=20, device="cpu")
    longer = "masks lam=0.002, erm, epochs=3, seed=5"
    assert set(run.table("comparison.parquet")["method"]) == {"erm", "masks lam=0.002, erm", longer, "ldam"}
    assert set(run.table("comparison.parquet")["baseline"]) == {"erm"}
    assert set(run.table("layers.parquet")["placement"]) == {"", "lam=0.002"}
    # Alone, each is called by what was done.
    alone = compare_job(sources[1:2], tmp_path / "alone", resamples=20, device="cpu")
    assert set(alone.table("comparison.parquet")["method"]) == {"erm"}
    # Seeds are replicates, whatever those of one of them are called by.
    names = method_names([[Run.read(path) for path in sources], [Run.read(tmp_path / "longer")]])
    assert {names[path.resolve()].label for path in Run.read(tmp_path / "longer").networks().values()} == {longer}


def test_a_method_that_cannot_meet_a_budget_stands_at_it(runs, tmp_path):
    """Two base networks whose whole-layer masks keep other numbers of ReLUs, below what was asked."""
    sources = []
    for seed, kept in enumerate((40, 43)):
        moved = tmp_path / f"seed-{seed}"
        for name in ("base", "snl", "students"):
            shutil.copytree(runs / name, moved / name)
            config = moved / name / "config.json"
            config.write_text(config.read_text().replace(str(runs), str(moved)))
        for file in (moved / "snl" / "networks").glob("*/network.json"):
            info = json.loads(file.read_text())
            info |= {"method": "layerwise", "relus": kept if info["relus"] == 45 else info["relus"]}
            file.write_text(json.dumps(info))
        sources += [moved / "snl", moved / "students"]
    run = compare_job(sources, tmp_path / "compared", baseline="erm", resamples=20, device="cpu")
    table = run.table("comparison.parquet")
    own = table[(table["method"] == "layerwise: not finetuned") & (table["measure"] == "accuracy")]
    assert set(own["replicates"]) == {2}
    assert set(zip(own["relus"], own["kept"], strict=True)) == {(224, 224.0), (45, 41.5), (20, 20.0)}
    assert (table.loc[(table["method"] == "erm"), "kept"] == table.loc[table["method"] == "erm", "relus"]).all()
    told = "Not every budget can be met exactly: “layerwise: not finetuned” keeps 42 of 45 ReLUs."
    assert told in warnings(prepare(table), run, judged(run))
