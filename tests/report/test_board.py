"""The board: what is refused, what committed studies give, and what is shown."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fairline._io import read_json
from fairline.charts import BASE, MORE, PALETTE
from fairline.cli import app, main
from fairline.errors import FairlineError
from fairline.report.board import choose, costs_table, panels, parse_entry, read_board, table
from fairline.report.board_entries import RESULTS, add_entries, entries_of, plain
from fairline.report.board_page import method_order, panel_chart, panel_colours, series_of, write_board

PAPERS = Path(__file__).parents[2] / "papers"
BOARD = PAPERS / "board"
STUDIES = sorted(file.parent for file in (PAPERS / "results").rglob(RESULTS))
MEASURED = BOARD / "fig6_utkface_race_snl" / "race-snl-erm-1536.json"
PUBLISHED = BOARD / "published" / "das2024-figure2-half.json"


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return read_board(BOARD)


def test_the_committed_entries_are_those_of_the_committed_results():
    assert len(STUDIES) >= 13
    for folder in STUDIES:
        entries = entries_of(folder)
        committed = {f"{folder.name}/{file.name}" for file in (BOARD / folder.name).glob("*.json")}
        assert set(entries) == committed, f"fairline board --add {folder}"
        for name, entry in entries.items():
            assert plain(entry) == json.loads((BOARD / name).read_text(encoding="utf-8")), name
    assert {folder.name for folder in BOARD.iterdir()} == {folder.name for folder in STUDIES} | {"published"}


@pytest.mark.parametrize(
    ("study", "called"),
    [
        ("fig6_utkface_race_snl", lambda e: e.method.name.removeprefix("SNL, ").replace("SNL", "erm")),
        (
            "methods_equal_utkface",
            lambda e: "".join(
                (
                    "" if e.method.linearizer == "snl" else f"{e.method.linearizer}: ",
                    "" if e.method.surrogate == "identity" else f"{e.method.surrogate}, ",
                    "erm",
                )
            ),
        ),
    ],
)
def test_entries_say_what_the_committed_tables_say(board, study, called):
    """The comparison made its tables by another way."""
    rows = pd.read_csv(PAPERS / "results" / study / "race.csv")
    rows = rows[rows["measure"] == "accuracy"].set_index(["method", "percent", "group"])
    seen = 0
    for entry in choose(board, study=[study]).values():
        if entry.method.linearizer == "none":
            continue
        shares = {**entry.accuracy.groups, "overall": entry.accuracy.overall, "worst group": entry.accuracy.worst}
        for group, share in shares.items():
            row = rows.loc[(called(entry), float(f"{entry.budget.percent:.5g}"), group)]
            assert share.value == pytest.approx(row["value"], abs=2e-5)
            if len(entry.seeds) > 1 and share.low is not None:
                assert (share.low, share.high) == pytest.approx((max(0, row["low"]), min(1, row["high"])), abs=2e-5)
            seen += 1
    assert seen == 7 * (12 if study.startswith("fig6") else 29)


def test_costs_are_of_the_very_network(board):
    costs = costs_table(board).set_index(["entry", "protocol"])
    snl = costs.loc[("methods_equal_utkface/race-snl-erm-307.json", "cheetah")]
    assert (snl["seconds"], snl["megabytes"], snl["rounds"]) == pytest.approx((0.93066, 5.8778, 365))
    assert snl["compiled"]
    base = costs.loc[("methods_equal_utkface/race-base.json", "cheetah")]
    assert base["seconds"] == pytest.approx(3.00915, rel=1e-4)
    assert not base["compiled"]
    assert not [name for name, _ in costs.index if "magnitude" in name]


def changed(file: Path, change: Any) -> Any:
    content = copy.deepcopy(read_json(file))
    change(content)
    return content


def put(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *places, last = path.split(".")
        for place in places:
            content = content[place]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MEASURED, lambda c: c.pop("provenance"), "x.json: provenance: Field required."),
        (MEASURED, put("provenance.commits", []), "x.json: provenance.commits: List should have at least 1 item"),
        (MEASURED, put("provenance.command", " "), "x.json: provenance.command: String should match pattern"),
        (MEASURED, put("provenance.spec_hash", "12"), "x.json: provenance.spec_hash: String should match"),
        (MEASURED, put("provenance.date", "yesterday"), "x.json: provenance.date: "),
        (MEASURED, put("colour", "blue"), "x.json: colour: Extra inputs are not permitted."),
        (MEASURED, put("accuracy.groups.White.mean", 0.1), "x.json: accuracy.groups.White.mean: Extra inputs"),
        (MEASURED, put("accuracy.overall.value", 77.1), "x.json: accuracy.overall.value: Input should be less"),
        (MEASURED, put("accuracy.overall.value", "0.7"), "x.json: accuracy.overall.value: Input should be a valid"),
        (MEASURED, put("accuracy.overall.value", float("nan")), "x.json: accuracy.overall.value: Input should be a"),
        (MEASURED, lambda c: c["accuracy"]["overall"].pop("low"), "x.json: accuracy.overall: one limit stands"),
        (MEASURED, put("accuracy.overall.low", 0.99), "x.json: accuracy.overall: the lower limit 0.99 is above"),
        (MEASURED, put("accuracy.groups", {}), "x.json: accuracy.groups: Dictionary should have at least 1 item"),
        (MEASURED, put("accuracy.groups.overall", {"value": 0.1}), "accuracy: a group cannot be called 'overall'"),
        (MEASURED, put("budget.relus", 99999), "x.json: the entry: budget.relus are 99999, but the network has 15360"),
        (MEASURED, put("budget.percent", 50), "x.json: the entry: budget.percent is 50.0, but 1536 of 15360"),
        (MEASURED, put("seeds", []), "x.json: seeds: List should have at least 1 item"),
        (MEASURED, put("scale", ""), "x.json: scale: String should have at least 1 character"),
        (MEASURED, put("kind", "guessed"), "x.json: kind: Input tag 'guessed' found"),
        (MEASURED, lambda c: c.pop("kind"), "x.json: kind: Unable to extract tag"),
        (MEASURED, put("kind", "published"), "x.json: provenance: Extra inputs are not permitted."),
        (PUBLISHED, lambda c: c.pop("source"), "x.json: source: Field required."),
        (PUBLISHED, put("source.where", ""), "x.json: source.where: String should have at least 1 character"),
        (PUBLISHED, put("kind", "measured"), "x.json: source: Extra inputs are not permitted."),
    ],
)
def test_wrong_entries_are_refused_with_file_and_field(file, change, message):
    content = changed(file, change)
    with pytest.raises(FairlineError) as caught:
        parse_entry(content, "x.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_board_are_refused(tmp_path):
    with pytest.raises(FairlineError, match="is no folder of entries"):
        read_board(tmp_path / "nowhere")
    with pytest.raises(FairlineError, match="holds no entry"):
        read_board(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(FairlineError, match=r"a\.json is not valid JSON"):
        read_board(tmp_path)
    shutil.copy(MEASURED, tmp_path / "a.json")
    shutil.copy(MEASURED, tmp_path / "b.json")
    with pytest.raises(FairlineError, match=r"b\.json is the same result as .*a\.json"):
        read_board(tmp_path)


def test_the_command_refuses_with_a_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(changed(MEASURED, lambda c: c.pop("provenance"))))
    monkeypatch.setattr("sys.argv", ["fairline", "board", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "a.json: provenance: Field required." in said
    assert "Traceback" not in said


def test_entries_are_chosen_by_what_they_are_of(board):
    assert {e.network.architecture for e in choose(board, network=["resnet3*"]).values()} == {"resnet34"}
    assert {e.method.linearizer for e in choose(board, method=["SNL", "deepreduce"]).values()} == {"snl", "deepreduce"}
    assert {e.data.name for e in choose(board, data=["CIFAR10"]).values()} == {"cifar10"}
    assert {e.kind for e in choose(board, kind=["published"]).values()} == {"published"}
    small = choose(board, budgets=[0.02], groups=["race"], finetune=["erm"])
    assert {round(e.budget.percent) for e in small.values()} == {2}
    assert {e.budget.relus for e in choose(board, budgets=[563]).values()} == {563}
    with pytest.raises(FairlineError, match=r"The board has no method 'snail'; it has .*SNL"):
        choose(board, method=["snail"])
    with pytest.raises(FairlineError, match="No entry of the board meets all filters together"):
        choose(board, data=["cifar10"], groups=["race"])


def test_only_what_may_be_compared_shares_a_panel(board):
    found = panels(board)
    kept = {file: entry for panel in found for file, entry in panel.entries.items()}

    def network(entry):
        return entry.data, entry.network, entry.scale, entry.method, entry.budget, entry.accuracy

    # What is left out is the network of another study: base networks, and plain distillation of the same seeds.
    assert 0 < len(board) - len(kept) < len(board) / 4
    for file in set(board) - set(kept):
        assert any(network(entry) == network(board[file]) for entry in kept.values()), file
    for panel in found:
        assert len({(e.data.told, e.network.told, e.scale) for e in panel.entries.values()}) == 1
        measured = [network(e) for e in panel.entries.values() if e.kind == "measured"]
        assert all(one not in measured[:place] for place, one in enumerate(measured))
    assert len({panel.title for panel in found}) == len(found)
    # DeepReDuce and SNL of one figure stand together, over the one base network that both studies hold.
    ages = [panel for panel in found if panel.data.name == "utkface:age" and "resnet18" in panel.title]
    (both,) = [panel for panel in ages if any(e.method.linearizer == "deepreduce" for e in panel.entries.values())]
    assert {e.method.linearizer for e in both.entries.values()} == {"none", "snl", "deepreduce"}
    assert sum(e.method.linearizer == "none" for e in both.entries.values()) == 1
    assert {panel.title.partition(" by ")[0] for panel in found if "illustration" in panel.title} == {
        "illustration of Figure 2"
    }


def test_published_numbers_stand_beside_measured_ones_and_look_different():
    own = parse_entry(read_json(MEASURED), "own")
    content = changed(PUBLISHED, put("data", {"name": "utkface:race", "groups": "race"}))
    other = parse_entry({**content, "network": {"architecture": "resnet18", "width": 64}}, "other")
    (panel,) = panels({"own": own, "other": other})
    assert panel.scale == own.scale
    assert list(panel.entries) == ["own", "other"]
    drawn = panel_chart(panel, "worst", panel_colours(panel, method_order(panel.entries))).to_dict()
    (rows,) = drawn["datasets"].values()
    assert [row["published"] for row in rows] == [False, True]
    assert [row["value"] for row in rows] == [own.accuracy.worst.value, 0.88]
    marks = [layer["mark"] for layer in drawn["layer"] if layer["mark"]["type"] == "point"]
    assert [(mark["filled"], mark.get("shape")) for mark in marks] == [(True, None), (False, "diamond")]


def test_every_series_of_a_panel_has_a_colour_of_its_own(board):
    order = method_order(board)
    seen = 0
    for panel in panels(board):
        colours = panel_colours(panel, order)
        series = series_of(panel)
        assert set(series.values()) == set(colours)
        bases = {e.method.name for e in panel.entries.values() if e.method.linearizer == "none"}
        others = [colour for name, colour in colours.items() if name not in bases]
        if len(others) <= len(PALETTE) + len(MORE):
            assert len({*others, BASE}) == len(others) + 1, panel.title
        for entry in panel.entries.values():
            alike = {
                e.method.name
                for e in panel.entries.values()
                if e.method.finetune == entry.method.finetune and e.budget.percent < 100
            }
            if entry.budget.percent == 100 and entry.method.linearizer != "none" and len(alike) == 1:
                assert {series[entry.method.name]} == alike
                seen += 1
            elif entry.budget.percent < 100:
                assert series[entry.method.name] == entry.method.name
    assert seen


def test_a_method_keeps_its_colour_over_panels_where_it_can(board):
    order = method_order(board)
    plain = [colours["SNL"] for panel in panels(board) if "SNL" in (colours := panel_colours(panel, order))]
    assert len(plain) > 2
    assert len(set(plain)) == 1


def test_the_page_tables_and_figures_hold_the_entries(tmp_path):
    nasty = "</script><b>SNL"
    for place, (file, name) in enumerate([(MEASURED, nasty), (PUBLISHED, "theirs")]):
        (tmp_path / "in").mkdir(exist_ok=True)
        content = changed(file, put("method.name", name))
        (tmp_path / "in" / f"{place}.json").write_text(json.dumps(content))
    entries = read_board(tmp_path / "in")
    files = write_board(entries, tmp_path / "out")
    assert [file.name for file in files] == [
        *("board.html", "board.csv", "groups.csv", "costs.csv"),
        *("board_01.png", "board_02.png"),
    ]
    page = files[0].read_text(encoding="utf-8")
    assert nasty not in page
    assert "&lt;/script&gt;&lt;b&gt;SNL" in page
    assert "1 result of 1 study of fairline, beside numbers published by others." in page
    assert "ICML 2024, Section 4, on Figure 2" in page
    rows = pd.read_csv(files[1])
    assert rows["method"].tolist() == [nasty, "theirs"]
    assert rows["worst"].tolist() == pytest.approx(table(entries)["worst"].tolist())
    groups = pd.read_csv(files[2]).set_index(["entry", "group"])
    assert groups.loc[("1.json", "minority"), "value"] == 0.88
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[4:])


def test_the_command_adds_a_study_shows_it_and_drops_what_it_no_longer_has(tmp_path, capsys):
    results = PAPERS / "results" / "fig7_utkface_age_vgg19"
    stale = tmp_path / "fig7_utkface_age_vgg19" / "age-old-erm-1.json"
    stale.parent.mkdir()
    shutil.copy(MEASURED, stale)
    app(["board", str(tmp_path), "--add", str(results), "--method", "snl", "--budget", "10%"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "7 entries" in said
    assert "utkface:age by age · vgg19, width 8" in said
    assert "lagrangian" in said
    assert "50 %" not in said
    assert not stale.exists()
    assert len(read_board(tmp_path)) == 7


def test_masks_that_differ_in_settings_alone_are_told_apart(tmp_path):
    """By what the study calls them, in all budgets; nothing else is renamed."""
    source = PAPERS / "results" / "fig7_utkface_age_vgg19"
    shutil.copy(source / "provenance.json", tmp_path)
    rows = pd.read_parquet(source / RESULTS)
    lowest = rows[(rows["masks"] == "snl") & (rows["percent"] == rows["percent"].min())]
    pd.concat([rows, lowest.assign(masks="slow")]).to_parquet(tmp_path / RESULTS, index=False)
    before = {file: entry.method.name for file, entry in entries_of(source).items()}
    after = {file: entry.method.name for file, entry in entries_of(tmp_path).items()}
    assert {after[file] for file in set(after) - set(before)} == {"SNL (slow)", "SNL, lagrangian mu=0.167 (slow)"}
    assert {after[file] for file in before} == {"base network", "SNL (snl)", "SNL, lagrangian mu=0.167 (snl)"}


def test_results_without_a_table_or_of_another_study_are_refused(tmp_path):
    with pytest.raises(FairlineError, match=r"holds no results\.parquet; fairline study run --results writes it"):
        add_entries(tmp_path, PAPERS / "results" / "fidelity")
    source = PAPERS / "results" / "fig7_utkface_age_vgg19"
    shutil.copy(source / RESULTS, tmp_path / RESULTS)
    with pytest.raises(FairlineError, match=r"provenance\.json does not exist"):
        entries_of(tmp_path)
    shutil.copy(PAPERS / "results" / "fig7_utkface_race_vgg19" / "provenance.json", tmp_path)
    with pytest.raises(FairlineError, match=r"provenance\.json is not of the study that .* holds, 'fig7_utkface_age_"):
        entries_of(tmp_path)
