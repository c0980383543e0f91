"""Build the documentation site: ``python docs/site/build.py build/site``.

The pages are the Markdown files of the repository, where they lie, so that a link works on GitHub and on the site
alike. What is made of something else (reference, gallery, claims, contents) is written beside copies of them, in
``OUT.pages``; the source tree stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The tree's own code is described and runs the notebook, whatever is installed.
sys.path[:0] = [str(HERE), str(ROOT / "src")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

import results  # noqa: E402

import reference  # noqa: E402

#: The bar at the top: a page of contents for each, and what stands there.
SECTIONS = {
    "learn": (
        "Learn",
        ["docs/ten_minutes", "docs/guide", "docs/howto_engineer", "docs/howto_researcher", "docs/own_images"],
    ),
    "topics": (
        "Topics",
        [
            "docs/linearize",
            "docs/mitigate",
            "docs/explain",
            "docs/private",
            "docs/compile",
            "docs/studies",
            "docs/numbers",
        ],
    ),
    "api/index": ("Reference", [f"api/{page}" for page in reference.PAGES]),
    "results": ("Results", []),
    "project": ("Project", ["docs/architecture", "CONTRIBUTING", "CHANGELOG", "CODE_OF_CONDUCT"]),
}


def stage(pages: Path, figures: bool = True) -> None:
    """Gather the sources of the site: copies of the repository's files, and what is made.

    Args:
        pages: Folder that is made anew.
        figures: Whether the gallery has its figures.
    """
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "docs").mkdir(parents=True)
    (pages / "extra").mkdir()
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md"):
        shutil.copy2(ROOT / name, pages)
    for file in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]:
        shutil.copy2(file, pages / "docs")
    for folder in ("docs/images", "papers"):
        shutil.copytree(ROOT / folder, pages / folder)
    reference.write(pages / "api")
    contents = {name: list(below) for name, (_, below) in SECTIONS.items()}
    contents["results"] = results.write(pages, figures)
    for name, (title, _) in SECTIONS.items():
        _write_contents(pages / f"{name}.md", title, contents[name])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (pages / "index.md").write_text(readme + _toctree(list(SECTIONS), "hidden"), encoding="utf-8")


def _write_contents(page: Path, title: str, below: list[str]) -> None:
    page.write_text(f"# {title}\n" + _toctree([f"/{name}" for name in below], "maxdepth: 2"), encoding="utf-8")


def _toctree(names: list[str], option: str) -> str:
    return "\n".join(["", "```{toctree}", f":{option}{'' if ':' in option else ':'}", "", *names, "```", ""])


def main() -> int:
    """Build, strictly: a warning is an error, and so is a reference that leads nowhere.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of the site")
    parser.add_argument("--no-execute", action="store_true", help="show the notebook's code without its results")
    parser.add_argument("--check", action="store_true", help="read and resolve all, draw nothing")
    chosen = parser.parse_args()
    pages = chosen.out.with_name(f"{chosen.out.name}.pages").absolute()
    stage(pages, figures=not chosen.check)
    shutil.rmtree(chosen.out, ignore_errors=True)
    os.environ["FAIRLINE_SITE"] = " ".join(each for each in ("check", "no_execute") if getattr(chosen, each))
    strict = ["--fail-on-warning", "--nitpicky", "--fresh-env", "--quiet"]
    builder = ["-b", "dummy" if chosen.check else "html", "-D", f"html_extra_path={pages / 'extra'}"]
    doctrees = str(pages.with_name(f"{chosen.out.name}.doctrees"))
    return build_main([*strict, *builder, "-c", str(HERE), "-d", doctrees, str(pages), str(chosen.out)])


if __name__ == "__main__":
    sys.exit(main())
