from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fairline.data.grouped import OVERALL
from fairline.report import explanations, figures
from fairline.report.html import headline, warnings, write_report
from fairline.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browser(*arguments: str | Path, profile: Path) -> str:
    """Headless Chromium without a network."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=10000",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *flags, f"--user-data-dir={profile}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def page(runs) -> Path:
    return runs / "audit" / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_every_figure_is_drawn_in_a_browser_without_a_network(runs, page, tmp_path):
    document = browser("--dump-dom", page.as_uri(), profile=tmp_path / "profile")
    # Two variants (finetuned and not), three figures each.
    assert len(re.findall(r'<svg[^>]*class="marks"', document)) == 6
    assert "could not be drawn" not in re.sub(r"<script.*?</script>", "", document, flags=re.S)
    drawn = re.sub(r"<script.*?</script>", "", document, flags=re.S)
    # Accuracy at three budgets and of the base network for each variant, and every drop that is defined.
    table = pd.read_parquet(runs / "audit" / "audit.parquet")
    drops = table[(table["measure"] == "relative_drop") & (table["group"] != OVERALL)]["value"]
    assert drawn.count('aria-roledescription="bar"') == 2 * 10 * 4 + drops.notna().sum()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_screenshot_is_not_empty(page, tmp_path):
    from PIL import Image

    shot = tmp_path / "page.png"
    browser("--window-size=1140,1600", f"--screenshot={shot}", page.as_uri(), profile=tmp_path / "profile")
    with Image.open(shot) as picture:
        colours = picture.convert("RGB").resize((114, 160)).getcolors(maxcolors=1 << 16)
    assert len(colours) > 50


def test_the_page_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r'(src|href)\s*=\s*"', outside)
    assert "vegaEmbed" in text


def test_the_page_says_the_numbers_of_the_table(runs, page):
    table = pd.read_parquet(runs / "audit" / "audit.parquet")
    text = html.unescape(page.read_text(encoding="utf-8"))
    accuracy = table[table["measure"] == "accuracy"]
    for value, low, high in accuracy[["value", "low", "high"]].to_numpy():
        assert f"{value:.1%}" in text
        assert f"{low:.1%} – {high:.1%}" in text
    for phrase in ("Who pays", "What the numbers mean", "Settings", "bootstrap", "split seed", "lam"):
        assert phrase in text
    assert "fewer than 100 images" in text
    # SNL may not reach 20 of 448 ReLUs in twelve epochs; then the log and the page say so.
    assert ("Mask learning ended before" in text) == ("keeps the largest" in (runs / "snl/log.txt").read_text())


def audit_rows(values: dict[tuple[str, float], tuple[float, int]]) -> pd.DataFrame:
    """Accuracy rows of a base network (fraction 1) and of finetuned cuts."""
    rows = []
    for (group, fraction), (accuracy, n) in values.items():
        base = fraction == 1
        rows.append(
            {
                "model": f"r{fraction}",
                "split": "test",
                "group": group,
                "measure": "accuracy",
                "value": accuracy,
                "low": accuracy - 0.05,
                "high": accuracy + 0.05,
                "n": n,
                "stage": "base" if base else "finetuned",
                "method": "" if base else "snl",
                "objective": "" if base else "erm",
                "relus": round(1000 * fraction),
                "total_relus": 1000,
                "seed": 0,
                "reached": True,
            }
        )
        if not base:
            before = values[group, 1.0][0]
            drop = (before - accuracy) / before * 100
            rows.append({**rows[-1], "measure": "relative_drop", "value": drop, "low": drop - 3, "high": drop + 3})
    return pd.DataFrame(rows)


VALUES = {
    ("many", 1.0): (0.9, 900),
    ("few", 1.0): (0.8, 20),
    (OVERALL, 1.0): (0.89, 920),
    ("many", 0.1): (0.89, 900),
    ("few", 0.1): (0.4, 20),
    (OVERALL, 0.1): (0.87, 920),
}
COUNTS = pd.DataFrame({"group": ["few", "many"], "n": [80, 3600], "part": "train"})


def test_the_headline_names_who_pays():
    (sentence,) = headline(figures.prepare(audit_rows(VALUES), COUNTS))
    assert "10 % of the ReLUs" in sentence
    assert "from 89.0% to 87.0%" in sentence
    assert (
        "Group “few” loses 50.0 % of its accuracy (80.0% to 40.0%; 95 % interval of the loss 47.0 to 53.0 %)"
        in sentence
    )
    assert "“many” loses 1.1 % (90.0% to 89.0%)" in sentence
    gain = {**VALUES, ("many", 0.1): (0.91, 900), ("few", 0.1): (0.79, 20)}
    (sentence,) = headline(figures.prepare(audit_rows(gain), COUNTS))
    assert "which includes no loss" in sentence
    assert "“many” gains 1.1 %" in sentence
    (sentence,) = headline(figures.prepare(audit_rows({**gain, ("few", 0.1): (0.84, 20)}), COUNTS))
    assert "No group loses: even “many” gains 1.1 %" in sentence


def test_small_groups_are_warned_of(runs):
    found = warnings(figures.prepare(audit_rows(VALUES), COUNTS), Run.read(runs / "audit"))
    assert "Too small to judge: “few” (20)" in found[0]
    assert not any("many" in warning for warning in found)
    assert len(found) == 1


def test_an_undertrained_base_and_missed_budgets_are_warned_of(runs):
    better = {**VALUES, (OVERALL, 0.1): (0.95, 920)}
    rows = audit_rows(better)
    rows["reached"] = rows["relus"] == 1000
    found = warnings(figures.prepare(rows, COUNTS), Run.read(runs / "audit"))
    assert any("Mask learning ended before it reached 10 % of the ReLUs" in warning for warning in found)
    assert any("not trained to its best" in warning for warning in found)


def test_a_group_that_was_hardly_ever_right_is_no_headline(runs):
    values = {**VALUES, ("few", 1.0): (0.1, 20), ("few", 0.1): (0.0, 20)}
    frame = figures.prepare(audit_rows(values), COUNTS)
    (sentence,) = headline(frame)
    assert "“few”" not in sentence
    assert sentence.count("“many” loses 1.1 %") == 1
    found = warnings(frame, Run.read(runs / "audit"))
    assert any("right on fewer than 10 images of “few” (2)" in warning for warning in found)
    # A low accuracy over many images is a finding, not noise.
    values = {**VALUES, ("few", 1.0): (0.1, 300), ("few", 0.1): (0.05, 300)}
    (sentence,) = headline(figures.prepare(audit_rows(values), COUNTS))
    assert "Group “few” loses 50.0 %" in sentence


def test_figures_hold_the_rows_they_were_given():
    frame = figures.prepare(audit_rows(VALUES), COUNTS)
    made = figures.figures(frame)
    assert [name.partition("_snl")[0] for name in made] == ["accuracy_by_group", "drop_by_group", "accuracy_by_budget"]
    spec = made["accuracy_by_group_snl___finetune__erm"].to_dict()
    text = json.dumps(spec)
    rows = [row for data in spec["datasets"].values() for row in data if row.get("measure") == "accuracy"]
    assert {(row["group"], row["value"]) for row in rows} == {("many", 0.9), ("few", 0.8), ("many", 0.89), ("few", 0.4)}
    # Majority first.
    assert '"sort": ["many", "few"]' in text
    assert figures.group_order(frame) == ["many", "few"]


@pytest.mark.parametrize(
    ("percents", "labels"),
    [
        ([100.0, 50.0, 9.988, 2.009], ["100 %", "50 %", "10 %", "2 %"]),
        ([12.31, 12.44], ["12.3 %", "12.4 %"]),
        ([0.0, 0.123], ["0 %", "0.12 %"]),
    ],
)
def test_budget_labels_are_as_short_as_they_can_be(percents, labels):
    assert list(figures.budget_labels(percents).values()) == labels


def test_a_base_network_alone_has_a_report(runs, tmp_path):
    from fairline.jobs import audit_job

    run = audit_job([runs / "base"], tmp_path / "audit", resamples=50, device="cpu")
    text = write_report(run.folder, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The base network is right on" in text
    assert "Relative accuracy drop" not in text


def test_the_explaining_panels_are_drawn(explained, tmp_path):
    text = (explained / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    for words in (
        "Why they pay",
        "Do minorities live on the corrections?",
        "Do the groups’ gradients balance?",
        "Theorem 4.4 beside what it bounds",
    ):
        assert words in body
    assert "Proposition 4.5 beside" not in body  # ten classes
    assert "Why a group pays (audit with --explain)" not in body
    names = re.findall(r'<div class="chart" id="([^"]+)"', body)
    for start in (
        "gradient_norm_by_group",
        "hessian_max_by_group",
        "margin_by_group",
        "boundary_distance_by_group",
        "parameter_distance",
        "accuracy_against_groups",
        "accuracy_against_samples",
        "corrections_by_group",
        "corrections_by_layer",
    ):
        assert any(name.startswith(start) for name in names), start
    written = {file.stem for file in (explained.parent / "explained_figures").glob("*.png")}
    assert written == set(names)
    if CHROMIUM is not None:
        document = browser("--dump-dom", (explained / "report.html").as_uri(), profile=tmp_path / "profile")
        drawn = re.sub(r"<script.*?</script>", "", document, flags=re.S)
        assert "could not be drawn" not in drawn
        assert len(re.findall(r'<svg[^>]*class="marks"', drawn)) == len(names)
        assert "rank correlation" in drawn


def test_tables_of_the_explaining_panels_hold_the_numbers(explained):
    frame = figures.prepare(pd.read_parquet(explained / "audit.parquet"), pd.read_parquet(explained / "counts.parquet"))
    (variant,) = figures.main_variants(frame)
    table = pd.DataFrame(explanations.bound_table(frame, variant))
    assert len(table) == 3 * 10
    row = table.iloc[-1]
    own = frame[(frame["budget"] == row["budget"]) & (frame["group"] == row["group"])].set_index("measure")["value"]
    assert float(row["excess"]) == pytest.approx(own["excess_loss"], abs=5e-4)
    assert float(row["bound"].replace(",", "")) == pytest.approx(own["bound"], rel=5e-3)
    assert row["holds"] == ("yes" if own["bound_holds"] else "no")
    balance = explanations.balance_table(frame)
    assert len(balance["rows"]) == 10
    assert len(balance["columns"]) == len(balance["residuals"]) == 4
    shares = [int(re.search(r"\((\d+)%\)", row["cells"][0])[1]) for row in balance["rows"]]
    assert abs(sum(shares) - 100) <= 5
    assert explanations.binary_table(frame) == []


def test_an_audit_of_accuracy_alone_has_no_explaining_panels(runs, page):
    assert "Why they pay" not in page.read_text(encoding="utf-8")


def test_explaining_warnings():
    rows = [
        ("a", "hessian_converged", 0.0, 5),
        ("b", "hessian_converged", 1.0, 5),
        (OVERALL, "boundary_distance_missed", 3.0, 9),
    ]
    frame = pd.DataFrame(rows, columns=["group", "measure", "value", "n"]).assign(budget="2 %")
    curvature, boundary = explanations.warnings(frame)
    assert "“a” at 2 %" in curvature
    assert "“b”" not in curvature
    assert "3 of 9 images" in boundary
    assert explanations.warnings(frame[frame["group"] == "b"]) == []


def test_a_binary_network_has_the_table_of_proposition_4_5():
    rows = [
        ("a", "z1", 2.0),
        ("a", "z2", 1.0),
        ("a", "z_bound", 3.0),
        ("a", "z_bound_holds", 1.0),
        ("a", "z_bound_looseness", 1.5),
        ("a", "z2_printed", 0.5),
    ]
    frame = pd.DataFrame(rows, columns=["group", "measure", "value"]).assign(
        variant="base network", budget="100 %", train_n=4
    )
    (row,) = explanations.binary_table(frame)
    assert row == {
        "network": "base network, 100 %",
        "group": "a",
        "z1": "2",
        "z2": "1",
        "bound": "3",
        "largest": "2",
        "holds": "yes",
        "printed": "0.5",
    }


def test_bins_of_equal_size_by_hand():
    values = pd.DataFrame(
        {"margin": [0.5, 0.1, 0.4, 0.2, 0.3, 0.6], "correct": [True, False, True, False, True, False]}
    )
    bins = explanations.equal_bins(values, "margin", 3)
    assert bins["x"].tolist() == pytest.approx([0.15, 0.35, 0.55])
    assert bins["accuracy"].tolist() == [0, 1, 0.5]
    assert bins["n"].tolist() == [2, 2, 2]
    assert (bins["low"] <= bins["accuracy"]).all()
    assert (bins["accuracy"] <= bins["high"]).all()
