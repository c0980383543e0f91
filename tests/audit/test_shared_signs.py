"""Corrections of units that share signs are taken out one by one, and no other unit's sign turns."""

from __future__ import annotations

import torch

from fairline import BlockReLU
from fairline.audit.ablation import Ablation
from fairline.masking import copy_model, masked_relus


def test_each_decided_unit_is_a_correction_of_its_own(parts, trained):
    (cut,) = BlockReLU(samples=30).linearize(trained, parts[0], [60])
    ablation = Ablation(cut.model, parts[2], torch.device("cpu"))
    assert ablation.count == len(ablation.units()) == cut.info["units"] > cut.relus == 60
    images = parts[2].normalized(slice(5))
    name, position = ablation.units()[0]
    alone = torch.zeros_like(ablation.kept[name])
    alone.view(-1)[position] = True
    gates = []
    for taken in ({}, {name: alone}):
        with ablation.without(taken):
            layer = ablation.layers[name]
            x = torch.randn(5, *layer.shape, generator=torch.Generator().manual_seed(0))
            gates.append((layer(x) == x) | alone)
    assert torch.equal(*gates)
    # Put back, it is the network again; and with all corrections out, affine.
    with torch.no_grad():
        assert torch.equal(ablation.network(images), copy_model(cut.model).eval()(images))
        with ablation.without(ablation.kept):
            assert not any(layer.num_kept for layer in masked_relus(ablation.network).values())
            a, b = images[:1], images[1:2]
            torch.testing.assert_close(
                ablation.network((a + b) / 2), (ablation.network(a) + ablation.network(b)) / 2, rtol=1e-4, atol=1e-4
            )
