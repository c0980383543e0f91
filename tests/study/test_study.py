from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fairline.errors import FairlineError
from fairline.linearize import FINETUNE_PRESETS, REGISTRY
from fairline.study.cells import cells_of, require_known
from fairline.study.estimate import _epochs
from fairline.study.run import status
from fairline.study.spec import load_spec
from tests.commands import fairline, ok

SPEC = Path(__file__).parent / "digits.yaml"
PAPERS = Path(__file__).parents[2] / "papers"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    ok("study", "run", SPEC, "--jobs", "2", "--results", folder / "results", "--out", folder / "out")
    return folder


def test_results_hold_every_method_and_where_they_come_from(study):
    results = study / "results" / "digits_tiny"
    table = pd.read_csv(results / "digits.csv")
    assert set(table["method"]) == {"erm", "lagrangian mu=0.5"}
    assert set(table["percent"].round()) == {100, 10}
    assert (table["replicates"] == 2).all()
    of_methods = {
        "accuracy",
        "gain",
        "beyond_control",
        "mitigation_drop",
        "relative_drop",
        "pareto",
        "balanced_accuracy",
    }
    of_shifts = {"above_null", "past_null", "drop_points", "undone", "undone_beyond_base", "tau"}
    assert of_methods | of_shifts <= set(table["measure"])
    provenance = json.loads((results / "provenance.json").read_text())
    assert provenance["spec_hash"] == load_spec(SPEC).digest
    assert provenance["seeds"] == [0, 1]
    assert provenance["scale"] == "a test"
    assert provenance["commits"] != ["None"]
    assert "CPU" in provenance["devices"][0]
    assert provenance["packages"]["torch"]
    for figure in ("digits_gain", "moved_prior"):
        assert (results / f"{figure}.png").stat().st_size > 5000


def test_it_goes_on_where_it_was_and_one_process_gives_the_same(study, tmp_path):
    before = (study / "results" / "digits_tiny" / "digits.csv").read_text()
    ok("study", "run", SPEC, "--results", tmp_path / "again", "--out", study / "out")
    assert (tmp_path / "again" / "digits_tiny" / "digits.csv").read_text() == before


def test_every_audit_of_a_study_has_a_page(study):
    folder = study / "out" / "digits_tiny" / "digits-0"
    base = pd.read_parquet(folder / "base-audit" / "audit.parquet").query("measure == 'accuracy'").set_index("group")
    for name in ("plain-erm", "plain-lagrangian"):
        # Without the base network, whose audit is a cell of its own; drops tell what it was.
        assert not (pd.read_parquet(folder / f"{name}-audit" / "audit.parquet")["stage"] == "base").any()
        ok("report", folder / f"{name}-audit")
        page = (folder / f"{name}-audit" / "report.html").read_text(encoding="utf-8")
        assert f"({base.loc['overall', 'value']:.1%} to" in page
        never = base.index[base["value"] == 0]
        assert len(never)
        assert all(f"“{group}” (0)" in page for group in never)
    ok("report", folder / "base-audit")


@pytest.mark.slow
def test_a_study_adjusts_what_it_finetuned(study, tmp_path):
    adjusted = tmp_path / "adjusted.yaml"
    text = SPEC.read_text().replace("name: digits_tiny", "name: digits_adjusted").replace("[0, 1]", "[0]")
    assert "{objective: erm," in text
    more = "{objective: erm, adjust: [{}, {method: tau_norm, tau: 1}],"
    adjusted.write_text(text.replace("{objective: erm,", more))
    assert load_spec(SPEC).digest != load_spec(adjusted).digest
    shutil.copytree(study / "out" / "cells", tmp_path / "out" / "cells")
    ok("study", "run", adjusted, "--results", tmp_path / "results", "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "results" / "digits_adjusted" / "digits.csv")
    assert {"erm, logit adjust", "erm, tau norm tau=1"} < set(table["method"])
    own = table[(table["method"] == "erm, logit adjust") & (table["measure"] == "beyond_control")]
    # The control, with all ReLUs, was adjusted alike.
    assert len(own)


def test_a_changed_spec_is_refused(study, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text(SPEC.read_text().replace("epochs: 2", "epochs: 3"))
    done = fairline("study", "run", str(changed), "--out", str(study / "out"))
    assert done.returncode == 2
    assert "holds study 'digits_tiny' before it was changed (finetune.epochs is 2 there and 3 here)" in done.stderr


def test_a_failing_cell_is_told_and_the_rest_goes_on(tmp_path):
    spec = tmp_path / "failing.yaml"
    text = SPEC.read_text().replace("seeds: [0, 1]", "seeds: [0]")
    spec.write_text(text + "  - {objective: lagrangian, label: broken, options: {mu: 1.0e+30}, masks: [plain]}\n")
    done = fairline("study", "run", spec, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "1 of 10 cells failed; digits-0/plain-broken: Epoch 1 of finetuning: The multiplier" in done.stderr
    table = status(tmp_path / "out").set_index("cell")
    # What needs the failed cell waits; all else is there.
    assert dict(table["state"][table["state"] != "finished"]) == {
        "digits-0/plain-broken": "failed",
        "digits-0/plain-broken-audit": "waiting",
        "compare-digits": "waiting",
    }
    assert table.loc["digits-0/plain-broken", "note"].startswith("Epoch 1 of finetuning: The multiplier")
    assert (tmp_path / "out/digits_tiny/digits-0/plain-lagrangian/status.json").exists()


def test_the_committed_studies_are_valid():
    specs = [load_spec(path) for path in PAPERS.glob("*.yaml")]
    assert specs
    for spec in specs:
        for method in spec.methods:
            from fairline.objectives import build

            build(method.objective, **method.options)


def test_the_hash_ignores_the_layout(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("# a comment\n" + SPEC.read_text().replace("seeds: [0, 1]", "seeds:\n  - 0\n  - 1"))
    assert load_spec(other).digest == load_spec(SPEC).digest


def test_a_method_twice_needs_a_label(tmp_path):
    twice = tmp_path / "twice.yaml"
    twice.write_text(SPEC.read_text() + "  - {objective: erm, options: {temperature: 1}, masks: [plain]}\n")
    with pytest.raises(FairlineError, match="method 'erm' is there twice for masks 'plain'; give one a label"):
        load_spec(twice)


def test_a_study_may_extend_another_and_name_scales(tmp_path):
    (tmp_path / "base.yaml").write_text(SPEC.read_text())
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: base.yaml\nname: child\ntrain: {epochs: 7}\nmasks: {plain: {settings: {lam: 0.5}}}\n"
        "scales:\n  tiny: {scale: shorter, train: {epochs: 1}, seeds: [5]}\n"
    )
    spec, tiny = load_spec(child), load_spec(child, "tiny")
    assert (spec.name, spec.scale, spec.seeds) == ("child", "a test", [0, 1])
    assert spec.train == {"epochs": 7, "lr": 0.05, "batch_size": 64}
    assert spec.masks["plain"].settings == {"lr": 0.03, "lam": 0.5, "batch_size": 64, "max_epochs": 3}
    assert (tiny.scale, tiny.seeds, tiny.train["epochs"]) == ("shorter", [5], 1)
    assert len({load_spec(SPEC).digest, spec.digest, tiny.digest}) == 3
    # Results of two scales lie side by side, in a store and among those committed.
    assert tiny.name == "child_tiny"
    child.write_text(child.read_text() + "  Half-size: {}\n  other: {name: short}\n")
    assert [load_spec(child, scale).name for scale in ("tiny", "Half-size", "other")] == [
        "child_tiny",
        "child_half_size",
        "short",
    ]


@pytest.mark.parametrize(
    ("text", "scale", "words"),
    [
        ("extends: base.yaml\nseedz: [0]\n", None, r"child\.yaml: seedz: Extra inputs .* \(line 2\)\.$"),
        (
            "extends: base.yaml\nmasks:\n  plain:\n    budgets: [a]\n",
            None,
            r"child\.yaml: masks\.plain\.budgets\.0\b.* \(line 4\)\.$",
        ),
        ("extends: broken.yaml\n", None, r"broken\.yaml: model\.nome: Extra inputs .* \(line 6\)\.$"),
        ("extends: child.yaml\n", None, r"child\.yaml extends itself\.$"),
        ("extends: gone.yaml\n", None, r"gone\.yaml cannot be read"),
        ("extends: [a]\n", None, r"child\.yaml: extends names one file, .* \(line 1\)\.$"),
        (
            "extends: base.yaml\nscales:\n  tiny:\n    train: 5\n",
            "tiny",
            r"child\.yaml: train: Input should be .* \(line 4\)\.$",
        ),
        ("extends: base.yaml\nscales: {tiny: {}}\n", "paper", r"has no scale 'paper'; it has tiny\.$"),
        ("extends: base.yaml\nscales:\n", "paper", r"has no scale 'paper'; it has none\.$"),
        ("extends: base.yaml\nscales: [tiny]\n", "tiny", "scales are names with fields under each"),
        ("extends: base.yaml\nscales: {tiny: 3}\n", None, "scales are names with fields under each"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, text, scale, words):
    (tmp_path / "base.yaml").write_text(SPEC.read_text())
    (tmp_path / "broken.yaml").write_text(SPEC.read_text().replace("{name: cnn,", "{nome: cnn,"))
    (tmp_path / "child.yaml").write_text(text)
    with pytest.raises(FairlineError, match=r"^[^\n]*$") as refused:
        load_spec(tmp_path / "child.yaml", scale)
    assert re.search(words, str(refused.value)), refused.value


def test_what_yaml_merges_in_has_its_own_line(tmp_path):
    spec = tmp_path / "merged.yaml"
    text = SPEC.read_text().replace("  plain:\n    budgets: [1.0, 0.1]", "  plain: &p\n    budgets: [1.0, 0.1]")
    spec.write_text(text.replace("finetune:", "  other: {<<: *p, budgets: [b]}\nfinetune:"))
    with pytest.raises(FairlineError, match=r"masks\.other\.budgets.* \(line 12\)"):
        load_spec(spec)


def test_every_scale_of_the_committed_studies_is_valid():
    import yaml

    for path in PAPERS.glob("*.yaml"):
        for scale in yaml.safe_load(path.read_text()).get("scales", {}):
            assert load_spec(path, scale).digest != load_spec(path).digest
            assert load_spec(path, scale).name != load_spec(path).name


def test_status_tells_what_is_done(study, tmp_path):
    said = ok("study", "status", study / "out")
    assert "digits_tiny: 15 of 15 cells are finished" in said
    table = status(study / "out")
    assert set(table["state"]) == {"finished"}
    assert table["kind"].value_counts().to_dict() == {
        "audit": 6,
        "finetune": 4,
        "train": 2,
        "linearize": 2,
        "compare": 1,
    }
    done = fairline("study", "status", str(tmp_path))
    assert done.returncode == 2
    assert "holds no study" in done.stderr


@pytest.mark.parametrize("path", sorted(PAPERS.glob("fig*.yaml")), ids=lambda path: path.stem)
def test_the_papers_scale_augments_nothing(path):
    spec = load_spec(path, "paper")
    assert not any(settings.get("augment") for settings in (spec.train, spec.finetune))
    assert not any(masks.settings.get("augment") for masks in spec.masks.values())


def test_deepreduce_at_the_papers_scale_is_the_preset_of_the_published_code():
    spec = load_spec(PAPERS / "fig6_utkface_race_dr.yaml", "paper")
    preset = FINETUNE_PRESETS["deepreduce_fairness"]
    assert {key: spec.finetune[key] for key in preset["settings"]} == preset["settings"]
    for method in spec.methods:
        assert {key: method.options[key] for key in preset["objective"]} == preset["objective"]
    # Students start untrained, and the finetune is all their training.
    assert spec.masks["dr"].settings["fresh"]
    assert spec.masks["dr"].settings["reshape_epochs"] == 0
    assert spec.baseline == "deepreduce: erm temperature=1 ce_weight=0.5 kd_weight=0.5"


def test_committed_results_are_described_by_their_settings():
    """What the defaults were when the results were made, as far as they have changed since."""
    settings = {name: masks.settings for name, masks in load_spec(PAPERS / "methods_utkface.yaml").masks.items()}
    named = {
        "autorep": {"lam": 60.0, "hold": 0},
        "deepreduce": {"fresh": False},
        "senet": {"literal": True},
        "coordinate_descent": {
            "within_layers": True,
            "step": 1,
            "rate": 0.2,
            "blocks": 8,
            "candidates": 8,
            "held_out": 0.1,
            "refresh_epochs": 1,
            "lr": 0.005,
        },
    }
    for name, expected in named.items():
        assert {key: settings[name][key] for key in expected} == expected
    for path in PAPERS.glob("*.yaml"):
        for masks in load_spec(path).masks.values():
            if masks.method == "snl":
                assert masks.settings["batch_size"] == 128
            if masks.method == "deepreduce":  # said, whatever the default
                assert masks.settings["fresh"] is (path.stem == "methods_equal_utkface")


def test_the_study_of_compiled_networks_shares_its_base_networks():
    """With the bfloat16 half of the paired study: the same cells, each computed once in a common store."""

    def bases(spec):
        return {cell.key for cell in cells_of(spec) if cell.kind == "train"}

    compiled = load_spec(PAPERS / "compiled_utkface_race.yaml")
    paired = load_spec(PAPERS / "precision_utkface_race.yaml", "bf16")
    assert bases(compiled) < bases(paired)
    for name, masks in compiled.masks.items():
        assert masks.budgets == ([1.0] if name == "control" else [0.02, 0.005, 0.001])
    slower = load_spec(PAPERS / "compiled_utkface_race.yaml", "slower")
    assert bases(slower) < bases(paired)
    assert slower.masks["early"].budgets == [0.02, 0.005, 0.002, 0.001]
    assert slower.masks["early"].settings["patience"] == 4
    # Masks that no method of a scale takes are not learned.
    (erm,) = compiled.methods
    fewer = compiled.model_copy(update={"methods": [erm.model_copy(update={"masks": ["snl", "control"]})]})
    placed = {cell.about["masks"] for cell in cells_of(fewer) if cell.kind == "linearize"}
    assert placed == {"snl", "control"} < set(fewer.masks)


def test_the_choice_of_layers_is_part_of_an_estimate():
    """Ten measurements and the last one again, of a quarter of an epoch each, with the teacher's passes."""
    placed = [cell for cell in cells_of(load_spec(PAPERS / "compiled_utkface_race.yaml")) if cell.kind == "linearize"]
    cells = {cell.about["masks"]: cell for cell in placed}
    plain, early = (_epochs(cells[name]) for name in ("snl", "early"))
    assert early - plain == pytest.approx(11 / 4 * 4 / 3)


def test_an_estimate_counts_what_is_trained():
    """A control as long as its masks, and the teacher's passes where it looks at each augmented batch anew."""
    spec = load_spec(PAPERS / "factors_utkface_race.yaml")

    def passes(kind, settings):
        masks = spec.masks["snl"].model_copy(update={"settings": spec.masks["snl"].settings | settings})
        finetune = spec.finetune | ({} if kind == "linearize" else settings)
        changed = spec.model_copy(update={"masks": {"snl": masks}, "finetune": finetune})
        (passes,) = {_epochs(cell) for cell in cells_of(changed) if cell.kind == kind}
        return passes

    assert passes("linearize", {"control": False}) == 40
    assert passes("linearize", {"control": True}) == 80
    assert passes("linearize", {"control": True, "augment": True}) == pytest.approx(80 * 4 / 3)
    assert passes("finetune", {}) == 4 * 3
    assert passes("finetune", {"augment": True}) == pytest.approx(4 * 3 * 4 / 3)


def test_a_network_of_ones_own_is_part_of_its_cells(tmp_path):
    (tmp_path / "blocks.py").write_text("WIDTH = 2\n")
    (tmp_path / "mine.py").write_text("import blocks\ndef net(num_classes): ...\n")
    file = tmp_path / "own.yaml"
    file.write_text(SPEC.read_text().replace("{name: cnn, options: {width: 4}}", '{name: "mine.py:net"}'))
    spec, own = load_spec(SPEC), load_spec(file)
    before = [cell.key for cell in cells_of(own)]
    assert [cell.key for cell in cells_of(load_spec(file))] == before
    (tmp_path / "blocks.py").write_text("WIDTH = 3\n")
    assert not set(before) & {cell.key for cell in cells_of(load_spec(file))}
    # What was noted stays, and so do the names of the cells, wherever the files are.
    (tmp_path / "mine.py").unlink()
    assert [cell.key for cell in cells_of(own)] == before
    # Cells of fairline's own networks keep their names.
    assert all("model_files" not in cell.arguments for cell in cells_of(spec))


def test_masks_may_have_a_finetune_of_their_own(tmp_path):
    def settings(file, masks):
        cells = cells_of(load_spec(file))
        return {cell.about["masks"]: cell.arguments["settings"] for cell in cells if cell.kind == "finetune"}[masks]

    file = PAPERS / "methods_equal_utkface.yaml"
    assert settings(file, "taylor") == {**settings(file, "random"), "epochs": 6}
    assert settings(file, "random")["epochs"] == 12
    # Every method that there is stands in the comparison, and what is not asked for leaves no trace in the hash.
    assert {masks.method for masks in load_spec(file).masks.values()} == set(REGISTRY)
    assert all("finetune" not in masks.model_dump() for masks in load_spec(SPEC).masks.values())
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text().replace("finetune: {epochs: 6}", "finetune: {epoch: 6}"))
    with pytest.raises(FairlineError, match=r"masks\.taylor\.finetune: there is no setting 'epoch'"):
        require_known(load_spec(wrong))


@pytest.mark.parametrize("path", sorted(PAPERS.glob("fig6_utkface_race*.yaml")), ids=lambda path: path.stem)
def test_the_medium_scale_is_the_papers_regime_in_a_narrower_network(path):
    spec, small = load_spec(path, "medium"), load_spec(path)
    assert spec.model.options == {"stem_stride": 1, "width": 16}
    assert len(spec.seeds) == 10
    epochs = spec.finetune["epochs"]
    used = {name for method in spec.methods for name in method.masks}
    assert 1.0 in {budget for name in used for budget in spec.masks[name].budgets}
    for method in spec.methods:
        if method.objective == "lagrangian":
            assert method.options["mu"] * epochs == 0.5
    assert min(budget for name in used for budget in spec.masks[name].budgets) == 0.001
    assert spec.digest != small.digest
    require_known(spec)
