"""Layers that zero or the identity stands in for are affine, so that a network may end early behind them."""

from __future__ import annotations

import pytest
import torch

import fairline as fl
from fairline.inference import predict
from fairline.linearize.structure import close
from fairline.masking import mask_relus, masked_relus


@pytest.mark.parametrize("degrees", [(0, 0, 0, 0), (0, 1, 0, 1)])
def test_a_tail_of_zeros_is_one_matrix(parts, trained, degrees):
    model = mask_relus(trained, parts[0].normalized(slice(2)))
    layers = masked_relus(model)
    for layer in layers.values():
        layer.use_degrees(torch.tensor(degrees).repeat(layer.shape[0] // 4))
    close(model, list(layers)[1:])
    compiled = fl.compile(model.eval(), torch.zeros(1, 1, 8, 8), protocol="semi2k", minimise="rounds")
    images = parts[2]
    torch.testing.assert_close(predict(compiled, images), predict(model, images), rtol=1e-4, atol=1e-4)
    assert not any(node.op == "polynomial" for node in compiled.graph().nodes)
