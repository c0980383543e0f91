"""The benchmarks run; what they measure is no test."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fairline as fl

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
        ("objectives.py", ["--images", "256", "--rounds", "1"], 22),
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


def test_the_published_code_gets_the_batches_that_training_takes(parts, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    published = importlib.import_module("_published")

    class Seen(fl.ERM):
        def losses(self, logits, teacher_logits, batch):
            seen.append(batch.index)
            return super().losses(logits, teacher_logits, batch)

    seen: list[torch.Tensor] = []
    train = parts[0]
    fl.train(fl.models.build("cnn", 3, 1, 8, width=1), train, epochs=2, batch_size=32, seed=7, objective=Seen())
    batches = published.Batches(train.images, torch.arange(len(train)), 32, 7)
    given = [index for _ in range(2) for _, index in batches]
    assert len(given) == 2 * len(batches)
    assert all(torch.equal(one, other) for one, other in zip(given, seen, strict=True))
    batches.restart()
    assert torch.equal(next(iter(batches))[1], seen[0])


def test_published_code_of_another_commit_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "fidelity.py"), "--snl", tmp_path, "--autorep", tmp_path, "--root", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{tmp_path} is not an unchanged checkout of" in done.stderr
    assert "Traceback" not in done.stderr
