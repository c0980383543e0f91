"""Networks of one grouping audited and compared by another, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

import fairline as fl
from fairline.data.grouped import too_few
from fairline.report.html import write_report
from fairline.runs import Run, load_network
from fairline.study.spec import DataSource
from tests.commands import fairline, ok
from tests.data.test_folder import write

SMALL = ["--model", "cnn", "--width", "4", "--epochs", "1", "--batch-size", "64"]
GROUPS = ["--groups", "sex", "--groups", "age:0-17,18+"]


def table(folder: Path) -> list[str | Path]:
    """Options of its images."""
    data = ["--data", "folder", "--root", folder / "images", "--label", "finding", "--keep-together", "patient"]
    return [*data, "--no-flip", "--groups", "sex", "--image-size", "8"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A base network by sex, with a linearized one, and its finetune twice."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    rows = [
        {
            "file_name": f"{i}.png",
            "finding": "xy"[i % 2],
            "sex": "fm"[int(rng.random() < 0.3)],
            "age": int(rng.integers(0, 90)),
            "patient": f"p{i // 2}",
        }
        for i in range(200)
    ]
    # The last child is alone, and so in one part.
    write(folder / "images", [{**row, "ward": "one" if i == 7 else "all"} for i, row in enumerate(rows)])
    ok("train", *table(folder), *SMALL, "--out", folder / "base")
    ok("linearize", folder / "base", "--method", "random", "--budgets", "0.5", "--out", folder / "half")
    return folder


def test_options_of_a_folder_are_recorded_as_ever(shop):
    data = json.loads((shop / "base" / "config.json").read_text())["data"]
    assert data["options"] == {
        "image_size": 8,
        "label": "finding",
        "flip": False,
        "keep_together": "patient",
        "groups": "sex",
    }


def test_a_command_with_the_old_options_resumes_the_run(shop):
    pairs = ["label=finding", "flip=false", "keep_together=patient", "groups=sex", "image_size=8"]
    options = [word for pair in pairs for word in ("--data-option", pair)]
    said = ok("train", "--data", "folder", "--root", shop / "images", *options, *SMALL, "--out", shop / "base")
    assert "Best epoch" in said


def test_an_audit_by_other_groups_measures_the_same_images(shop):
    ok("audit", shop / "half", "--resamples", "50", "--out", shop / "by_sex")
    said = fairline("audit", shop / "half", *GROUPS, "--resamples", "50", "--out", shop / "by_both")
    assert said.returncode == 0
    assert "Fewer than 30 images in the test part, too few to judge: 'f × 0–17' (" in said.stdout
    tables = [pd.read_parquet(shop / name / "predictions.parquet") for name in ("by_sex", "by_both")]
    assert list(tables[0]) == list(tables[1])
    assert {"file_name", "finding", "sex", "age", "patient", "ward"} <= set(tables[0])
    pd.testing.assert_frame_equal(tables[0].drop(columns="group"), tables[1].drop(columns="group"))
    both = tables[1]
    crossed = both["sex"] + " × " + np.where(both["age"].astype(int) > 17, "18+", "0–17")
    assert (both["group"] == crossed).all()
    assert json.loads((shop / "by_both" / "config.json").read_text())["groups"] == ["sex", "age:0-17,18+"]
    audit = pd.read_parquet(shop / "by_both" / "audit.parquet")
    own = audit[(audit["measure"] == "accuracy") & (audit["group"] != "overall")].set_index(["model", "group"])
    expected = both.groupby(["model", "group"])["correct"].mean()
    pd.testing.assert_series_equal(own["value"].sort_index(), expected.sort_index(), check_names=False)
    assert set(audit["model"]) == {"base", "half/" + own.index[-1][0].partition("/")[2]}
    counts = pd.read_parquet(shop / "by_both" / "counts.parquet")
    assert set(counts["group"]) == set(crossed)
    assert counts["n"].sum() == 200
    page = write_report(shop / "by_both").read_text()
    assert "Who pays for linearization: folder by sex, age:0-17,18+" in page
    assert "Fewer than 30 images in the test part, too few to judge: “f × 0–17” (" in page


def test_groups_without_a_measured_image_are_told_and_left_out(shop):
    where = pd.read_parquet(shop / "by_sex" / "predictions.parquet")["ward"]
    assert "one" not in set(where)
    said = fairline("audit", shop / "half", "--groups", "ward", "--resamples", "50", "--out", shop / "by_ward")
    assert "no image in the test part, so left out: 'one'" in said.stderr
    assert set(pd.read_parquet(shop / "by_ward" / "audit.parquet")["group"]) == {"all", "overall"}
    counts = pd.read_parquet(shop / "by_ward" / "counts.parquet").set_index(["part", "group"])["n"]
    assert counts["test", "one"] == 0
    assert counts.xs("one", level="group").sum() == 1
    ok("report", shop / "by_ward")


def test_methods_are_compared_by_other_groups(shop):
    ok("finetune", shop / "half", "--epochs", "1", "--out", shop / "tuned")
    ok("compare", shop / "half", shop / "tuned", *GROUPS, "--resamples", "50", "--out", shop / "compared")
    table = pd.read_parquet(shop / "compared" / "comparison.parquet")
    assert {"f × 18+", "m × 0–17", "overall", "worst group"} <= set(table["group"])
    assert "by sex, age:0-17,18+" in (shop / "compared" / "comparison.html").read_text()


@pytest.fixture(scope="module")
def repaired(shop):
    """A finetune for sex × age of the network whose data have groups by sex alone, and a plain one."""
    lagrangian = ["--objective", "lagrangian", "--mu", "0.5", "--epochs", "1", "--select", "last"]
    ok("finetune", shop / "half", *lagrangian, *GROUPS, "--out", shop / "repaired")
    ok("finetune", shop / "half", "--epochs", "1", "--select", "last", "--out", shop / "plain")
    return shop / "repaired"


CROSSED = {"f × 0–17", "f × 18+", "m × 0–17", "m × 18+"}


def test_a_repair_may_be_for_other_groups_than_the_data_s(shop, repaired):
    config = json.loads((repaired / "config.json").read_text())
    assert config["groups"] == ["sex", "age:0-17,18+"]
    # The split stays.
    base = json.loads((shop / "base" / "config.json").read_text())
    assert config["data"] == base["data"]
    metrics = pd.read_parquet(repaired / "metrics.parquet")
    assert {name for name in metrics if name.startswith("lambda[")} == {f"lambda[{group}]" for group in CROSSED}


def test_what_is_built_on_a_repair_is_chosen_and_judged_in_its_groups(shop, repaired, tmp_path):
    ok("audit", repaired, "--resamples", "50", "--out", tmp_path / "audit")
    assert set(pd.read_parquet(tmp_path / "audit" / "audit.parquet")["group"]) == {*CROSSED, "overall"}
    ok("compare", shop / "plain", repaired, "--resamples", "50", "--out", tmp_path / "compared")
    table = pd.read_parquet(tmp_path / "compared" / "comparison.parquet")
    assert set(table["group"]) == {*CROSSED, "overall", "worst group"}
    assert set(table["method"]) == {"random: erm", "random: lagrangian mu=0.5"}
    assert "by sex, age:0-17,18+" in (tmp_path / "compared" / "comparison.html").read_text()
    # What is named wins.
    ok("audit", repaired, "--groups", "sex", "--resamples", "50", "--out", tmp_path / "by_sex")
    assert set(pd.read_parquet(tmp_path / "by_sex" / "audit.parquet")["group"]) == {"f", "m", "overall"}
    ok("adjust", repaired, "--out", tmp_path / "adjusted")
    network, _ = load_network(next((tmp_path / "adjusted" / "networks").iterdir()))
    val = Run.read(repaired).data.load()[1]["val"].regroup(["sex", "age:0-17,18+"])
    right = (fl.predict(network, val).argmax(1) == val.labels).double()
    worst = min(float(right[val.groups == group].mean()) for group in range(val.num_groups))
    metrics = pd.read_parquet(tmp_path / "adjusted" / "metrics.parquet")
    assert metrics.loc[metrics["chosen"], "worst_group_accuracy"].item() == pytest.approx(worst)


def test_a_choice_is_made_in_the_groups_that_its_runs_are_for(shop, repaired, tmp_path):
    stronger = ["--objective", "lagrangian", "--mu", "5", "--epochs", "1", "--select", "last"]
    ok("finetune", shop / "half", *stronger, *GROUPS, "--out", tmp_path / "stronger")
    ok("choose", repaired, tmp_path / "stronger", "--reference", shop / "plain", "--out", tmp_path / "chosen")
    assert set(pd.read_parquet(tmp_path / "chosen" / "metrics.parquet")["worst_group"]) <= CROSSED
    ok("audit", tmp_path / "chosen", "--resamples", "50", "--out", tmp_path / "audit")
    assert set(pd.read_parquet(tmp_path / "audit" / "audit.parquet")["group"]) == {*CROSSED, "overall"}


def test_repairs_for_different_groups_are_judged_in_those_that_are_named(shop, repaired, refused, run_here, tmp_path):
    options = ["--objective", "group_dro", "--epochs", "1", "--select", "last", "--groups", "sex"]
    ok("finetune", shop / "half", *options, "--out", tmp_path / "by_sex")
    said = refused("compare", repaired, tmp_path / "by_sex", "--out", tmp_path / "compared")
    assert "were made for different groups (['sex', 'age:0-17,18+']; sex); name those to judge by (--groups)" in said
    assert not (tmp_path / "compared").exists()
    named = ["--groups", "sex", "--baseline", "random: group_dro", "--resamples", "50"]
    done = run_here("compare", repaired, tmp_path / "by_sex", *named, "--out", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    said = refused("finetune", shop / "half", "--groups", "hair", "--out", tmp_path / "bad")
    assert "has no column 'hair'" in said
    assert not (tmp_path / "bad").exists()


def test_an_ablation_by_other_groups_of_masks_by_another_method(shop, tmp_path):
    options = ["--epochs", "1", "--select", "last", "--vary", "mu=0.5", *GROUPS]
    ok("ablate", shop / "half", *options, "--out", tmp_path / "ablation")
    table = pd.read_parquet(tmp_path / "ablation" / "compare" / "comparison.parquet")
    assert set(table["method"]) == {"random: erm", "random: lagrangian mu=0.5"}
    assert set(table["baseline"]) == {"random: erm"}
    assert set(table["group"]) == {*CROSSED, "overall", "worst group"}
    metrics = pd.read_parquet(tmp_path / "ablation" / "mu-0.5" / "metrics.parquet")
    assert {name for name in metrics if name.startswith("lambda[")} == {f"lambda[{group}]" for group in CROSSED}


def worst_in_the_crossed_groups(run):
    """Of the first network of a run, in [0, 1], on the validation part."""
    network, _ = load_network(next((run / "networks").iterdir()))
    val = Run.read(run).data.load()[1]["val"].regroup(["sex", "age:0-17,18+"])
    right = (fl.predict(network, val).argmax(1) == val.labels).double()
    return min(float(right[val.groups == group].mean()) for group in range(val.num_groups))


def judged_by(folder, out):
    ok("audit", folder, "--resamples", "50", "--out", out)
    return set(pd.read_parquet(out / "audit.parquet")["group"]) - {"overall"}


def test_a_last_layer_is_balanced_by_other_groups(shop, repaired, tmp_path):
    ok("last-layer", shop / "plain", "--part", "train", "--out", tmp_path / "as_ever")
    assert "groups" not in json.loads((tmp_path / "as_ever" / "config.json").read_text())
    ok("last-layer", shop / "plain", "--part", "train", *GROUPS, "--out", tmp_path / "crossed")
    config = json.loads((tmp_path / "crossed" / "config.json").read_text())
    assert config.pop("groups") == ["sex", "age:0-17,18+"]
    assert config == json.loads((tmp_path / "as_ever" / "config.json").read_text())
    train = Run.read(shop / "plain").data.load()[1]["train"]
    by = {"as_ever": train, "crossed": train.regroup(["sex", "age:0-17,18+"])}
    for name, part in by.items():
        metrics = pd.read_parquet(tmp_path / name / "metrics.parquet")
        assert set(metrics["per_cell"]) == {part.counts()["n"].min()}
    assert by["as_ever"].counts()["n"].min() != by["crossed"].counts()["n"].min()
    assert judged_by(tmp_path / "crossed", tmp_path / "audit") == CROSSED


def test_tau_is_chosen_in_other_groups(shop, repaired, tmp_path):
    ok("adjust", shop / "plain", "--out", tmp_path / "as_ever")
    assert "groups" not in json.loads((tmp_path / "as_ever" / "config.json").read_text())
    ok("adjust", shop / "plain", *GROUPS, "--out", tmp_path / "crossed")
    metrics = pd.read_parquet(tmp_path / "crossed" / "metrics.parquet")
    worst = worst_in_the_crossed_groups(tmp_path / "crossed")
    assert metrics.loc[metrics["chosen"], "worst_group_accuracy"].item() == pytest.approx(worst)
    # The network calls all images the same, so by what they show one group is all wrong.
    ok("adjust", shop / "plain", "--groups", "finding", "--out", tmp_path / "by_class")
    tables = [pd.read_parquet(tmp_path / name / "metrics.parquet") for name in ("as_ever", "by_class")]
    assert tables[0]["worst_group_accuracy"].min() > 0
    assert tables[1]["worst_group_accuracy"].max() == 0
    assert judged_by(tmp_path / "crossed", tmp_path / "audit") == CROSSED
    # What is named later wins.
    ok("last-layer", tmp_path / "crossed", "--part", "train", "--groups", "sex", "--out", tmp_path / "by_sex")
    assert judged_by(tmp_path / "by_sex", tmp_path / "audit_by_sex") == {"f", "m"}


def test_a_strength_is_chosen_in_groups_that_are_named(shop, repaired, tmp_path):
    for tau in ("0.5", "2"):
        ok("adjust", shop / "plain", "--tau", tau, "--out", tmp_path / tau)
        ok("adjust", shop / "plain", "--tau", tau, *GROUPS, "--out", tmp_path / f"{tau} for both")
    choose = ["choose", tmp_path / "0.5", tmp_path / "2", "--reference", shop / "plain"]
    ok(*choose, "--out", tmp_path / "as_ever")
    assert "groups" not in json.loads((tmp_path / "as_ever" / "config.json").read_text())
    assert set(pd.read_parquet(tmp_path / "as_ever" / "metrics.parquet")["worst_group"]) <= {"f", "m"}
    ok(*choose, *GROUPS, "--out", tmp_path / "crossed")
    metrics = pd.read_parquet(tmp_path / "crossed" / "metrics.parquet")
    assert set(metrics["worst_group"]) <= CROSSED
    worst = worst_in_the_crossed_groups(tmp_path / "crossed")
    assert metrics.loc[metrics["chosen"], "worst_group_accuracy"].item() == pytest.approx(worst)
    assert judged_by(tmp_path / "crossed", tmp_path / "audit") == CROSSED
    # What is named wins over what the runs are for.
    choose = ["choose", tmp_path / "0.5 for both", tmp_path / "2 for both", "--reference", shop / "plain"]
    ok(*choose, "--groups", "sex", "--out", tmp_path / "by_sex")
    assert set(pd.read_parquet(tmp_path / "by_sex" / "metrics.parquet")["worst_group"]) <= {"f", "m"}
    assert judged_by(tmp_path / "by_sex", tmp_path / "audit_by_sex") == {"f", "m"}


def test_one_method_for_several_groups_is_told_apart_by_them(shop, repaired, refused, tmp_path):
    """Plain distillation keeps its name, by which it is the baseline."""
    for name, groups in {"as_ever": (), "by_sex": ("--groups", "sex"), "both": GROUPS}.items():
        ok("last-layer", shop / "plain", *groups, "--out", tmp_path / name)
    made = [shop / "plain", *(tmp_path / name for name in ("as_ever", "by_sex", "both"))]
    told = refused("compare", *made, "--out", tmp_path / "compare")
    assert "were made for different groups" in told
    assert "name those to judge by (--groups)" in told
    ok("compare", *made, "--groups", "sex", "--resamples", "50", "--out", tmp_path / "compare")
    found = pd.read_parquet(tmp_path / "compare" / "comparison.parquet")
    crossed = " × ".join(GROUPS[1::2])
    assert set(found["method"]) == {
        "random: erm",
        "random: erm, last layer",
        "random: erm, last layer for sex",
        f"random: erm, last layer for {crossed}",
    }
    assert set(found["baseline"]) == {"random: erm"}
    # What another base network lacks is told by the same names: these are no replicates of one method.
    ok("train", *table(shop), *SMALL, "--seed", "1", "--out", tmp_path / "base")
    ok("linearize", tmp_path / "base", "--method", "random", "--budgets", "0.5", "--out", tmp_path / "half")
    ok("finetune", tmp_path / "half", "--epochs", "1", "--out", tmp_path / "plain")
    ok("adjust", tmp_path / "plain", "--tau", "1", *GROUPS, "--out", tmp_path / "adjusted")
    ok("adjust", shop / "plain", "--tau", "1", "--groups", "sex", "--out", tmp_path / "adjusted_by_sex")
    pairs = [made[0], tmp_path / "adjusted_by_sex", tmp_path / "plain", tmp_path / "adjusted"]
    told = refused("compare", *pairs, "--groups", "sex", "--out", tmp_path / "pairs")
    assert "logit adjust tau=1 for sex" in told
    assert "both hold 'random: erm, last layer' with" in refused(
        "compare", made[0], made[1], made[1], "--groups", "sex", "--out", tmp_path / "twice"
    )


def test_what_is_chosen_in_groups_that_do_not_fit_leaves_no_folder(shop, repaired, refused, tmp_path):
    for tau in ("1", "2"):
        ok("adjust", shop / "plain", "--tau", tau, "--out", tmp_path / tau)
    choose = ("choose", tmp_path / "1", tmp_path / "2", "--reference", shop / "plain")
    for command in (("last-layer", shop / "plain"), ("adjust", shop / "plain"), choose):
        assert "has no column 'hair'" in refused(*command, "--groups", "hair", "--out", tmp_path / "bad")
        said = refused(*command, "--groups", "ward", "--out", tmp_path / "bad")
        assert "needs every group, but 'one' has no image" in said
        assert not (tmp_path / "bad").exists()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Networks of ten groups, each with fewer than 30 validation images; of two bins of rows each has more."""
    folder = tmp_path_factory.mktemp("digits")
    ok("train", "--data", "digits", "--balanced", *SMALL, "--out", folder / "base")
    ok("linearize", folder / "base", "--method", "random", "--budgets", "0.5", "--out", folder / "half")
    ok("finetune", folder / "half", "--epochs", "1", "--out", folder / "plain")
    for tau in ("1", "2"):
        ok("adjust", folder / "plain", "--tau", tau, "--out", folder / f"tau {tau}")
    return folder


HALVES = ["--groups", "row:0-898,899-1796"]
CHOOSE = ["choose", "tau 1", "tau 2", "--reference", "plain"]


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "half", "--objective", "group_dro", "--epochs", "1"],
        ["finetune", "half", "--objective", "reweighting", "--epochs", "1"],
        ["finetune", "half", "--select", "worst_group_accuracy", "--epochs", "1"],
        ["last-layer", "plain"],
        ["last-layer", "plain", "--method", "afr"],
        ["adjust", "plain"],
        CHOOSE,
    ],
    ids=" ".join,
)
def test_groups_too_small_to_choose_by_are_told(digits, run_here, tmp_path, command):
    words = [digits / word if (digits / word).is_dir() else word for word in command]
    told = "Fewer than 30 images in the validation part, too few to judge: '0' ("
    said = run_here(*words, "--out", tmp_path / "by_class")
    assert said.returncode == 0
    assert said.stderr.count(f"Warning: {told}") == 1
    assert told in (tmp_path / "by_class" / "log.txt").read_text()
    said = run_here(*words, *HALVES, "--out", tmp_path / "by_row")
    assert said.returncode == 0
    assert "too few" not in said.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "half", "--epochs", "1"],
        ["finetune", "half", "--objective", "reweighting", "--objective-option", "by=class", "--epochs", "1"],
        ["last-layer", "plain", "--method", "afr", "--strength", "1"],
        ["adjust", "plain", "--tau", "1"],
    ],
    ids=" ".join,
)
def test_groups_that_nothing_is_chosen_by_are_not_told(digits, run_here, tmp_path, command):
    words = [digits / word if (digits / word).is_dir() else word for word in command]
    said = run_here(*words, "--out", tmp_path / "out")
    assert said.returncode == 0
    assert "too few" not in said.stderr


def test_a_comparison_tells_which_groups_are_too_small(digits, run_here, tmp_path):
    compare = ["compare", digits / "half", digits / "plain", "--resamples", "50"]
    said = run_here(*compare, "--groups", "row:0-1770,1771-1796", "--out", tmp_path / "by_row")
    assert "Fewer than 30 images in the test part, too few to judge: '1771–1796' (" in said.stdout
    page = (tmp_path / "by_row" / "comparison.html").read_text()
    assert "Fewer than 30 images in the test part, too few to judge: “1771–1796” (" in page
    assert page.count("⚠") == len(set(pd.read_parquet(tmp_path / "by_row" / "comparison.parquet")["percent"])) + 1
    said = run_here(*compare, "--out", tmp_path / "by_class")
    assert said.returncode == 0
    assert "too few to judge" not in said.stdout
    page = (tmp_path / "by_class" / "comparison.html").read_text()
    assert "too few to judge" not in page
    assert "⚠" not in page


def test_of_many_small_groups_the_first_are_named():
    told = too_few({f"g{at}": at for at in range(13)}, "train", "“”")
    assert told.startswith("Fewer than 30 images in the training part, too few to judge: “g0” (0), “g1” (1), ")
    assert told.endswith(", “g9” (9) and 3 more")
    assert too_few({"many": 30}, "test") == ""


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("hair", "has no column 'hair' to make groups of; it has file_name, finding, sex, age, patient, ward, label"),
        ("age:0-17", "column 'age' lies outside of all bins (0–17)"),
        ("file_name,sex", "file_name makes 200 groups, more than 100"),
    ],
)
def test_groups_that_do_not_fit_leave_no_folder(shop, groups, message):
    done = fairline("audit", shop / "half", "--groups", groups, "--out", shop / "bad")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shop / "bad").exists()


def test_the_groups_and_columns_of_data_are_shown(shop):
    folder = ["--root", shop / "images", "--label", "finding", "--data-option", "image_size=8"]
    done = fairline("data", "folder", *folder, "--groups", "sex")
    assert "columns: file_name, finding, sex, age, patient, ward" in done.stdout
    assert "Fewer than 30 images in the test part, too few to judge: " in done.stdout
    assert "'m' (" in done.stdout
    assert "column 'patient' looks like the name of a patient" in done.stderr
    assert "looks like" not in fairline("data", "folder", *folder, "--keep-together", "patient").stderr
    done = fairline("data", "digits", "--label", "finding")
    assert done.returncode == 2
    assert "Data 'digits' knows no option 'label'." in done.stderr
    done = fairline("data", "folder", *folder, "--image-size", "8")
    assert done.returncode == 2
    assert "'image_size' is given twice" in done.stderr


def test_a_study_may_name_groups_beside_the_data():
    source = DataSource.model_validate({"name": "utkface:gender", "groups": ["race", "age:0-17,18+"]})
    assert source == DataSource(name="utkface:gender", options={"groups": ["race", "age:0-17,18+"]})
    for content, message in [
        ({"groups": "race", "options": {"groups": "age"}}, "named twice"),
        ({"groups": 3}, "groups are a column"),
    ]:
        with pytest.raises(ValidationError, match=message):
            DataSource.model_validate({"name": "utkface:gender", **content})
