"""What pages say of networks, on constructed predictions: no sentence contradicts another."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fairline.audit.cells import cells
from fairline.audit.paired import images_needed
from fairline.audit.verdict import CANNOT_TELL, MAY, MAY_NOT, verdict
from fairline.cli import console
from fairline.errors import FairlineError
from fairline.report import cost_parts, costs
from fairline.report import verdict as told
from fairline.report.html import judged, write_report

from .lesions import CONTROL, LESIONS, images, lesions_frontier, lesions_run


def text_of(page) -> str:
    """What a reader sees."""
    body = re.sub(r"<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    return lesions_run(tmp_path_factory.mktemp("lesions") / "audit")


def test_a_network_that_loses_half_of_the_melanomas_may_not_ship(lesions):
    """Overall and in every group it gains; the control, finetuned alike, loses the melanomas too."""
    _, found = judged(lesions)
    network, control = found
    cells_ = network.verdict.cells
    assert (cells_.loc[cells_["kind"].isin(["overall", "group"]), "change"] > 0).all()
    assert (network.answer, control.answer) == (MAY_NOT, MAY_NOT)
    text = text_of(write_report(lesions.folder))
    assert "No network may ship within 5 points" in text
    assert "class “melanoma” (48 to 25 of 123 images right)" in text
    assert "It is mostly the finetune, not the ReLUs: with all ReLUs kept and finetuned alike, class “melanoma”" in text
    assert (
        "it saves on cheetah 76 % of the seconds over a LAN, 76 % of the seconds over a WAN and 76 % of the bytes"
        in text
    )
    assert "balanced accuracy loses" in text
    # The rule itself is on the page, once; nothing else recommends.
    before, rule, after = text.partition("A network may not ship if a group")
    assert rule
    rest = before + after.partition("“Whose”")[2]
    assert not re.search(
        r"no group (and no class |or class )?loses|\bmay ship\b", rest.replace("No network may ship", ""), re.I
    )
    assert text.count(network.name) >= 3


def test_the_terminal_says_the_same_within_80_columns(lesions, monkeypatch):
    monkeypatch.setattr(console.out_console, "width", 80)
    with console.out_console.capture() as captured:
        console.print_audit(lesions)
    said = captured.get()
    assert max(map(len, said.splitlines())) <= 80
    _, found = judged(lesions)
    words = re.sub(r"\s+", " ", said)
    assert told.headline(found) in words
    assert found[0].control_told() in words
    assert "may not ship" in said


def test_the_frontier_says_what_the_report_says(lesions, tmp_path):
    frontier = lesions_frontier(tmp_path / "frontier", lesions)
    _, found = judged(lesions)
    table, priced = costs.judged(frontier)
    assert [each.control_told() for each in priced] == [each.control_told() for each in found]
    assert [each.reason() for each in priced] == [each.reason() for each in found]
    said = " ".join(costs.answers(frontier))
    assert told.headline(found) in said
    assert found[0].control_told() in said
    text = text_of(costs.write_frontier(frontier.folder))
    assert told.headline(found) in text
    assert found[0].control_told() in text
    # One name for a network; folders are the author's own.
    assert "students/" not in text
    bars = cost_parts.parts_charts(costs.by_name(table))["cost_parts_cheetah_bytes"].to_dict()
    drawn = {row["model"] for rows in bars["datasets"].values() for row in rows}
    assert drawn == {"base network", *(each.name for each in found)}
    assert table["name"].tolist() == ["base network", *(each.name for each in found)]


def test_a_critical_class_may_not_lose_at_all(lesions, tmp_path):
    slight = [(*row[:4], 0, 40) if row[1] == "nevus" else (*row[:4], 0, 0) for row in LESIONS]
    slight = [(*row[:4], 3, 0) if row[:2] == ("≥60", "melanoma") else row for row in slight]
    run = lesions_run(tmp_path / "audit", lesions=slight, control=[])
    answers = [judged(run, within, critical)[1][0].answer for within, critical in ((20, ()), (20, ["melanoma"]))]
    assert answers[0] == MAY
    assert answers[1] != MAY
    text = text_of(write_report(run.folder, within=20, critical=["melanoma"]))
    assert "critical: melanoma" in text
    with pytest.raises(FairlineError, match="no class 'naevus'"):
        write_report(run.folder, critical=["naevus"])


def test_weights_from_a_file_may_have_seen_the_test_images(lesions, tmp_path):
    run = lesions_run(tmp_path / "audit", weights="mine.pth")
    text = text_of(write_report(run.folder))
    assert "weights came from a file (mine.pth). They may have seen" in text
    assert "was not used to train" not in text
    other = text_of(write_report(lesions.folder))
    assert "mine.pth" not in other
    assert "The test part was not used to train" in other


def candidate(*counted, within: float = 5.0, critical: Sequence[str] = (), **others) -> told.Candidate:
    about = {"model": "m", "variant": "SNL", "budget": "5 %", "relus": 500, "percent": 5.0}
    return told.Candidate(**about | others, verdict=verdict(list(counted), within, critical))


def counted(*sets):
    return cells(images(sets, "students/budget-500"))


def test_what_gains_at_worst_may_ship_and_is_not_said_to_lose():
    found = [candidate(counted(("a", "x", 4000, 2000, 0, 90), ("b", "y", 4000, 2000, 0, 70)))]
    assert found[0].answer == MAY
    said = told.headline(found)
    assert "even the one that does worst loses nothing: group “b” gains 1.8 points" in said
    assert not re.search(r"\bloses \d", said)
    assert found[0].whose_told() == "no control"


def test_few_images_cannot_tell_and_say_how_many_would():
    found = [candidate(counted(("a", "x", 60, 50, 3, 1), ("b", "y", 5000, 4000, 9, 9)))]
    assert found[0].answer == CANNOT_TELL
    said = told.headline(found)
    assert said.startswith("Of no network is it sure that it keeps every group and class within 5 points")
    assert re.search(r"About [\d,]+ images of it would tell", said)
    assert "may ship" not in said


def test_two_seeds_are_the_unit_and_say_so():
    seeds = [counted(("a", "x", 500, 400, lost, 2), ("b", "y", 500, 400, lost // 4, 5)) for lost in (20, 30)]
    found = candidate(*seeds)
    assert found.answer == CANNOT_TELL
    assert "over 2 seeds" in found.reason()
    assert "seeds would tell" in found.reason()
    assert "2 seeds, Student’s t" in found.sure_told()
    assert "one network" not in found.sure_told()


def test_seeds_that_agree_wholly_have_no_limits_to_print():
    seeds = [counted(("a", "x", 500, 400, 20, 2), ("b", "y", 500, 400, 5, 5))] * 2
    found = candidate(*seeds)
    assert found.answer == CANNOT_TELL
    assert "More seeds would tell" in found.reason()
    assert "nan" not in " ".join([found.reason(), found.overall_told(), found.sure_told(), told.headline([found])])


def test_a_network_without_a_base_cannot_be_told(lesions, tmp_path):
    run = lesions_run(tmp_path / "audit")
    for name in ("predictions", "audit"):
        table = pd.read_parquet(run.folder / f"{name}.parquet")
        table = table[table["model"] != "base"].drop(columns="reference_correct", errors="ignore")
        table.to_parquet(run.folder / f"{name}.parquet")
    text = text_of(write_report(run.folder))
    assert "There is no base network to compare with" in text
    assert "may ship" not in text.lower()


def test_an_audit_without_class_rows_has_a_page(tmp_path):
    """As those of earlier versions."""
    run = lesions_run(tmp_path / "audit")
    table = pd.read_parquet(run.folder / "audit.parquet")
    table[table["measure"] != "recall"].drop(columns="class").to_parquet(run.folder / "audit.parquet")
    (run.folder / "costs.parquet").unlink()
    text = text_of(write_report(run.folder))
    assert "what a private inference then costs was not asked" in text
    assert "WAN seconds saved" not in text


sets = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 400), *[st.floats(0, 1)] * 3),
    min_size=2,
    max_size=4,
    unique_by=lambda row: row[:2],
)


def whole(row):
    """Shares as counts."""
    group, label, n, before, lost, gained = row
    right = round(before * n)
    return group, label, n, right, round(lost * right), round(gained * (n - right))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(sets, sets, st.floats(0, 30))
def test_sentences_agree_with_the_answer(first, second, within):
    found = []
    for i, rows in enumerate((first, second)):
        found.append(candidate(counted(*map(whole, rows)), within=within, model=str(i), budget=f"{i} %", relus=i))
    chosen = told.focus(found)
    assert chosen is not None
    top, said = told.answer_told(found), told.headline(found)
    answers = {each.answer for each in found}
    assert (chosen.answer == MAY) == (MAY in answers) == (": may ship" in top) == (" may ship: " in said)
    assert (top.startswith("No network may ship")) == (answers == {MAY_NOT})
    assert top.startswith("Of no network is it sure") == (MAY not in answers and CANNOT_TELL in answers)
    for each in found:
        reason, change = each.reason(), float(each.verdict.decisive["change"])
        assert ("no group and no class loses more" in reason) == (each.answer == MAY)
        assert ("beyond chance" in reason or "named critical" in reason) == (each.answer == MAY_NOT)
        first_words = re.search(r"(loses|gains) ([\d.]+) points|stays the same", reason)
        assert first_words is not None
        if first_words[1]:
            assert (first_words[1] == "loses") == (change < 0)
        if each.answer == MAY:
            kept = each.verdict.cells
            kept = kept[kept["kind"].isin(["group", "class"])]
            assume(len(kept) > 0)
            assert (kept["low"] >= -within).all()
        assert "nan" not in " ".join([reason, each.overall_told(), each.sure_told(), each.control_told()])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(sets, st.floats(0, 30), st.sets(st.sampled_from("xy"), min_size=1))
def test_a_critical_class_is_refused_in_words_of_its_own(rows, within, critical):
    """What is said to be beyond chance after Holm's correction is; a critical class may be refused without."""
    assume(critical <= {row[1] for row in rows})
    each = candidate(counted(*map(whole, rows)), within=within, critical=sorted(critical))
    cells, reason = each.verdict.cells, each.reason()
    surely = cells[(cells["flag"] == "loss") & (cells["change"] < -within)]
    is_sure = each.verdict.decisive.name in surely.index
    assert ("Holm" in reason) == (each.answer == MAY_NOT and is_sure)
    assert bool(re.search(r"So do(es)? ", reason)) == ("Holm" in reason and len(surely) > 1)
    refused = cells[cells["beyond"] & ~cells.index.isin(surely.index)]
    assert refused["critical"].all()
    assert bool(re.search(r"w(as|ere) named critical and may not fall", reason)) == (
        "Holm" in reason and len(refused) > 0
    )
    assert ("its recall may not fall" in reason) == (each.answer == MAY_NOT and not is_sure)


def test_images_of_a_critical_class_that_would_tell():
    """Of 100 images 3 were lost and 1 gained: any loss is asked about, not one of 5 points."""
    rows = [("a", "x", 100, 90, 3, 1), ("b", "y", 5000, 4000, 9, 9)]
    needed = {}
    for critical in ((), ("x",)):
        each = candidate(counted(*rows), critical=critical)
        cells = each.verdict.cells
        needed[critical] = float(cells.loc[(cells["class"] == "x") & (cells["kind"] != "cell"), "needed"].iloc[0])
    assert needed["x",] == pytest.approx(images_needed(3, 1, 100, 0))
    assert needed["x",] > needed[()]


def test_a_control_whose_seeds_agree_is_not_told_for_sure():
    control = told.Control("control", 0.0, -10.0, math.nan, math.nan)
    each = candidate(counted(("a", "x", 1000, 800, 100, 0), ("b", "y", 1000, 800, 0, 0)), control=control)
    assert "all seeds agree, so there are no limits, and it may be chance" in each.control_told()


def test_what_the_control_explains():
    def of(change: float, whole_change: float) -> str:
        lost = round(-change * 10)
        control = told.Control("control", whole_change, change - whole_change, -20, -0.1)
        return candidate(
            counted(("a", "x", 1000, 800, lost, 0), ("b", "y", 1000, 800, 0, 0)), control=control
        ).whose_told()

    assert [of(-12, -11), of(-12, -6), of(-12, -1), of(-12, 3)] == ["finetune", "both", "ReLUs", "ReLUs"]


def test_the_lesions_are_as_they_are_told():
    for rows in (LESIONS, CONTROL):
        melanoma = [row for row in rows if row[1] == "melanoma"]
        assert sum(row[2] for row in melanoma) == 123
        assert sum(row[3] for row in melanoma) == 48
        assert np.sign([row[5] - row[4] for row in melanoma]).tolist() == [-1] * 3
    assert sum(row[4] for row in LESIONS if row[1] == "melanoma") == 23
