"""Names are shown as they are, on pages and in the terminal: none becomes a tag or a style."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from fairline import jobs
from fairline.cli import console
from fairline.cli.console import print_audit, print_comparison, print_frame, print_frontier, progress_bars, visible
from fairline.data.grouped import OVERALL
from fairline.jobs.frontier import frontier_job
from fairline.report.claims import findings
from fairline.report.claims_page import write_claims
from fairline.report.comparison import write_comparison
from fairline.report.costs import write_frontier
from fairline.report.figures import natural_order
from fairline.report.html import write_report
from fairline.runs import DataSpec, Run
from fairline.training import Progress
from tests.report.study_table import study_table

PLAIN = ("first", "second", "third")
NASTY = [
    "<unknown>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "[other]",
    "[bold]x[/]",
    "[/]",
    "\\[b]",
    ":smiley:",
    "\"double\", 'single'",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "a\u2028b",
    "back\\slash",
    "x.y[0]",
    "datum['group']",
    "None",
    "nan",
]
printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9)
names = st.one_of(st.sampled_from(NASTY), printable.filter(str.strip))
three_names = st.lists(
    names.filter(lambda name: name not in (OVERALL, "worst group")), min_size=3, max_size=3, unique=True
)
few = settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Folder of an audit, a comparison and a frontier run over images whose groups have plain names."""
    folder = tmp_path_factory.mktemp("names")
    images = folder / "images"
    images.mkdir()
    lines = ["file_name,label,group"]
    for i in range(300):
        pixels = np.random.default_rng(i).integers(0, 100, (8, 8)) + i % 2 * 60
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{i}.png")
        # Groups of unequal size, so that their order does not hang on names.
        lines.append(f"{i}.png,{i % 2},{PLAIN[(0, 0, 0, 1, 1, 2)[i // 2 % 6]]}")
    (images / "metadata.csv").write_text("\n".join(lines))
    data = DataSpec("folder", str(images), {"groups": "group", "image_size": 8})
    steps = {"epochs": 1, "batch_size": 32, "device": "cpu"}
    base = jobs.train_job(folder / "base", data, "cnn", {"width": 2}, **steps)
    cut = jobs.linearize_job(base.folder, folder / "cut", [0.5, 0.2], "random", device="cpu")
    students = [jobs.finetune_job(cut.folder, folder / name, name, **steps).folder for name in ("erm", "lagrangian")]
    audit = jobs.audit_job(students[:1], folder / "audit", explain=True, resamples=20, device="cpu")
    jobs.compare_job([cut.folder, *students], folder / "compared", resamples=20, device="cpu")
    frontier_job(audit.folder, folder / "frontier")
    return folder


def renamed(run: Path, folder: Path, new: Sequence[str]) -> Run:
    """A copy of a run in which groups and data have other names."""
    copy = folder / run.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    words = dict(zip(PLAIN, new, strict=True))
    for file in copy.glob("*.parquet"):
        table = pd.read_parquet(file)
        for column in {"group", "worst_group", "drop_group"} & set(table):
            table[column] = table[column].map(lambda name: words.get(name, name))
        for column in {"lowest_who", "loss_who"} & set(table):
            table[column] = table[column].str.replace("|".join(PLAIN), lambda found: words[found[0]], regex=True)
        table.to_parquet(file, index=False)
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= {"name": new[0], "options": {"groups": new[1], "image_size": 8}}
    if "audit" in config:
        config["audit"]["folder"] = str(folder / "audit")
    (copy / "config.json").write_text(json.dumps(config))
    return Run(copy)


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text but that of scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, object]] = []
        self.text = ""
        self.raw = page.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        if self.cdata_elem is None:
            # Pages keep a number and its per cent sign together.
            self.text += data.replace("\u00a0", " ")

    def specs(self) -> dict[str, str]:
        """What each figure draws, as it stands in the script."""
        found = {}
        for match in re.finditer(r'figure\("#([^"]+)", ', self.raw):
            _, end = json.JSONDecoder().raw_decode(self.raw, match.end())
            found[match[1]] = self.raw[match.end() : end]
        return found


def write_pages(pipeline: Path, folder: Path, new: Sequence[str]) -> dict[str, Path]:
    audit, compared, frontier = (renamed(pipeline / name, folder, new) for name in ("audit", "compared", "frontier"))
    return {
        "report": write_report(audit.folder, costs=frontier.folder),
        "comparison": write_comparison(compared.folder),
        "frontier": write_frontier(frontier.folder),
    }


def tags_of(pipeline: Path, folder: Path, new: Sequence[str]) -> dict[str, Tags]:
    return {name: Tags(page) for name, page in write_pages(pipeline, folder, new).items()}


@pytest.fixture(scope="module")
def plain_pages(pipeline, tmp_path_factory) -> dict[str, Tags]:
    return tags_of(pipeline, tmp_path_factory.mktemp("plain"), PLAIN)


@few
@given(new=three_names)
@example(new=NASTY[:3])
@example(new=NASTY[3:6])
@example(new=["<6>", "1°", "a0"])
def test_a_page_shows_every_name_and_gets_no_tag_of_it(pipeline, plain_pages, tmp_path, new):
    # Names with numbers stand in the order of these, and so do the plain ones beside them.
    order = natural_order(new)
    plain = tags_of(pipeline, tmp_path, [f"group {order.index(name)}" for name in new]) if order else plain_pages
    nasty = tags_of(pipeline, tmp_path, new)
    for page in ("report", "comparison", "frontier"):
        assert nasty[page].tags == plain[page].tags, page
        assert new[0].replace("\u00a0", " ") in nasty[page].text
        specs = nasty[page].specs()
        assert list(specs) == list(plain[page].specs())
        for spec in specs.values():
            assert not re.search("[<>&\u2028\u2029]", spec)
    for name in new:
        assert name.replace("\u00a0", " ") in nasty["report"].text
        assert name.replace("\u00a0", " ") in nasty["comparison"].text
        assert any(name in groups_of(spec) for spec in nasty["report"].specs().values())


def groups_of(spec: str) -> set[str]:
    datasets = json.loads(spec)["datasets"].values()
    return {str(row["group"]) for rows in datasets for row in rows if "group" in row}


def test_the_page_of_claims_shows_every_name_and_gets_no_tag_of_it(tmp_path):
    def page(words: Sequence[str]) -> Tags:
        groups = dict(zip(words, (4000, 2000, 500), strict=True))
        table = study_table(groups=groups, seeds=(0, 1)).assign(device=words[0], scale=words[1], study=words[2])
        return Tags(write_claims(table, findings(table), tmp_path / "claims.html"))

    plain = page(PLAIN)
    for new in (NASTY[:3], NASTY[3:6]):
        nasty = page(new)
        assert nasty.tags == plain.tags
        for name in new:
            assert name.replace("\u00a0", " ") in nasty.text


def shown(draw: Callable[[], object], width: int = 600) -> str:
    """What the terminal shows, wide enough to wrap nothing."""
    terminal = console.out_console
    before, terminal.width = terminal.width, width
    try:
        with terminal.capture() as captured:
            draw()
        return captured.get()
    finally:
        terminal.width = before


@few
@given(new=three_names)
@example(new=NASTY[:3])
@example(new=NASTY[4:7])
def test_the_terminal_shows_every_name(pipeline, tmp_path, new):
    audit, compared, frontier = (renamed(pipeline / name, tmp_path, new) for name in ("audit", "compared", "frontier"))
    said = shown(lambda: print_audit(audit))
    assert all(visible(name) in said for name in new)
    shown(lambda: print_comparison(compared))
    words: Mapping[str, str] = dict(zip(("erm", "cut/budget-22", "cheetah"), new, strict=True))
    table = frontier.table("frontier.parquet").replace(words)
    assert visible(new[2]) in shown(lambda: print_frontier(table, new[0]))
    frame = pd.DataFrame({new[0]: [new[1]]}, index=[new[2]])
    said = shown(lambda: print_frame(frame, new[1]))
    assert all(visible(name) in said for name in new)


def test_a_long_name_is_folded_and_not_cut():
    said = shown(lambda: print_frame(pd.DataFrame({"n": [1]}, index=["[x]" * 30]), "t"), width=40)
    assert said.count("[") == 30
    assert "…" not in said


@few
@given(
    shares=st.lists(st.tuples(*[st.floats(-100, 100)] * 3), min_size=1, max_size=9),
    words=st.lists(st.text("abcτλ=.5", min_size=1, max_size=12), min_size=1, max_size=4),
    width=st.integers(60, 200),
)
def test_a_table_fits_the_terminal_and_keeps_intervals_and_words_whole(shares, words, width):
    limits = [f"[{low:+.1f}, {high:+.1f}]" for _, low, high in shares]
    columns = {
        f"column {place} [95 %]": [f"{value:+.1f} {limit}"]
        for place, ((value, _, _), limit) in enumerate(zip(shares, limits, strict=True))
    }
    columns |= {f"word {place}": [word] for place, word in enumerate(words)}
    said = shown(lambda: print_frame(pd.DataFrame(columns, index=["method"]), "t"), width)
    assert max(map(cell_len, said.splitlines())) <= width
    for whole in [*limits, *words, *(f"{value:+.1f}" for value, _, _ in shares)]:
        assert whole in said


@pytest.mark.parametrize("name", NASTY)
def test_progress_and_errors_show_every_name(name, monkeypatch, capsys):
    monkeypatch.setattr(console, "err_console", console.LiteralConsole(stderr=True, force_terminal=True, width=300))
    with progress_bars() as report:
        report(Progress(name[:30], 1, 2, name))
    said = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert visible(name[:30]) in said
    assert visible(name) in said


def test_what_a_terminal_would_obey_is_written_out():
    said = shown(lambda: print_frame(pd.DataFrame({"n": [1]}, index=["\x1b[31mred\x07\r"]), "t"))
    assert r"\x1b[31mred\x07\r" in said
    assert not set(said) & {"\x1b", "\x07", "\r"}
