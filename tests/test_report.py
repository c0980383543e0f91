from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.data.grouped import OVERALL
from fairline.report import explanations, figures
from fairline.report.html import warnings, write_report
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


def unfolded(page: Path, folder: Path) -> Path:
    """The page with everything open."""
    text = page.read_text(encoding="utf-8")
    script = text.index("</script>")
    body = re.sub(r"<details( class=\"inner\")?>", "<details open>", text[script:])
    (folder / "unfolded.html").write_text(text[:script] + body, encoding="utf-8")
    return folder / "unfolded.html"


@pytest.fixture(scope="session")
def page(runs) -> Path:
    return runs / "audit" / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_every_figure_is_drawn_in_a_browser_without_a_network(runs, page, tmp_path):
    document = browser("--dump-dom", unfolded(page, tmp_path).as_uri(), profile=tmp_path / "profile")
    # Two variants (finetuned and not), three figures each.
    assert len(re.findall(r'<svg[^>]*class="marks"', document)) == 6
    drawn = re.sub(r"<script.*?</script>", "", document, flags=re.S)
    assert "could not be drawn" not in drawn
    # Of each variant: accuracy and change of ten groups and all, at three budgets, and accuracy of the base network;
    # and three lines of four networks.
    assert drawn.count('aria-roledescription="point"') == 2 * (11 * 4 + 11 * 3 + 3 * 4)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_folded_figure_is_drawn_when_it_is_opened(page, tmp_path):
    drawn = browser("--dump-dom", page.as_uri(), profile=tmp_path / "profile")
    assert len(re.findall(r'<svg[^>]*class="marks"', drawn)) == 3


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_page(explained, tmp_path, width):
    """Measured in a frame: a window of Chromium is 500 pixels wide at least."""
    unfolded(explained / "report.html", tmp_path)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<iframe src="unfolded.html" width="{width}" height="900"></iframe><script>
        addEventListener("load", () => setTimeout(() => {{
          const page = document.querySelector("iframe").contentDocument;
          const all = [...page.querySelectorAll("html, section, .chart")];
          const wide = all.filter(each => each.scrollWidth > each.clientWidth);
          const named = wide.map(each => each.id || each.textContent.slice(0, 60));
          document.body.innerHTML = `<pre>${{named.join("; ")}}</pre>`;
        }}, 4000));</script>""",
        encoding="utf-8",
    )
    document = browser("--allow-file-access-from-files", "--dump-dom", frame.as_uri(), profile=tmp_path / "profile")
    assert re.search(r"<pre>(.*?)</pre>", document, re.S)[1] == ""


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
    for phrase in ("Who pays", "What the numbers mean", "Settings", "bootstrap", "split seed", "lam", "Holm"):
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


def test_small_groups_are_warned_of(runs):
    found = warnings(figures.prepare(audit_rows(VALUES), COUNTS), Run.read(runs / "audit"))
    assert "Fewer than 30 images in the test part, too few to judge: “few” (20). " in found[0]
    assert not any("many" in warning for warning in found)
    assert len(found) == 1


def test_missed_budgets_are_warned_of(runs):
    rows = audit_rows(VALUES)
    rows["reached"] = rows["relus"] == 1000
    found = warnings(figures.prepare(rows, COUNTS), Run.read(runs / "audit"))
    assert any("Mask learning ended before it reached 10 % of the ReLUs" in warning for warning in found)


def test_figures_hold_the_rows_they_were_given():
    frame = figures.prepare(audit_rows(VALUES), COUNTS)
    made = figures.figures(frame)
    assert [name.partition("_snl")[0] for name in made] == ["accuracy_by_group", "accuracy_by_budget"]
    spec = made["accuracy_by_group_snl___finetune__erm"].to_dict()
    rows = [row for data in spec["datasets"].values() for row in data if row.get("measure") == "accuracy"]
    assert {(row["group"], row["network"], row["value"]) for row in rows} == {
        (group, "base network" if share == 1 else "10 %", value) for (group, share), (value, _) in VALUES.items()
    }
    # All, then the majority first.
    assert '"sort": ["all images (920)", "many (900)", "few (20)"]' in json.dumps(spec)
    assert figures.group_order(frame) == ["many", "few"]


def test_groups_that_have_an_order_of_their_own_stand_in_it():
    words = {"many": "over 60", "few": "under 20"}
    rows = audit_rows(VALUES).replace({"group": words})
    assert figures.group_order(figures.prepare(rows, COUNTS.replace({"group": words}))) == ["under 20", "over 60"]


def test_the_base_network_stands_beside_a_control():
    control = {(group, 0.9999): value for (group, share), value in VALUES.items() if share == 1}
    rows = audit_rows({**VALUES, **control})
    rows.loc[rows["model"] == "r0.9999", "relus"] = 1000
    frame = figures.prepare(rows, COUNTS)
    (variant,) = figures.main_variants(frame)
    assert figures.network_order(figures.beside(frame, variant)) == ["base network", "100 %", "10 %"]
    # Of another method than the one that it is a control of, too.
    rows.loc[rows["model"] == "r0.9999", "method"] = "random"
    frame = figures.prepare(rows, COUNTS)
    assert figures.network_order(figures.beside(frame, variant)) == ["base network", "100 %", "10 %"]


def test_networks_with_as_many_relus_have_names_of_their_own():
    other = audit_rows({**VALUES, ("many", 0.1): (0.7, 900)}).query("stage != 'base'").assign(model="b/r0.1")
    frame = figures.prepare(pd.concat([audit_rows(VALUES).replace({"model": {"r0.1": "a/r0.1"}}), other]), COUNTS)
    assert figures.main_variants(frame) == ["SNL + finetune (erm) · a", "SNL + finetune (erm) · b"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 50), st.floats(0, 50)), min_size=1), st.floats(1, 100))
def test_a_shared_axis_holds_every_interval_and_its_least_span(rows, least):
    table = pd.DataFrame([(v, max(v - a, -100), min(v + b, 100)) for v, a, b in rows], columns=["value", "low", "high"])
    low, high = figures.span(table, least, whole=(-100, 100), keep=(0,))
    assert -100 <= low <= min(0, table["low"].min())
    assert max(0, table["high"].max()) <= high <= 100
    assert high - low >= least - 1e-9


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
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "There is no linearized network to judge" in body
    assert "Relative accuracy drop" not in body
    assert "Each network" not in body


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
        "accuracy_against_groups_margin",
        "accuracy_against_samples_margin",
        "parameter_distance_by_layer",
        "corrections_by_group",
        "corrections_by_layer",
    ):
        assert any(name.startswith(start) for name in names), start
    written = {file.stem for file in (explained.parent / "explained_figures").glob("*.png")}
    assert written == set(names)
    if CHROMIUM is not None:
        document = browser("--dump-dom", unfolded(explained / "report.html", tmp_path).as_uri(), profile=tmp_path / "p")
        drawn = re.sub(r"<script.*?</script>", "", document, flags=re.S)
        assert "could not be drawn" not in drawn
        assert len(re.findall(r'<svg[^>]*class="marks"', drawn)) == len(names)
        assert "rank correlation" in drawn
    assert re.search(r"rank correlation [+−]0\.\d+ over 10 groups, permutation p = ", body)


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
