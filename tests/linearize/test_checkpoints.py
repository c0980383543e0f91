"""A checkpoint folder belongs to one run; another one is refused, whatever differs."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from fairline.errors import FairlineError
from fairline.linearize import REGISTRY, SNL, build
from fairline.linearize.identity import described, network_digest
from fairline.masking import mask_relus, masked_relus
from fairline.objectives import ERM, GroupDRO, Lagrangian
from fairline.objectives import REGISTRY as OBJECTIVES
from fairline.training import finetune

FAST = {
    "snl": {"lr": 0.05, "lam": 1e-2, "batch_size": 64, "max_epochs": 8},
    "autorep": {"mask_lr": 0.1, "hold": 1, "batch_size": 64, "max_epochs": 8},
    "senet": {"sensitivity_epochs": 1, "mask_epochs": 1, "epochs": 1, "batch_size": 64, "samples": 50},
    "coordinate_descent": {"step": 120, "candidates": 2, "refresh_epochs": 1},
    "taylor": {"rate": 0.5, "batch_size": 64},
    "deepreduce": {"stages": "2,5,8", "criticality_epochs": 1, "reshape_epochs": 1},
    "delphi": {"population": 2, "generations": 1, "batch_size": 64},
    "safenet": {"population": 2, "generations": 1, "batch_size": 64, "samples": 50},
    "cryptonas": {"layers": 3, "search_epochs": 1, "controller_steps": 1, "samples": 1, "train_epochs": 1},
    "block_relu": {"samples": 40},
}


@pytest.mark.parametrize("name", REGISTRY)
def test_another_run_is_refused_in_one_sentence(parts, trained, tmp_path, name):
    settings = FAST.get(name, {})
    done = list(build(name, **settings).linearize(trained, parts[0], [300, 100], checkpoint=tmp_path))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other_network = copy.deepcopy(trained)
    with torch.no_grad():
        next(other_network.parameters()).view(-1)[0] += 1e-3
    surrogate = "identity" if name in ("autorep", "delphi") else "quadratic"
    # Beside shared signs no quadratic stands.
    changed = {"samples": 7} if name == "block_relu" else {"surrogate": surrogate}
    cases = [
        ("seed is 0 there and 1 here", {"seed": 1}, trained, parts[0], [300, 100]),
        (
            f"{next(iter(changed))} is",
            changed,
            trained,
            parts[0],
            [300, 100],
        ),
        (r"budgets is \[300, 100\] there and \[100\] here", {}, trained, parts[0], [100]),
        ("its training images were another", {}, trained, parts[0].select(torch.arange(120)), [300, 100]),
        ("its network was another", {}, other_network, parts[0], [300, 100]),
    ]
    for message, more, model, data, budgets in cases:
        with pytest.raises(FairlineError, match=f"another run \\({message}.*take another folder, or delete it"):
            list(build(name, **{**settings, **more}).linearize(model, data, budgets, checkpoint=tmp_path))
    with pytest.raises(FairlineError, match=r"another run \(method is"):
        list((SNL() if name != "snl" else build("random")).linearize(trained, parts[0], [300], checkpoint=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    # The same run goes on, and budgets may be written otherwise.
    again = build(name, **settings).linearize(trained, parts[0], [100, 300.0 / 448], checkpoint=tmp_path)
    for a, b in zip(done, again, strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_checkpoints_that_do_not_say_whose_they_are(parts, trained, tmp_path):
    """As an earlier version of fairline left them."""
    list(SNL(**FAST["snl"]).linearize(trained, parts[0], [300], checkpoint=tmp_path))
    (tmp_path / "linearization.json").unlink()
    with pytest.raises(FairlineError, match="do not say of which run they are"):
        list(SNL(**FAST["snl"]).linearize(trained, parts[0], [300], checkpoint=tmp_path))
    shutil.rmtree(tmp_path)
    (cut,) = SNL(**FAST["snl"]).linearize(trained, parts[0], [300], checkpoint=tmp_path)
    assert cut.relus == 300


def test_settings_as_json():
    assert described(Lagrangian(mu=0.5)) == described(Lagrangian(mu=0.5))
    assert described(Lagrangian(mu=0.5)) != described(Lagrangian(mu=0.25))
    assert described(Lagrangian(samples=None)) != described(Lagrangian(samples=100))
    assert described(ERM()) != described(GroupDRO())
    assert described(lambda alpha, rho: None) == described(lambda alpha, rho: None)
    assert described({"early": ("a", "b")}) == {"early": ["a", "b"]}
    json.dumps(described([Lagrangian(), None, 1.5, {"x": build}]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_that_has_been_used_is_the_same_setting(parts, trained, name):
    used = OBJECTIVES[name]()
    finetune(trained, copy.deepcopy(trained), *parts[:2], epochs=1, batch_size=64, objective=used)
    assert described(used) == described(OBJECTIVES[name]())


def test_masks_are_part_of_a_network(parts, trained):
    masked = mask_relus(trained, parts[0].normalized(slice(2)))
    whole = network_digest(masked)
    assert network_digest(copy.deepcopy(masked)) == whole
    layer = next(iter(masked_relus(masked).values()))
    layer.set_mask(torch.arange(layer.kept.numel()).view(layer.shape) > 0)
    assert network_digest(masked) != whole
