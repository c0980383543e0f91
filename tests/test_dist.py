"""What ``make dist`` built: what is in it, and that the wheel works without extras (``make test-dist``)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

import fairline

ROOT = Path(__file__).parents[1]
DIST = os.environ.get("FAIRLINE_DIST")

pytestmark = pytest.mark.skipif(DIST is None, reason="tests of a wheel: make test-dist")

#: What is for working on the repository itself, or too large, and so in no archive.
NOT_FOR_USERS = re.compile(r"\.ci/|\.github/|.*\.png$")

#: The least that a whole path takes.
QUICK = ("--epochs", "2", "--finetune-epochs", "1", "--max-epochs", "3", "--budgets", "0.1")


def committed() -> set[str]:
    """Files of the repository, with those that are to be."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.fixture(scope="module")
def wheel() -> Path:
    (file,) = Path(DIST).glob("*.whl")
    assert file.name == f"fairline-{fairline.__version__}-py3-none-any.whl"
    return file


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source archive's folder."""
    where = tmp_path_factory.mktemp("sdist")
    with tarfile.open(Path(DIST) / f"fairline-{fairline.__version__}.tar.gz") as archive:
        archive.extractall(where, filter="data")
    (folder,) = where.iterdir()
    return folder


@dataclass
class Alone:
    """An environment that holds the wheel, outside of the checkout, and a folder to work in."""

    bin: Path
    folder: Path

    def run(self, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        # Neither this checkout nor anything that is installed beside it may be found.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return subprocess.run(
            [self.bin / program, *map(str, words)],
            cwd=self.folder,
            env={**kept, "OMP_NUM_THREADS": "2", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    def ok(self, program: str, *words: str | Path) -> str:
        done = self.run(program, *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory) -> Alone:
    where = tmp_path_factory.mktemp("alone")
    venv.create(where / "venv", with_pip=True)
    here = Alone(where / "venv" / "bin", where)
    install = ("-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt")
    # torch first and pinned, as in the Makefile.
    here.ok("python", *install, "torch")
    here.ok("python", *install, wheel)
    return here


@pytest.fixture(scope="module")
def shown(alone) -> str:
    """What the demo prints."""
    return alone.ok("fairline", "demo", *QUICK, "--out", "demo")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if not name.startswith(f"fairline-{fairline.__version__}.dist-info/")}
    assert inside == {name.removeprefix("src/") for name in committed() if name.startswith("src/")}
    assert {"fairline/py.typed", "fairline/report/templates/report.html.j2"} <= inside


def test_the_source_archive_holds_what_there_is_but_images(unpacked):
    inside = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    expected = {name for name in committed() if not NOT_FOR_USERS.match(name)}
    assert inside == expected | {"PKG-INFO"}


def test_the_tests_in_the_source_archive_find_their_files(unpacked):
    """All are collected, and those that read what lies beside tests/ run."""
    reading = [
        "tests/private/test_cost.py::test_the_committed_validation_holds",
        "tests/study/test_study.py::test_every_scale_of_the_committed_studies_is_valid",
        "tests/test_docs.py::test_links_lead_somewhere",
        "tests/test_package.py::test_the_version_stands_in_one_place",
        "tests/test_package.py::test_the_lowest_versions_are_those_of_the_package",
    ]
    for words in (["--collect-only", "tests"], reading):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", *words],
            cwd=unpacked,
            env={**os.environ, "PYTHONPATH": str(unpacked / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert "skipped" not in done.stdout.splitlines()[-1]


def test_it_is_the_wheel_that_is_tested(alone, wheel):
    assert alone.ok("fairline", "--version") == f"fairline {fairline.__version__}\n"
    where = Path(alone.ok("python", "-c", "import fairline; print(fairline.__file__)").strip())
    assert where.is_relative_to(alone.bin.parent)
    alone.ok("python", "-m", "pip", "check")
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = Parser().parsestr(archive.read(file).decode())
    assert told["Version"] == fairline.__version__
    assert {extra for extra, _ in WITHOUT.values()} == {*told.get_all("Provides-Extra")} - {"dev", "docs"}


def test_the_doctor_finds_nothing_wrong_and_names_the_extras(alone):
    told = alone.ok("fairline", "doctor")
    for extra, _ in WITHOUT.values():
        assert f"pip install 'fairline[{extra}]'" in told


def test_the_demo_runs_and_its_report_is_whole(alone, shown):
    page = (alone.folder / "demo" / "report.html").read_text(encoding="utf-8")
    assert "within 5 points of the base network" in shown
    for part in ("vega", "cheetah", "semi2k", "Relative"):
        assert part in page, part
    # Charts are in the page: nobody is asked for anything.
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page)


def test_what_needs_no_extra_works(alone, shown):
    alone.ok("fairline", "private", "export", "demo/finetune", "--out", "exported")
    assert "cheetah" in alone.ok("fairline", "private", "estimate", "demo/finetune")
    rows = "".join(f"{i % 2},{int(i % 3 > 0)},{'ab'[i % 4 > 1]}\n" for i in range(80))
    (alone.folder / "predictions.csv").write_text("label,prediction,side\n" + rows)
    alone.ok("fairline", "audit", "--predictions", "predictions.csv", "--groups", "side", "--out", "audited")
    alone.ok("fairline", "report", "audited")


TRAIN = ("train", "--data", "digits", "--model", "cnn", "--epochs", "1", "--out", "other")

#: What is done without its extra → the extra, and the words.
WITHOUT = {
    "private run": ("mpc", ("private", "run", "demo/finetune")),
    "private fixed-point": ("mpc", ("private", "fixed-point", "demo/finetune", "--out", "other")),
    "private serve": ("mpc", ("private", "serve", "shared", "--parties", "parties.yaml")),
    "private query": ("mpc", ("private", "query", "shared/public", "image.png", "--parties", "parties.yaml")),
    "private export --onnx": ("onnx", ("private", "export", "demo/finetune", "--out", "other", "--onnx")),
    "--log tensorboard": ("tensorboard", (*TRAIN, "--log", "tensorboard")),
    "--log mlflow": ("mlflow", (*TRAIN, "--log", "mlflow")),
    "--log wandb": ("wandb", (*TRAIN, "--log", "wandb")),
    "--devices": ("multi", (*TRAIN, "--devices", "2")),
    "study run --ray": ("ray", ("study", "run", "digits.yaml", "--out", "other", "--ray", "local")),
    "card": ("hub", ("card", "demo/audit", "--out", "other", "--license", "mit", "--intended-use", "A test.")),
    "push": ("hub", ("push", "published", "someone/network")),
}


@pytest.fixture(scope="module")
def given(alone, shown) -> None:
    """The files that the words name."""
    alone.ok("fairline", "private", "export", "demo/finetune", "--out", "shared")
    (alone.folder / "parties.yaml").write_text("model: 127.0.0.1:9100\nimage: 127.0.0.1:9101\n")
    shutil.copy(ROOT / "tests" / "study" / "digits.yaml", alone.folder)
    Image.new("L", (8, 8)).save(alone.folder / "image.png")
    (alone.folder / "published").mkdir()
    for name in ("README.md", "network.json"):
        (alone.folder / "published" / name).write_text("{}")


@pytest.mark.parametrize("doing", WITHOUT)
def test_a_missing_extra_is_named_in_a_sentence(alone, given, doing):
    extra, words = WITHOUT[doing]
    done = alone.run("fairline", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert f"pip install 'fairline[{extra}]'" in line
    begun = list(alone.folder.glob("other*"))
    for folder in begun:
        shutil.rmtree(folder)
    assert not begun, "nothing is begun that cannot be done"


def test_loading_from_the_hub_without_its_extra(alone):
    code = "import fairline as fl\ntry: fl.load('someone/network')\nexcept fl.FairlineError as error: print(error)"
    assert "pip install 'fairline[hub]'" in alone.ok("python", "-c", code)
