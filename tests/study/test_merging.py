"""Results of one study from several machines are those of one, or are refused."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from fairline.report.claims import findings
from fairline.report.merging import merge_results
from fairline.report.moved_prior import MOVED, SHIFTED
from fairline.report.results import write_study_results
from fairline.study.cells import cells_of
from fairline.study.run import run_study
from fairline.study.spec import load_spec
from fairline.study.storage import Storage
from fairline.study.store import finished_seeds, read_by_seed, read_results

SPEC = Path(__file__).parent / "digits.yaml"
NAME = "digits_tiny"
WHEN_AND_WHERE = ["commit", "device", "versions", "started"]


class Here:
    """Runs each cell where it is asked to; starting processes takes longer than these."""

    slots = 1

    def submit(self, work, cell) -> Future[str]:
        done: Future[str] = Future()
        done.set_result(work(cell))
        return done

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> Path:
    """Each seed's results for itself, as of two machines, and those of both."""
    folder = tmp_path_factory.mktemp("shares")
    # Numbers are compared, whatever they are.
    (folder / "digits.yaml").write_text(re.sub(r"epochs: \d", "epochs: 1", SPEC.read_text()))
    spec = load_spec(folder / "digits.yaml")
    store = folder / "out"
    run_study(spec, store, seeds={NAME: [0]}, executor=Here())
    assert finished_seeds(spec, Storage(str(store))) == [0]
    write_study_results(spec, store, folder / "0", [0])
    run_study(spec, store, executor=Here())
    write_study_results(spec, store, folder / "whole")
    run_study(spec, store, seeds={NAME: [1]}, executor=Here())
    write_study_results(spec, store, folder / "1", [1])
    return folder


@pytest.fixture
def parts(shares, tmp_path) -> list[Path]:
    """The results of each machine, to be spoiled."""
    for name in "01":
        shutil.copytree(shares / name / NAME, tmp_path / name)
    return [tmp_path / name for name in "01"]


def test_a_seed_at_a_time_gives_what_the_study_gives(shares, parts, tmp_path, run_here):
    done = run_here("study", "merge", *parts, "--to", tmp_path / "merged")
    assert "Results of 2 of 2 seeds (0, 1)" in done.stdout
    merged, whole = tmp_path / "merged" / NAME, shares / "whole" / NAME
    own, expected = (read_results([folder]) for folder in (merged, whole))
    assert_frame_equal(own.drop(columns=WHEN_AND_WHERE), expected.drop(columns=WHEN_AND_WHERE))
    assert len(findings(own))
    told = [findings(table, read_by_seed([folder], [NAME])) for table, folder in ((own, merged), (expected, whole))]
    assert_frame_equal(*told)
    assert {MOVED, SHIFTED} <= set(told[0]["variant"])
    table, compared = (pd.read_csv(folder / "digits.csv", keep_default_na=False) for folder in (merged, whole))
    assert list(table) == list(compared)
    numbers = ["value", "low", "high"]
    for each in (table, compared):
        each[numbers] = each[numbers].astype(float)
    # Written with five digits, of which rounding may move the last.
    assert_frame_equal(table, compared, rtol=2e-4, atol=1e-9)
    assert set(table["replicates"]) == {2}
    line, expected_line = ((folder / "digits_null_front.csv").read_text() for folder in (merged, whole))
    assert line == expected_line
    about = json.loads((merged / "provenance.json").read_text())
    assert (about["seeds"], about["planned"]) == ([0, 1], [0, 1])
    assert about["spec_hash"] == load_spec(shares / "digits.yaml").digest


def test_a_store_says_of_each_seed_what_its_results_say(shares):
    own, kept = (read_by_seed([shares / name], [NAME]) for name in ("out", "whole"))
    assert set(own["seed"]) == {0, 1}
    assert_frame_equal(own[kept.columns.drop("train_n")], kept.drop(columns="train_n"))


def test_of_two_sources_a_seed_counts_once_and_of_one_seed_there_is_a_comparison(shares, tmp_path):
    kept = read_by_seed([shares / "whole"], [NAME])
    assert_frame_equal(read_by_seed([shares / "whole", shares / "0", shares / "out"], [NAME]), kept)
    assert read_by_seed([shares / "whole", shares / "out"], ["another"]).empty
    # A store in which the second seed is under way.
    store = tmp_path / "out"
    shutil.copytree(shares / "out", store)
    spec, storage = load_spec(shares / "digits.yaml"), Storage(str(store))
    wholes = [cell for cell in cells_of(spec) if cell.kind == "compare"]
    for cell in wholes + [cell for cell in cells_of(spec, [1]) if cell.kind == "audit"]:
        shutil.rmtree(store / "cells" / cell.key)
    assert finished_seeds(spec, storage) == [0]
    part = read_by_seed([store], [NAME])
    assert set(part["seed"]) == {0}
    (cell,) = (cell for cell in cells_of(spec, [0]) if cell.kind == "compare")
    # One that an earlier version made.
    (store / "cells" / cell.key / "null_front.parquet").unlink()
    assert read_by_seed([store], [NAME]).empty


def test_one_seed_is_a_result_of_its_own(shares):
    folder = shares / "0" / NAME
    assert set(pd.read_csv(folder / "digits.csv")["replicates"]) == {1}
    assert set(read_results([folder])["seed"]) == {0}
    about = json.loads((folder / "provenance.json").read_text())
    assert (about["seeds"], about["planned"]) == ([0], [0, 1])


def test_an_equal_seed_counts_once_whoever_computed_it(shares, parts, tmp_path):
    """Also where the target is one of the folders: that is how a study is committed seed by seed."""
    file = parts[1] / "results.parquet"
    pd.read_parquet(file).assign(device="another", started="later").to_parquet(file, index=False)
    target = tmp_path / "kept"
    shutil.copytree(shares / "whole", target)
    before = {file.name: file.read_bytes() for file in (target / NAME).glob("*.csv")}
    merge_results([target / NAME, *parts], target)
    assert_frame_equal(read_results([target]), read_results([shares / "whole"]))
    assert {file.name: file.read_bytes() for file in (target / NAME).glob("*.csv")} == before
    # Of fewer seeds than before, and pictures of them.
    shutil.copytree(shares / "0", tmp_path / "growing")
    assert list((tmp_path / "growing" / NAME).glob("*.png"))
    merge_results([tmp_path / "growing" / NAME, parts[1]], tmp_path / "growing")
    assert set(read_results([tmp_path / "growing"])["seed"]) == {0, 1}
    assert not list((tmp_path / "growing" / NAME).glob("*.png"))


def test_a_merge_brings_the_pictures_of_all_seeds_and_leaves_others_alone(shares, tmp_path):
    shutil.copytree(shares / "0", tmp_path / "kept")
    kept, whole = tmp_path / "kept" / NAME, shares / "whole" / NAME
    drawn = {picture.name: picture.read_bytes() for picture in whole.glob("*.png")}
    assert drawn
    (kept / "mine.png").write_bytes(b"mine")
    (kept / "digits_of_before.png").write_bytes(b"before")
    merge_results([kept, whole], tmp_path / "kept")
    assert {picture.name: picture.read_bytes() for picture in kept.glob("*.png")} == {**drawn, "mine.png": b"mine"}


def _told_otherwise(folder: Path, **more: object) -> None:
    file = folder / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def _table(folder: Path, change) -> None:
    table = pd.read_parquet(folder / "results.parquet")
    change(table).to_parquet(folder / "results.parquet", index=False)


def _renamed(folder: Path, **more: str) -> None:
    _told_otherwise(folder, **more)
    _table(folder, lambda table: table.assign(**more))


def _another_number(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("0"), folder)
    _table(folder, lambda table: table.assign(value=table["value"] + (table.index == 3)))


SPOILED = {
    "spec": (lambda f: _renamed(f, spec_hash="abc"), "1 of the spec with hash abc; only results of one study"),
    "scale": (lambda f: _renamed(f, scale="another"), "at the scale “another”"),
    "study": (lambda f: _renamed(f, study="other"), "of study 'other'"),
    "version": (lambda f: _told_otherwise(f, format=1), "format 1, which is not this version's 2; write it again"),
    "lacking": (lambda f: (f / "provenance.json").unlink(), "1 holds no results of a study with provenance"),
    "provenance": (lambda f: _told_otherwise(f, spec_hash="abc"), "are not of one spec hash"),
    "seeds": (lambda f: _told_otherwise(f, seeds=[0, 1]), "does not hold the seeds that its provenance names"),
    "unfinished": (
        lambda f: _table(f, lambda table: table[table["finetune"] != "lagrangian"]),
        "Seed 1 is not finished: it lacks the network digits finetuned plain lagrangian",
    ),
    "numbers": (_another_number, "hold different numbers for seed 0"),
    "no table": (lambda f: (f / "results.parquet").unlink(), "holds no table of a study"),
    "no comparison": (lambda f: (f / "by_seed.parquet").unlink(), "by_seed.parquet is missing or broken"),
    "no line": (lambda f: (f / "digits_null_front.csv").unlink(), "digits_null_front.csv does not exist."),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_does_not_belong_together_is_refused_in_a_sentence(spoiled, parts, tmp_path, refused):
    spoil, words = SPOILED[spoiled]
    spoil(parts[1])
    assert words in refused("study", "merge", *parts, "--to", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{spec}", "--out", "{out}", "--seeds", "7"], "Study 'digits_tiny' has no seed 7; it has 0, 1."),
        (["run", "{spec}", "--out", "{out}", "--seeds", "one"], "Seeds 'one' are not whole numbers"),
        (["results", "{spec}", "--out", "nothing", "--results", "x"], "nothing holds no finished seed of study"),
    ],
)
def test_bad_input_is_one_sentence(shares, arguments, words, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refused("study", *(text.format(spec=shares / "digits.yaml", out=shares / "out") for text in arguments))
    assert words in told


def test_results_of_the_seeds_that_are_finished_while_another_is_under_way(shares, tmp_path, run_here):
    """Byte by byte what the seed's own machine wrote, but for the day."""
    spec = load_spec(shares / "digits.yaml")
    shutil.copytree(shares / "out", tmp_path / "out", symlinks=True)
    (other,) = (cell for cell in cells_of(spec, [1]) if cell.where == "digits-1/plain-erm-audit")
    (tmp_path / "out" / "cells" / other.key / "status.json").unlink()
    done = run_here("study", "results", shares / "digits.yaml", "--out", tmp_path / "out", "--results", tmp_path)
    assert "Results of 1 of 2 seeds (0)" in done.stdout
    for file in ("digits.csv", "results.parquet", "by_seed.parquet"):
        assert (tmp_path / NAME / file).read_bytes() == (shares / "0" / NAME / file).read_bytes()
