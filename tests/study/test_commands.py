"""Figures and claims by their commands, and bad input to them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.commands import fairline, ok
from tests.report.study_table import study_table


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for name, more in (("planted", {}), ("other", {"data": "utkface:age"})):
        (folder / name).mkdir()
        study_table(study=name, **more).to_parquet(folder / name / "results.parquet", index=False)
    return folder


def test_figures_from_a_folder_of_results(results, tmp_path):
    said = ok("study", "figures", results, "--to", tmp_path / "figures", "--format", "svg")
    files = {file.name for file in (tmp_path / "figures").iterdir()}
    assert files == {f"figure_{number:02d}.svg" for number in (1, 3, 4, 5, 6, 8, 9, 13, 14)}
    assert "No study here holds what figures 7, 11, 12, 15 show." in said
    said = ok("study", "figures", results, "--to", tmp_path / "one", "--study", "oth*", "--only", "5")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {f"figure_05.{f}" for f in ("png", "svg", "pdf")}


def test_claims_by_the_command_are_drawn_in_a_browser(results, tmp_path):
    said = ok("study", "report", results, "--out", tmp_path / "claims.html", "--table", tmp_path / "claims.csv")
    assert "6. The overall accuracy hardly moves. holds" in said
    assert "10. VGG-19 and WRN-22-8 behave like the ResNets. not tested" in said
    found = pd.read_csv(tmp_path / "claims.csv")
    assert set(found["verdict"]) == {"holds"}
    assert set(found["claim"]) == {1, 2, 3, 4, 5, 6, 8, 11}
    summed = pd.read_csv(tmp_path / "claims_panels.csv").set_index("claim")["pooled"]
    assert set(summed.drop(8)) == {2}
    # A minimum over groups has no mean over panels.
    assert summed[8] == 0
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium to open the page with")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    page = (tmp_path / "claims.html").resolve().as_uri()
    drawn = subprocess.run([*command, page], capture_output=True, text=True, check=True, timeout=120).stdout
    # Nine figures; a forest of each claim that is tested, and of the first in points.
    assert drawn.count('version="1.1" class="marks"') == 9 + 8 + 1
    assert ">This figure could not be drawn" not in drawn


def test_two_scales_of_a_study_are_not_mixed(results, tmp_path, refused):
    other = tmp_path / "medium"
    other.mkdir()
    study_table(slope=-4).assign(spec_hash="fedcba9876543210").to_parquet(other / "results.parquet", index=False)
    told = refused("study", "report", results, other, "--out", tmp_path / "claims.html")
    assert "Study 'planted' is there with specs 0123456789abcdef and fedcba9876543210, such as two scales" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["figures", "{results}", "--to", "x", "--study", "nobody"],
            "There is no study 'nobody' here; there are other, planted.",
        ),
        (["figures", "{results}", "--to", "x", "--only", "2"], "The paper has no empirical figure 2"),
        (["figures", "{results}", "--to", "x", "--only", "one"], "Figures 'one' are not whole numbers"),
        (["figures", "{results}", "--to", "x", "--only", "7"], "No study here holds what figure 7 shows."),
        (["figures", "{results}", "--to", "x", "--format", "gif"], "The format is png, svg or pdf, not 'gif'."),
        (["report", "nowhere", "--out", "x.html"], "nowhere holds no results of a study"),
        (["status", "nowhere"], "nowhere holds no study"),
        (["run", "nowhere.yaml", "--out", "x"], "nowhere.yaml cannot be read"),
        (["run", "{spec}", "--out", "x", "--jobs", "0"], "A study needs one job at least, not 0."),
        (["run", "{spec}", "--out", "nosuch://bucket"], "nosuch://bucket cannot be used as a store: "),
        (["run", "{spec}", "--out", "x", "--ray", "127.0.0.1:1"], "No Ray cluster at '127.0.0.1:1': "),
    ],
)
def test_bad_input_is_one_sentence(results, tmp_path, arguments, words):
    if "--ray" in arguments:
        pytest.importorskip("ray")
    spec = Path(__file__).parent / "digits.yaml"
    done = fairline("study", *(text.format(results=results, spec=spec) for text in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
