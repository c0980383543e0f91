"""Quick settings fit the data and the network, give way to what is given, and reach their budgets when they say."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairline.errors import FairlineError
from fairline.linearize import SNL, resolve_budgets
from fairline.linearize.quick import quick
from fairline.masking import mask_relus, relu_count
from tests.commands import TRAIN, fairline, ok


@given(
    st.integers(1, 10**6), st.integers(1, 10**7), st.lists(st.integers(0, 10**7), min_size=1, max_size=4), st.booleans()
)
def test_masks_can_close_within_the_epochs_that_are_said(images, total, budgets, accelerator):
    proposed = quick(images, total, [min(budget, total) for budget in budgets], accelerator=accelerator)
    method = SNL(**proposed.settings)
    assert method.steps_to_close() / proposed.steps <= proposed.epochs
    assert method.patience < proposed.epochs <= method.max_epochs
    assert proposed.steps == math.ceil(images / method.batch_size)
    assert 1e-3 <= method.lr <= 1e-2


@given(
    st.sampled_from(
        [{"lr": 0.02}, {"batch_size": 7}, {"lam": 0.5}, {"growth": 1.0}, {"max_epochs": 3}, {"patience": 0}]
    )
)
def test_what_is_given_is_kept(some):
    proposed = quick(5000, 1000, [100], **some)
    assert proposed.settings | some == proposed.settings
    SNL(**proposed.settings)


def test_no_images():
    with pytest.raises(FairlineError, match="without images"):
        quick(0, 10, [1])


@pytest.mark.parametrize("budgets", [[0.5, 0.05], [0.8]])
def test_it_reaches_its_budgets(parts, trained, budgets):
    total = relu_count(mask_relus(trained, parts[0].normalized(slice(2))))
    proposed = quick(len(parts[0]), total, resolve_budgets(budgets, total))
    cuts = list(SNL(**proposed.settings).linearize(trained, parts[0], budgets))
    assert all(cut.info["reached"] for cut in cuts)
    assert cuts[-1].info["epoch"] <= proposed.settings["max_epochs"]


def test_a_pace_makes_the_price_grow_while_too_few_close_and_none_leaves_the_published_rule(parts, trained):
    def prices(**more):
        rows = []
        list(
            SNL(lr=0.02, lam=1e-3, batch_size=32, max_epochs=12, patience=2, **more).linearize(
                trained, parts[0], [0.02], history=rows
            )
        )
        return [row["lambda"] for row in rows]

    usual, hurried = prices(), prices(pace=4)
    assert hurried[1] == usual[1] == 1e-3
    assert max(hurried) > max(usual)
    assert all(later / before <= 1.1**3 + 1e-9 for before, later in pairwise(hurried))
    with pytest.raises(FairlineError, match="needs pace > patience, not 2 and 5"):
        SNL(pace=2)


def test_too_few_epochs_for_any_mask_to_close_are_said_before_they_are_spent(parts, trained, caplog):
    with caplog.at_level(logging.WARNING, "fairline"):
        list(SNL(max_epochs=2).linearize(trained, parts[0], [0.5]))
        said = caplog.messages[0]
        assert "at lr 0.001 a mask needs about 990 steps to close" in said
        assert "no budget will be reached" in said
        caplog.clear()
        next(SNL(lr=0.03, batch_size=16, max_epochs=20, lam=1e-2).linearize(trained, parts[0], [0.9]))
        assert not caplog.messages


def test_the_command_uses_them_as_if_they_had_been_given(tmp_path):
    ok(*TRAIN, "--out", tmp_path / "base")
    done = fairline(
        "linearize", tmp_path / "base", "--budgets", "0.5,10%", "--quick", "--lam", "0.0005", "--out", tmp_path / "q"
    )
    assert done.returncode == 0, done.stderr
    assert "Quick settings: batch_size 8, lr 0.005" in done.stderr
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = config["settings"]
    assert settings["lam"] == 0.0005
    assert set(settings) == {"batch_size", "lr", "lam", "growth", "patience", "pace", "max_epochs"}
    rows = pd.read_parquet(tmp_path / "q" / "metrics.parquet")
    assert rows["relus"].iloc[-1] <= 0.1 * 1.01 * rows["relus"].iloc[0]
    assert len(rows) <= settings["max_epochs"]
    refused = fairline("linearize", tmp_path / "base", "--method", "random", "--quick", "--out", tmp_path / "r")
    assert refused.returncode == 2
    assert "Quick settings are known for snl, not for 'random'." in refused.stderr
