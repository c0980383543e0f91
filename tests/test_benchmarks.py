"""The benchmarks run; what they measure is no test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_of_explaining_prints_its_ratios():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "explain.py"), "--rounds", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("20 groups / one pass", "power iteration / fairline", "9 passes", "4000 images / 500"):
        (line,) = (line for line in done.stdout.splitlines() if name in line)
        assert float(line.partition(": ")[2].split()[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    # Alone, an operation may find products of shared values that an earlier call left over.
    ("arguments", "within"),
    [([], 10), (["--calibrate"], 30)],
    ids=["validate", "calibrate"],
)
def test_the_cost_model_is_put_beside_measurements(arguments, within, tmp_path):
    pytest.importorskip("spu")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "private_cost.py"), "--repeats", "1", "--out", str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(line.rsplit(" ", 1)[1].rstrip("%")) for line in done.stdout.splitlines() if "largest error" in line]
    assert len(errors) == 2
    assert all(error < within for error in errors)
    assert (tmp_path / "provenance.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("masked_relu.py", ["--rounds", "1"], 5),
        ("snl_epoch.py", ["--images", "256", "--rounds", "1"], 3),
        ("mask_learning.py", ["--images", "256", "--rounds", "1"], 4),
        ("coordinate_descent.py", ["--images", "64", "--rounds", "1"], 1),
        ("objectives.py", ["--images", "256", "--rounds", "1"], 9),
        ("compile.py", ["--shares", "0.002", "--protocols", "semi2k", "--rounds", "1"], 7),
    ],
)
def test_benchmark_prints_its_ratios(script, arguments, lines):
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--width", "4", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ratios = [float(word) for line in done.stdout.splitlines()[1:] for word in line.split()[-2:] if word[0].isdigit()]
    assert len(ratios) >= lines
    assert all(ratio > 0 for ratio in ratios)
