from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fairline import SNL
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import build, resolve_budgets
from fairline.masking import masked_relus, relu_count
from fairline.objectives import ERM
from tests.reference.snl import SoftMask, learn_masks

TOTAL = 4 * 64 + 8 * 16 + 16 * 4
FAST = {"lr": 0.02, "lam": 1e-3, "batch_size": 32, "max_epochs": 30}


def cuts_of(model, data, budgets, **settings):
    return list(SNL(**{**FAST, **settings}).linearize(model, data, budgets))


def kept(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


def test_every_budget_is_exact_and_the_model_is_untouched(parts, trained):
    before = copy.deepcopy(trained.state_dict())
    cuts = cuts_of(trained, parts[0], [0.1, 1.0, 0.5, 7, 0.0])
    assert [cut.relus for cut in cuts] == [TOTAL, TOTAL // 2, round(0.1 * TOTAL), 7, 0]
    for cut in cuts:
        assert relu_count(cut.model) == cut.relus
        assert cut.total == TOTAL
        assert all(layer.weight is None for layer in masked_relus(cut.model).values())
        assert predict(cut.model, parts[2]).isfinite().all()
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    # The whole network is the teacher itself.
    assert torch.equal(predict(cuts[0].model, parts[2]), predict(trained, parts[2]))
    fewer = cuts[1].info
    assert fewer["open"] <= TOTAL // 2
    assert fewer["reached"]


def test_mask_learning_follows_the_published_algorithm(parts, trained):
    """Counts, λ, masks and weights of every epoch agree with the straightforward loop."""
    data = parts[0]
    epochs = 12
    settings = {"lr": 0.03, "lam": 1e-3, "patience": 3, "growth": 1.5, "batch_size": 32}
    history: list[dict[str, float]] = []
    snl = SNL(**settings, max_epochs=epochs)
    (cut,) = snl.linearize(trained, data, [0.0], history=history)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(data), generator=generator).tolist() for _ in range(epochs)]
    student, counts, lambdas = learn_masks(
        trained, data.normalized(), data.labels, epochs=epochs, orders=orders, **settings
    )
    assert lambdas[-1] > 1e-3
    assert counts[-1] < TOTAL
    assert [row["lambda"] for row in history] == pytest.approx(lambdas)
    assert [row["relus"] for row in history] == pytest.approx(counts, abs=2)
    reference = dict(student.named_parameters())
    for name, parameter in cut.model.named_parameters():
        torch.testing.assert_close(parameter, reference[name], rtol=5e-3, atol=2e-3)
    assert any(isinstance(module, SoftMask) for module in student.modules())


def test_largest_masks_are_kept(parts, trained):
    data = parts[0]
    settings = {"lr": 0.01, "lam": 1e-4, "batch_size": 32}
    (cut,) = SNL(**settings, max_epochs=3).linearize(trained, data, [100])
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(data), generator=generator).tolist() for _ in range(3)]
    student, *_ = learn_masks(trained, data.normalized(), data.labels, epochs=3, orders=orders, **settings)
    alphas = torch.cat([m.alpha.flatten() for m in student.modules() if isinstance(m, SoftMask)])
    top = torch.zeros(len(alphas), dtype=torch.bool)
    top[alphas.topk(100).indices] = True
    # Float noise may exchange masks that are almost equal.
    assert (kept(cut.model) ^ top).sum() <= 4
    assert not cut.info["reached"]


#: Masks close within a few epochs.
QUICK = {"lr": 0.05, "lam": 3e-3, "batch_size": 32, "max_epochs": 8}


def test_the_control_is_trained_as_long_as_the_masks_with_nothing_to_pay(parts, trained):
    data = parts[0]
    rows: list[dict[str, float]] = []
    cuts = list(SNL(control=True, **QUICK).linearize(trained, data, [1.0, 0.5, 0.1], history=rows))
    assert [cut.relus for cut in cuts] == [TOTAL // 2, round(0.1 * TOTAL), TOTAL]
    assert cuts[-1].info["epoch"] == len(rows) == cuts[1].info["epoch"]
    # Nobody has ever paid so little.
    free = {**QUICK, "lam": 1e-30, "max_epochs": len(rows)}
    (other,) = SNL(**free).linearize(trained, data, [0])
    theirs = dict(other.model.named_parameters())
    for name, parameter in cuts[-1].model.named_parameters():
        assert torch.equal(parameter, theirs[name])
    # What is asked for beside it is what it is without.
    alone = list(SNL(**QUICK).linearize(trained, data, [0.5, 0.1]))
    for cut, other in zip(cuts, alone, strict=False):
        assert torch.equal(predict(cut.model, parts[2]), predict(other.model, parts[2]))


def test_a_control_resumes_wherever_the_run_was_broken_off(parts, trained, tmp_path):
    def run(updates: float, folder=None, rows=None):
        """Its networks, unless it is interrupted after so many batches."""
        seen = 0

        def stop(_update):
            nonlocal seen
            seen += 1
            if seen > updates:
                raise KeyboardInterrupt

        method = SNL(control=True, **QUICK)
        return list(
            method.linearize(trained, parts[0], [1.0, 0.5], checkpoint=folder, history=rows, progress=stop)
        ), seen

    (half, whole), batches = run(float("inf"))
    for broken_off in (batches // 4, batches // 2 + 1, batches - 2):
        folder = tmp_path / str(broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(broken_off, folder)
        rows: list[dict[str, float]] = []
        again, _ = run(float("inf"), folder, rows)
        assert [cut.info["epoch"] for cut in again] == [half.info["epoch"]] * 2 == [len(rows)] * 2
        for cut, other in zip(again, (half, whole), strict=True):
            assert torch.equal(predict(cut.model, parts[2]), predict(other.model, parts[2]))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("snl", {**QUICK, "granularity": "channel"}),
        ("snl", {**QUICK, "surrogate": "quadratic"}),
        ("autorep", {"mask_lr": 0.02, "hold": 1, "batch_size": 32, "max_epochs": 6}),
    ],
)
def test_a_control_keeps_every_relu_whatever_a_mask_is(parts, trained, method, settings):
    whole = list(build(method, control=True, **settings).linearize(trained, parts[0], [1.0, 0.5]))[-1]
    assert whole.relus == relu_count(whole.model) == TOTAL
    assert all(layer.weight is None for layer in masked_relus(whole.model).values())
    assert not torch.equal(predict(whole.model, parts[2]), predict(trained, parts[2]))


def test_a_control_needs_masks_to_go_by(parts, trained):
    with pytest.raises(FairlineError, match="as long as masks are learned: give a smaller budget"):
        cuts_of(trained, parts[0], [1.0], control=True)


def test_a_sweep_gives_what_single_runs_give(parts, trained):
    sweep = cuts_of(trained, parts[0], [0.5, 0.1])
    for cut in sweep:
        (alone,) = cuts_of(trained, parts[0], [cut.budget])
        assert torch.equal(kept(alone.model), kept(cut.model))
        assert torch.equal(predict(alone.model, parts[2]), predict(cut.model, parts[2]))


def test_published_stopping_rule_lands_at_or_below_the_budget(parts, trained):
    (cut,) = cuts_of(trained, parts[0], [0.5], exact=False)
    assert cut.relus == cut.info["open"] <= TOTAL // 2
    (exact,) = cuts_of(trained, parts[0], [0.5])
    assert not (kept(cut.model) & ~kept(exact.model)).any()


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_coarse_masks_switch_whole_units(parts, trained, granularity):
    for cut in cuts_of(trained, parts[0], [0.5, 0.1], granularity=granularity):
        assert cut.relus <= cut.budget
        for layer in masked_relus(cut.model).values():
            units = layer.kept.flatten(1) if granularity == "channel" else layer.kept.flatten()[None]
            assert ((units.sum(1) == 0) | (units.sum(1) == units.shape[1])).all()


@pytest.mark.parametrize("stop_after_epochs", [1, 6])
def test_a_broken_run_resumes_to_the_same_networks(parts, trained, tmp_path, stop_after_epochs):
    budgets = [0.5, 0.1]
    reference_history: list[dict[str, float]] = []
    reference = list(SNL(**FAST).linearize(trained, parts[0], budgets, history=reference_history))

    class Stop(Exception):
        pass

    def breaker():
        batches = -(-len(parts[0]) // 32)

        def report(update):
            if update.done == stop_after_epochs * batches + 2:
                raise Stop

        return report

    with pytest.raises(Stop):
        list(SNL(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path, progress=breaker()))
    history: list[dict[str, float]] = []
    resumed = list(SNL(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path, history=history))
    # And once more, when every snapshot exists.
    again = list(SNL(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path))
    for first, second, third in zip(reference, resumed, again, strict=True):
        assert torch.equal(kept(first.model), kept(second.model))
        assert torch.equal(predict(first.model, parts[2]), predict(second.model, parts[2]))
        assert torch.equal(predict(first.model, parts[2]), predict(third.model, parts[2]))
        assert first.info == second.info == third.info

    def without_time(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    # Validation columns are NaN, which equals nothing.
    drop = {"val_loss", "val_accuracy", "val_worst_group_accuracy"}
    clean = [{k: v for k, v in row.items() if k not in drop} for row in without_time(history)]
    assert clean == [{k: v for k, v in row.items() if k not in drop} for row in without_time(reference_history)]


def test_masks_are_learned_under_any_objective(parts, trained):
    class Other(ERM):
        called = 0

        def reduce(self, losses, batch):
            Other.called += 1
            return losses.max()

    (plain,) = cuts_of(trained, parts[0], [0.3])
    (other,) = cuts_of(trained, parts[0], [0.3], objective=Other())
    assert Other.called > 0
    assert not torch.equal(kept(plain.model), kept(other.model))


def test_stops_lazily(parts, trained):
    """Taking the first budget does not run to the last."""
    history: list[dict[str, float]] = []
    first = next(iter(SNL(**FAST).linearize(trained, parts[0], [0.9, 1], history=history)))
    assert first.relus == round(0.9 * TOTAL)
    assert len(history) < 30


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([TOTAL + 1], "449 ReLUs is impossible: the network has 448"),
        ([1.2], "fraction 1.2"),
        ([-1], "-1 ReLUs"),
        ([], "No ReLU budget"),
    ],
)
def test_impossible_budgets(parts, trained, budgets, message):
    with pytest.raises(FairlineError, match=message):
        cuts_of(trained, parts[0], budgets)


def test_budgets_are_counts_or_fractions():
    assert resolve_budgets([0.5, 1, 1.0, 0.02], 491_520) == [491_520, 245_760, 9_830, 1]
    assert resolve_budgets([0.5, 245_760], 491_520) == [245_760]
    assert resolve_budgets([np.int64(5), np.int32(1), np.uint8(7)], 448) == [7, 5, 1]
    assert resolve_budgets(np.array([5, 1]), 448) == [5, 1]
    assert resolve_budgets([np.float32(0.5), np.float64(1.0)], 448) == [448, 224]
    with pytest.raises(FairlineError, match="A budget of 449 ReLUs is impossible"):
        resolve_budgets([np.int64(449)], 448)
    with pytest.raises(FairlineError, match="the fraction nan is impossible"):
        resolve_budgets([np.float32("nan")], 448)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, "pixel, channel or layer"),
        ({"lr": 0}, "lr > 0"),
        ({"lam": -1e-5}, "lam > 0"),
        ({"growth": 0.5}, "growth ≥ 1"),
        ({"speed": 3}, "Linearizer 'snl'.*speed"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        build("snl", **options)
    with pytest.raises(FairlineError, match="no linearizer 'magic'; choose one of snl"):
        build("magic")


def test_a_model_without_relus(parts):
    with pytest.raises(FairlineError, match="no ReLU"):
        cuts_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), parts[0], [0.5])


def test_defaults_are_the_published_ones():
    snl = SNL()
    assert (snl.lam, snl.growth, snl.patience, snl.threshold) == (1e-5, 1.1, 5, 1e-2)
    assert (snl.lr, snl.temperature, snl.batch_size, snl.max_epochs) == (1e-3, 4.0, 128, 2000)
    assert list(itertools.islice(resolve_budgets([0.5], 10), 1)) == [5]
