from __future__ import annotations

import copy
import math

import pytest
import torch

from fairline.errors import FairlineError
from fairline.linearize import SNL
from fairline.linearize.protect import Protection, covered
from fairline.masking import mask_relus, masked_relus
from tests.conftest import make_data

FAST = {"lr": 0.03, "lam": 1e-3, "batch_size": 64}


def damaged(trained, data):
    """A student whose loss has risen most for one group."""
    student = mask_relus(trained, data.normalized(slice(2)))
    for layer in masked_relus(student).values():
        layer.set_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    return student


def test_prices_are_the_ratio_of_uses(parts, trained):
    train = parts[0]
    student = damaged(trained, train)
    protection = Protection(train, trained, strength=1.0, samples=10_000, seed=0)
    worst, prices = protection.prices(student)

    # The loop: one image at a time, activations recorded as they pass.
    seen = {name: [] for name in masked_relus(student)}
    student.eval()
    trained.eval()
    rises = torch.zeros(3)
    with torch.no_grad():
        for name, layer in masked_relus(student).items():
            layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0].clone()))
        for i in range(len(train)):
            image = train.normalized(slice(i, i + 1))
            label, group = train.labels[i : i + 1], int(train.groups[i])
            loss = torch.nn.functional.cross_entropy
            rises[group] += loss(student(image), label) - loss(trained(image), label)
    rises /= torch.bincount(train.groups, minlength=3)
    assert worst == int(rises.argmax())
    ratios = {}
    for name, values in seen.items():
        bend = torch.stack(values).clamp_max(0).abs()
        use = torch.stack([bend[train.groups == g].mean(0) for g in range(3)])
        floor = use.mean() * 1e-2
        ratios[name] = (use.mean(0) + floor) / (use[worst] + floor)
    scale = torch.cat([r.flatten() for r in ratios.values()]).mean()
    for name, price in prices.items():
        torch.testing.assert_close(price, ratios[name] / scale, rtol=1e-4, atol=1e-6)


def test_no_strength_no_preference(parts, trained):
    _, prices = Protection(parts[0], trained, strength=0.0, samples=20, seed=0).prices(damaged(trained, parts[0]))
    assert all((price == 1).all() for price in prices.values())


def test_an_entry_that_covers_several_units_pays_for_all(trained, parts):
    student = mask_relus(trained, parts[0].normalized(slice(2)))
    layer = next(iter(masked_relus(student).values()))
    price = torch.rand(layer.shape)
    assert torch.equal(covered(price, layer), price)
    layer.learn("channel")
    torch.testing.assert_close(covered(price, layer), price.sum((1, 2), keepdim=True))
    layer.learn("layer")
    torch.testing.assert_close(covered(price, layer), price.sum().view(1, 1, 1))


@pytest.mark.parametrize("granularity", ["pixel", "channel"])
def test_protected_placement_keeps_what_the_suffering_group_uses(parts, trained, granularity):
    train = parts[0]
    kept = {}
    for strength in (0.0, 4.0):
        rows = []
        method = SNL(protect=strength, max_epochs=4, granularity=granularity, **FAST)
        (cut,) = method.linearize(trained, train, [0.25], history=rows)
        kept[strength] = torch.cat([layer.kept.flatten() for layer in masked_relus(cut.model).values()])
        assert ("protected_group" in rows[0]) == (strength > 0)
    assert not torch.equal(kept[0.0], kept[4.0])
    # By the protection's own measure, of the network before linearization.
    masked = mask_relus(trained, train.normalized(slice(2)))
    group = int(rows[-1]["protected_group"])
    protection = Protection(train, trained, strength=1.0, samples=10_000, seed=0)
    protection.before[group] = -1e9
    _, prices = protection.prices(masked)
    price = torch.cat([p.flatten() for p in prices.values()])
    assert price[kept[4.0]].mean() < price[kept[0.0]].mean()


def test_it_resumes_with_its_prices(parts, trained, tmp_path):
    def run(**more):
        method = SNL(protect=2.0, max_epochs=4, **FAST)
        return list(method.linearize(copy.deepcopy(trained), parts[0], [0.05], **more))

    class Stop(Exception):
        pass

    steps = math.ceil(len(parts[0]) / FAST["batch_size"])

    def breaker(update):
        if update.done > 2.5 * steps:
            raise Stop

    (whole,) = run()
    with pytest.raises(Stop):
        run(checkpoint=tmp_path, progress=breaker)
    (resumed,) = run(checkpoint=tmp_path)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bad_settings(parts, trained):
    with pytest.raises(FairlineError, match="protect ≥ 0"):
        SNL(protect=-1.0)
    one = make_data(60, classes=2, groups=1)
    with pytest.raises(FairlineError, match="needs two groups"):
        Protection(one, trained, 1.0, 10, 0)
