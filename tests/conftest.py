"""Shared data and networks, small enough to train in a second."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

# Before torch: workers that share the cores wait for each other's threads, up to ten times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# A trial is timed, so what it chooses may differ from run to run.
os.environ["FAIRLINE_PRECISION"] = "fp32"

import hypothesis
import pytest
import torch
from torch import nn

from fairline.data import GroupedData
from fairline.models import build
from fairline.training import train
from tests.commands import AUDIT, EXPLAIN, FINETUNE, LINEARIZE, TRAIN, ok

# A busy machine is no failure.
hypothesis.settings.register_profile("fairline", deadline=None)
hypothesis.settings.load_profile("fairline")


@cache
def shares_runs(file: Path) -> bool:
    """Whether a test or fixture of a file asks for the run folders, which take a while to make."""
    return bool(re.search(r"^def \w+\([^)]*\b(runs|explained|compared)\b", file.read_text(encoding="utf-8"), re.M))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` a file's tests stay together, and so do all files that share the run folders.

    Not ``--dist loadgroup``, whose groups xdist 3.8 loses under pytest 9.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "runs" if shares_runs(config.rootpath / file) else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real images; tests that need it are skipped where it is missing."""
    root = Path(os.environ.get("FAIRLINE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "utkface.parquet").exists():
        pytest.skip(f"no real images in {root} (set FAIRLINE_DATA)")
    return root


def make_data(
    n: int = 240, *, classes: int = 3, groups: int | None = None, size: int = 8, seed: int = 0
) -> GroupedData:
    """Images of one channel whose brightness pattern tells the class; groups of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.6, 0.3, 0.1, 0.05][: groups or classes])
    group_index = torch.multinomial(shares, n, replacement=True, generator=generator)
    labels = group_index.clone() if groups is None else torch.randint(0, classes, (n,), generator=generator)
    patterns = torch.randint(40, 216, (classes, 1, size, size), generator=generator).float()
    images = patterns[labels] + 30 * torch.randn(n, 1, size, size, generator=generator)
    class_names = tuple(f"class {i}" for i in range(classes))
    group_names = class_names if groups is None else tuple(f"group {i}" for i in range(groups))
    return GroupedData(
        images.clamp(0, 255).to(torch.uint8), labels, group_index, class_names, group_names, name="synthetic"
    )


@pytest.fixture(scope="session")
def data() -> GroupedData:
    return make_data()


@pytest.fixture(scope="session")
def parts(data: GroupedData) -> tuple[GroupedData, GroupedData, GroupedData]:
    return data.split(0)


@pytest.fixture(scope="session")
def _trained(parts: tuple[GroupedData, GroupedData, GroupedData]) -> nn.Module:
    torch.manual_seed(0)
    model = build("cnn", 3, 1, 8, width=4)
    train(model, parts[0], parts[1], epochs=4, batch_size=32, lr=0.05)
    return model


@pytest.fixture
def trained(_trained: nn.Module) -> nn.Module:
    """A small trained network; a copy, so that a test may change it."""
    import copy

    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folder of a finished train, linearize, finetune and audit run, with its report."""
    folder = tmp_path_factory.mktemp("runs")
    ok(*TRAIN, "--out", folder / "base")
    ok("linearize", folder / "base", *LINEARIZE, "--out", folder / "snl")
    ok("finetune", folder / "snl", *FINETUNE, "--out", folder / "students")
    ok("audit", folder / "snl", folder / "students", *AUDIT, "--out", folder / "audit")
    ok("report", folder / "audit", "--figures", folder / "figures")
    return folder


@pytest.fixture(scope="session")
def explained(runs) -> Path:
    """Folder of an audit of the finetuned networks that explains, with its report."""
    ok("audit", runs / "students", *EXPLAIN, "--out", runs / "explained")
    ok("report", runs / "explained", "--figures", runs / "explained_figures")
    return runs / "explained"


@pytest.fixture(scope="session")
def compared(runs) -> Path:
    """Folder of a comparison of two finetunes, fair masks and retrained last layers, with its page."""
    fair = ["--objective", "lagrangian", "--mu", "0.5"]
    ok("linearize", runs / "base", *LINEARIZE, *fair, "--protect", "1", "--out", runs / "fair")
    ok("finetune", runs / "snl", *FINETUNE, *fair, "--select", "last", "--out", runs / "repaired")
    ok("finetune", runs / "fair", *FINETUNE, "--out", runs / "fair_students")
    sources = [runs / name for name in ("snl", "students", "repaired", "fair_students")]
    ok("compare", *sources, "--resamples", "100", "--out", runs / "compared")
    return runs / "compared"


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A command in this process; starting one takes longer than the rest."""
    from fairline import cli

    def run(*arguments) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.argv", ["fairline", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)

    return run


@pytest.fixture
def refused(run_here):
    """The one sentence of a command that must fail."""

    def run(*arguments) -> str:
        done = run_here(*arguments)
        assert done.returncode == 2, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
        return line

    return run
