"""Strengths that a study sweeps and chooses on validation images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import fairline as fl
from fairline._io import json_digest
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.jobs import choices, choose
from fairline.objectives import REGISTRY
from fairline.runs import Run, load_info, load_network
from fairline.study.cells import cells_of, require_known
from fairline.study.spec import StudySpec, load_spec
from fairline.study.store import read_results
from tests.commands import ok
from tests.study.test_execution import measured
from tests.test_cli import kill_when

SPEC = Path(__file__).parent / "swept.yaml"
PAPERS = Path(__file__).parents[2] / "papers"
NONE = "none"


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    ok("study", "run", SPEC, "--jobs", "2", "--results", folder / "results", "--out", folder / "out")
    return folder


@pytest.fixture(scope="module")
def named(swept) -> Path:
    """The cells of the seed by name."""
    return swept / "out" / "digits_swept" / "digits-0"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_network(folder)
    return model.state_dict()


@pytest.mark.parametrize(("method", "option"), [("lagrangian", "mu"), ("group_dro", "step")])
def test_the_validation_part_alone_decides(named, method, option):
    """Counted anew from the networks that the finetunes saved."""
    run = Run.read(named / f"plain-{method}", "choose")
    _, val, _ = fl.data.load("digits", unbalanced=False).split(seed=0)
    values = run.config["values"]
    strengths = {NONE: named / "plain-erm"}
    strengths |= {f"{option}={value:g}": named / f"plain-{method}-{option}-{value:g}" for value in values}
    assert len(strengths) == 3
    table = run.table("metrics.parquet")
    for name in run.networks():
        found = {}
        for strength, folder in strengths.items():
            right = (fl.predict(load_network(folder / "networks" / name)[0], val).argmax(1) == val.labels).double()
            groups = [float(right[val.groups == group].mean()) for group in range(val.num_groups)]
            found[strength] = float(right.mean()), min(groups)
        own = table[table["network"] == name].set_index("strength")
        assert list(own.index) == list(strengths)
        for strength, (overall, worst) in found.items():
            assert own.loc[strength, "accuracy"] == pytest.approx(overall)
            assert own.loc[strength, "worst_group_accuracy"] == pytest.approx(worst)
        allowed = {s: worst for s, (overall, worst) in found.items() if s != NONE and overall >= found[NONE][0] - 0.01}
        best = max(allowed, key=allowed.get) if allowed else NONE
        assert own.index[own["chosen"]].tolist() == [best]
        kept, taken = (weights(folder / "networks" / name) for folder in (run.folder, strengths[best]))
        assert all(torch.equal(kept[key], taken[key]) for key in taken)
        assert load_info(run.folder / "networks" / name).objective == method


def test_where_no_value_will_do_plain_distillation_stands_for_the_method(named, tmp_path):
    sources = [named / "plain-group_dro-step-0.5", named / "plain-group_dro-step-1000"]
    run = choose.choose_job(sources, tmp_path / "strict", reference=named / "plain-erm", within=0.0)
    table = run.table("metrics.parquet")
    lost = [name for name, own in table.groupby("network") if not own[own["strength"] != NONE]["within"].any()]
    assert lost  # else this tests nothing
    for name in lost:
        assert choices(run)[name] == (2, NONE)
        kept, plain = (weights(folder / "networks" / name) for folder in (run.folder, named / "plain-erm"))
        assert all(torch.equal(kept[key], plain[key]) for key in plain)


def test_nothing_but_the_validation_part_is_looked_at(named, tmp_path, monkeypatch):
    class Validation(dict[str, GroupedData]):
        def __missing__(self, part):
            raise AssertionError(f"the choice looks at {part}")

    _, val, _ = fl.data.load("digits", unbalanced=False).split(seed=0)
    monkeypatch.setattr(choose, "parts_once", lambda *_: lambda: Validation(val=val))
    sources = [named / "plain-lagrangian-mu-0.05", named / "plain-lagrangian-mu-30"]
    run = choose.choose_job(sources, tmp_path / "chosen", reference=named / "plain-erm")
    before = Run.read(named / "plain-lagrangian", "choose").table("metrics.parquet")
    assert_frame_equal(run.table("metrics.parquet"), before)
    loss = choose.choose_job(sources, tmp_path / "loss", reference=named / "plain-erm", rule="largest_loss")
    for _, own in loss.table("metrics.parquet").groupby("network"):
        own = own[own["strength"] != NONE]
        assert own.loc[own["chosen"], "largest_loss"].item() == own["largest_loss"].min()


def test_the_table_has_what_was_chosen_and_the_whole_curves(swept):
    table = read_results([swept / "out"])
    own = table[(table["measure"] == "accuracy") & (table["group"] == "overall") & (table["stage"] == "finetuned")]
    tried = own.groupby("finetune")["tried"].unique().map(list).to_dict()
    assert tried == {
        "erm": [1],
        "lagrangian": [2],
        "lagrangian mu=0.05": [1],
        "lagrangian mu=30": [1],
        "lagrangian, logit adjust": [2 + 2],
        "group_dro": [2],
        "group_dro step=0.5": [1],
        "group_dro step=1000": [1],
    }
    rows = own.set_index(["finetune", "asked"])
    for asked in own["asked"].unique():
        strength = rows.loc[("lagrangian", asked), "strength"]
        taken = "erm" if strength == NONE else f"lagrangian {strength}"
        assert rows.loc[("lagrangian", asked), "value"] == rows.loc[(taken, asked), "value"]
        assert re.fullmatch(rf"{strength}, tau=[\d.]+", rows.loc[("lagrangian, logit adjust", asked), "strength"])
        assert rows.loc[("group_dro step=0.5", asked), "strength"] == "step=0.5"
    results = swept / "results" / "digits_swept"
    compared, curves = (pd.read_csv(results / f"{name}.csv") for name in ("digits", "digits_curves"))
    names = {"lagrangian, mu chosen", "lagrangian, mu chosen, logit adjust", "group_dro, step chosen", "erm"}
    assert set(compared["method"]) == names
    assert dict(compared.groupby("method")["tried"].max())["lagrangian, mu chosen"] == 2
    # The control was chosen alike.
    assert set(compared.loc[compared["measure"] == "beyond_control", "method"]) == names - {"erm"}
    values = {"lagrangian mu=0.05", "lagrangian mu=30", "group_dro step=0.5", "group_dro step=1000", "erm"}
    assert set(curves.loc[curves["measure"] == "accuracy", "method"]) == values
    line = (
        pd.read_csv(results / "digits_null_front.csv")
        .set_index(["method", "group", "tau", "relus", "seed"])
        .sort_index()
    )
    plain = compared[(compared["measure"] == "accuracy") & (compared["method"] == "erm")]
    for row in plain[plain["group"] == "overall"].to_dict("records"):
        free = line.loc[("erm", "overall", 0.0, row["relus"]), "accuracy"]
        assert free.mean() == pytest.approx(row["value"], abs=1e-4)
    page = (swept / "out" / "digits_swept" / "compare-digits" / "comparison.html").read_text(encoding="utf-8")
    assert "What was chosen" in page
    assert "mu=30" in page.partition("Are the constraints met?")[2].partition("</section>")[0]


def test_the_table_has_what_constraints_lack_on_both_parts(swept, named):
    table = read_results([swept / "out"])
    own = table[table["measure"].isin(["train_violation", "val_violation", "lambda"])]
    assert set(own["finetune"]) == {"lagrangian mu=0.05", "lagrangian mu=30"}
    logged = Run.read(named / "plain-lagrangian-mu-30").table("metrics.parquet").groupby("network").last()
    rows = own[own["finetune"] == "lagrangian mu=30"]
    counts = pd.read_parquet(swept / "out" / "cells" / rows["cell"].iloc[0] / "counts.parquet").set_index(
        ["part", "group"]
    )["n"]
    assert len(rows) == 3 * len(counts.unstack(0)) * len(logged)
    for row in rows.to_dict("records"):
        assert row["value"] == logged.loc[f"budget-{row['asked']}", f"{row['measure']}[{row['group']}]"]
        assert row["split"] == ("val" if row["measure"] == "val_violation" else "train")
        assert row["n"] == counts[row["split"], row["group"]]


def test_killed_while_it_chooses_it_gives_the_same_table(swept, tmp_path):
    store = shutil.copytree(swept / "out", tmp_path / "store", symlinks=True)
    for folder in (store / "cells").iterdir():
        if folder.name.startswith(("choose", "compare")):
            shutil.rmtree(folder)
    arguments = ["study", "run", str(SPEC), "--out", str(store)]
    assert kill_when(arguments, lambda: any((store / "cells").glob("choose-*/checkpoint/*.parquet")))
    ok(*arguments)
    assert_frame_equal(measured(store), measured(swept / "out"))


def test_a_value_is_the_cell_of_a_study_that_names_it(tmp_path):
    spec = load_spec(SPEC)
    text = (
        SPEC.read_text()
        .replace("sweep: {mu: [0.05, 30.0]}", "options: {mu: 30.0}")
        .replace("adjust: [{tau: [0.5, 1.0]}]", "")
    )
    (tmp_path / "one.yaml").write_text(text)
    one = load_spec(tmp_path / "one.yaml")
    assert one.digest != spec.digest
    shared = {cell.key for cell in cells_of(spec)} & {cell.key for cell in cells_of(one)}
    (named,) = (cell for cell in cells_of(one) if cell.where == "digits-0/plain-lagrangian")
    assert named.key in shared


def test_parents_come_first_and_the_rule_is_part_of_the_hash(tmp_path):
    cells = cells_of(load_spec(SPEC))
    seen: set[str] = set()
    for cell in cells:
        assert {parent.key for parent in cell.parents} <= seen
        seen.add(cell.key)
    (tmp_path / "wider.yaml").write_text(SPEC.read_text() + "choose: {within: 2.0}\n")
    wider = {cell.key for cell in cells_of(load_spec(tmp_path / "wider.yaml"))}
    changed = {cell.kind for cell in cells if cell.key not in wider}
    assert changed == {"choose", "adjust", "audit", "compare"}


@pytest.mark.parametrize(
    ("file", "more", "digest", "keys"),
    [
        (PAPERS / "mitigation_utkface.yaml", "", "a20cbd44ee2aa230", "d7bec916c357f941"),
        (PAPERS / "fig6_utkface_race_snl.yaml", "", "2c7a3afb2533da0c", "21a2e0190c97699a"),
        (
            SPEC.with_name("digits.yaml"),
            "adjust: [{}, {method: tau_norm, tau: 1}],",
            "f8b247b3dc8154a0",
            "490c51f0618a9580",
        ),
    ],
)
def test_studies_without_sweeps_keep_their_names(tmp_path, file, more, digest, keys):
    """The hashes that results in stores are known by."""
    if more:
        text = file.read_text().replace("{objective: erm,", f"{{objective: erm, {more}")
        file = tmp_path / file.name
        file.write_text(text)
    spec = load_spec(file)
    assert (spec.digest, json_digest([cell.key for cell in cells_of(spec)])) == (digest, keys)


@pytest.mark.parametrize("groups", ["race", "age", "gender_by_race", "gender_by_age", "age_by_race"])
def test_the_studies_of_repairs_are_fair(groups):
    """Three strengths each, at one scale of every repair; race and age go on from base networks that are there."""
    path = PAPERS / f"repairs_utkface_{groups}.yaml"
    spec, whole = load_spec(path), load_spec(path, "whole")
    for one in (spec, whole):
        swept = [method for method in one.methods if method.sweep]
        assert {len(method.variants()) for method in swept} == {3}
        (lagrangian,) = (method for method in swept if method.objective == "lagrangian")
        assert [mu * one.finetune["epochs"] for mu in lagrangian.sweep["mu"]] == pytest.approx([0.1, 0.5, 2.0])
        steps = [step for method in one.methods for step in (*method.last_layers, *method.adjust)]
        assert [step.tries for step in steps] == [3] * 4
    assert {method.objective for method in whole.methods} == set(REGISTRY)
    assert {cell.key for cell in cells_of(spec)} - {cell.key for cell in cells_of(whole)} == {
        cell.key for cell in cells_of(spec) if cell.kind == "compare"
    }
    for one in (spec, whole, load_spec(path, "tiny")):
        assert all(1.0 in masks.budgets for masks in one.masks.values())
        require_known(one)
    bases = {cell.key for cell in cells_of(load_spec(PAPERS / "mitigation_utkface.yaml")) if cell.kind == "train"}
    own = {cell.key for cell in cells_of(spec) if cell.kind == "train"}
    assert own <= bases if groups in ("race", "age") else not own & bases


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "[0.05, 30.0]",
            "[0.05, 0.5, 30.0]",
            "(lagrangian: 3; group_dro: 2; lagrangian, logit adjust: 2)",
        ),
        ("adjust: [{tau: [0.5, 1.0]}]", "adjust: [{}]", "(lagrangian: 2; group_dro: 2; lagrangian, logit adjust: 24)"),
        ("{objective: erm,", "{objective: erm, last_layer: afr,", "logit adjust: 2; erm, AFR: 8); methods compare"),
        ("[0.5, 1.0]}]", "[0.5, 0.5]}]", "several different ones to choose from, not [0.5, 0.5]"),
        ("[0.5, 1.0]}]", "[0, 1.0, 2.0, 3.0]}]", "(lagrangian: 2; group_dro: 2; lagrangian, logit adjust: 3)"),
        (
            "{objective: erm,",
            "{objective: erm, last_layer: {strength: [0, 1]},",
            "retrained last layer is above 0, not 0",
        ),
        ("{objective: erm,", "{objective: erm, last_layer: {strength: 0},", "retrained last layer is above 0, not 0"),
        (
            "{objective: erm,",
            "{objective: erm, last_layer: {method: afr, strength: -1},",
            "AFR needs γ finite and not negative, not -1",
        ),
        (
            "{objective: erm,",
            "{objective: erm, last_layer: {method: self, strength: [1, 1.5]},",
            "SELF takes a number of points, not 1.5",
        ),
        (
            "[{tau: [0.5, 1.0]}]",
            "[{tau: [1, 2]}, {tau: [3, 4]}]",
            "'logit adjust' is there twice",
        ),
        ("[0.05, 30.0]", "[0.05, 0.05]", "the sweep of 'mu' has a value twice"),
        ("[0.05, 30.0]", "[0.05]", "the sweep of 'mu' needs two values at least"),
        ("[0.05, 30.0]}", "[0.05, 30.0], cap: [1, 2]}", "a sweep is of one option, not of mu and cap"),
        ("[0.05, 30.0]}", "[0.05, 30.0]}, options: {mu: 1}", "'mu' is swept and stands among the options too"),
        ("{objective: erm,", "{objective: arl,", "plain distillation (objective erm), which masks 'plain' do not have"),
        ("scale: a test", "choose: {reference: nobody}", "against 'nobody', which masks 'plain' do not have"),
        ("scale: a test", "choose: {rule: best}", "choose.rule: Input should be 'worst_group' or 'largest_loss'"),
        ("scale: a test", "choose: {within: -1}", "choose.within: Input should be greater than or equal to 0"),
    ],
)
def test_a_sweep_that_compares_nothing_fairly_is_refused(tmp_path, before, after, words):
    text = SPEC.read_text()
    assert before in text
    (tmp_path / "bad.yaml").write_text(text.replace(before, after))
    with pytest.raises(FairlineError, match=r"^[^\n]*\.$") as refused:
        load_spec(tmp_path / "bad.yaml")
    assert words in str(refused.value)


def test_one_method_on_several_masks_is_as_fair():
    content = load_spec(SPEC).model_dump()
    content["masks"]["other"] = content["masks"]["plain"]
    plain = {"objective": "erm", "masks": ["other"]}
    StudySpec.model_validate({**content, "methods": [*content["methods"], {**plain, "adjust": [{"tau": [1, 2]}]}]})
    for more in ({"adjust": [{}]}, {"sweep": {"temperature": [1, 2, 4]}}):
        with pytest.raises(ValueError, match="try different numbers of values"):
            StudySpec.model_validate({**content, "methods": [*content["methods"], {**plain, **more}]})


@pytest.mark.parametrize(
    ("sources", "reference", "words"),
    [
        (["plain-erm", "plain-lagrangian-mu-30"], "plain-erm", "differ in objective, objective_options.mu"),
        (["plain-lagrangian-mu-30"], "plain-erm", "A choice needs two runs at least, which differ in one setting."),
        (["plain-lagrangian-mu-30"] * 2, "plain-erm", "differ in one setting; they are the same."),
        (["plain-lagrangian-mu-30", "plain-lagrangian-logit-adjust"], "plain-erm", "runs of one job"),
        (["masks-plain"], "plain-erm", "'linearize' run; 'finetune' or 'last-layer' or 'adjust' is needed."),
    ],
)
def test_what_is_no_choice_is_one_sentence(named, refused, tmp_path, sources, reference, words):
    folders = [named / name for name in sources]
    said = refused("choose", *folders, "--reference", named / reference, "--out", tmp_path / "out")
    assert words in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_a_choice_of_an_ablation_by_the_command(named, run_here, tmp_path):
    folders = [named / "plain-lagrangian-mu-0.05", named / "plain-lagrangian-mu-30"]
    arguments = [
        "choose",
        *folders,
        "--reference",
        named / "plain-erm",
        "--within",
        "100",
        "--out",
        tmp_path / "chosen",
    ]
    done = run_here(*arguments)
    assert done.returncode == 0, done.stderr
    assert "validation accuracy" in done.stdout
    assert json.loads((tmp_path / "chosen" / "config.json").read_text())["option"] == "mu"
    done = run_here("audit", tmp_path / "chosen", "--resamples", "50", "--out", tmp_path / "audit")
    assert done.returncode == 0, done.stderr
    lineage = json.loads((tmp_path / "audit" / "config.json").read_text())["lineage"]
    assert sorted(each["command"] for each in lineage.values()) == ["choose"] + ["finetune"] * 3 + [
        "linearize",
        "train",
    ]
