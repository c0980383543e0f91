"""The documentation site: it builds strictly, holds every public name, and needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("sphinx")
pytest.importorskip("myst_nb")


def build(out: Path, *options: str, docs: Path = ROOT / "docs") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(docs / "site" / "build.py"), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_reference_and_link_of_the_site_leads_somewhere(tmp_path):
    done = build(tmp_path / "site", "--check")
    assert done.returncode == 0, done.stderr
    import fairline

    reference = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site.pages" / "api").glob("*.md"))
    modules = {name for name, origin in fairline._LAZY.items() if not origin}
    for name in set(fairline.__all__) - modules - {"__version__"}:
        assert f":: fairline.{name}\n" in reference


class _Page(HTMLParser):
    """What a page loads, where it leads, and the places in it that something may lead to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {key: value or "" for key, value in attrs}
        self.places.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in {"script", "img", "iframe"} and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in {"stylesheet", "preload", "icon", "modulepreload"}:
            self.loaded.append(given["href"])


@pytest.mark.slow
def test_what_is_broken_fails_the_build(tmp_path):
    for name in ("docs", "papers"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.md"):
        shutil.copy(file, tmp_path)
    guide = tmp_path / "docs" / "guide.md"
    wrong = (
        "[nothing](nothing.md) [nowhere](linearize.md#nowhere) {py:class}`fairline.Nothing` {py:func}`nothing_at_all`"
    )
    guide.write_text(guide.read_text(encoding="utf-8") + wrong, encoding="utf-8")
    done = build(tmp_path / "site", "--check", docs=tmp_path / "docs")
    assert done.returncode == 1
    for words in ("'nothing.md'", "'nowhere'", "fairline.Nothing", "nothing_at_all"):
        assert words in done.stderr


@pytest.mark.slow
def test_the_whole_site(tmp_path):
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {file.resolve(): _Page(file) for file in site.rglob("*.html") if "_static" not in file.parts}
    assert len(pages) > 60
    for file, page in pages.items():
        for target in page.loaded:
            assert not urlsplit(target).netloc, f"{file} loads {target}"
        for target in [*page.loaded, *page.links]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert there.exists(), f"{file} leads to {target}"
            if parts.fragment and there in pages and "_modules" not in file.parts:
                assert unquote(parts.fragment) in pages[there].places, f"{file} leads to {target}"
    assert "<math" in (site / "docs" / "guide.html").read_text(encoding="utf-8")
    assert "finished" in (site / "docs" / "own_images.html").read_text(encoding="utf-8")  # the notebook was run
    assert len(list((site / "figures").rglob("*.png"))) == len(list((ROOT / "papers" / "results").rglob("*.png")))
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert 'data-theme="dark"' in styles
    assert not re.findall(r"(?:@import|url\()\s*[\"']?https?:", styles)
