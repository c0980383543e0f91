"""What ranks compute together is what one process computes: parts, rows, sums, gradients, batch normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairline.errors import FairlineError
from fairline.ranks import Ranks, here
from fairline.ranks.group import Group
from fairline.ranks.normalization import SharedBatchNorm
from tests.ranks.threads import together

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=st.integers(1, 60), size=st.integers(2, 7), unit=st.integers(1, 9))
def test_parts_are_all_things_once_and_as_even_as_units_allow(n, size, unit):
    parts = [list(range(n)[Group(rank, size, CPU).part(n, unit)]) for rank in range(size)]
    units = -(-n // unit)
    if units < size:
        assert parts == [list(range(n))] * size
        return
    assert [each for part in parts for each in part] == list(range(n))
    assert all(part and part[0] % unit == 0 for part in parts)
    counts = [-(-len(part) // unit) for part in parts]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=25)
@given(n=st.integers(1, 12), size=st.integers(2, 4), unit=st.integers(1, 3))
def test_rows_and_sums_of_all_parts(n, size, unit):
    rows = normal(n, 2)

    def work(ranks: Group):
        own = rows[ranks.part(n, unit)]
        return ranks.gather(own, n, unit), ranks.sum(own.sum(0), n, unit)

    for gathered, total in together(size, work):
        assert torch.equal(gathered, rows)
        torch.testing.assert_close(total, rows.sum(0))


def loss_of(logits: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """Not a sum over samples, and with a penalty that all ranks compute alike."""
    return logits.logsumexp(0).square().sum() + 0.1 * sum(p.square().sum() for p in network.parameters())


@pytest.mark.parametrize("n", [2, 7, 9])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_and_statistics_are_those_of_the_whole_batch(n, checkpointed):
    """Also of a batch too small to be divided among three, and through blocks that are computed again."""

    def network() -> nn.Module:
        torch.manual_seed(3)
        layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)
        return nn.Sequential(*layers).double()

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    images = normal(n, 2, 4, 4)
    whole = network()
    loss_of(forward(whole, images), whole).backward()
    models = [network() for _ in range(3)]

    def work(ranks: Group):
        model = models[ranks.rank]
        with ranks.dividing(n, CPU):
            own = forward(model, images[ranks.part(n)])
        logits = ranks.gather(own, n)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ranks.backward(loss_of(logits, model), optimizer)

    with torch.random.fork_rng():
        together(3, work)
    for model in models:
        for own, expected in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(own.grad, expected.grad)
        for own, expected in zip(model.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(own, expected)


@settings(max_examples=30)
@given(
    n=st.integers(2, 9),
    spatial=st.lists(st.integers(1, 3), max_size=3),
    affine=st.booleans(),
    tracked=st.booleans(),
    momentum=st.sampled_from([0.1, 1.0, None]),
    offset=st.sampled_from([0.0, 1e5]),
)
def test_shared_batch_normalisation_is_torchs_on_the_whole_batch(n, spatial, affine, tracked, momentum, offset):
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

    def layer() -> nn.Module:
        made = kinds[len(spatial)](3, affine=affine, track_running_stats=tracked, momentum=momentum).double()
        if affine:
            nn.init.uniform_(made.weight, 0.5, 2, generator=torch.Generator().manual_seed(0))
            nn.init.uniform_(made.bias, -1, 1, generator=torch.Generator().manual_seed(1))
        return made

    x, weights = normal(n, 3, *spatial, seed=1) + offset, normal(n, 3, *spatial, seed=2)
    expected = layer()
    whole = x.clone().requires_grad_()
    out = expected(whole)
    (out * weights).sum().backward()

    def work(ranks: Group):
        made, part = layer(), ranks.part(n)
        own = x[part].clone().requires_grad_()
        with SharedBatchNorm(ranks):
            result = made(own)
            (result * weights[part]).sum().backward()
        return result.detach(), own.grad, made

    results = together(2, work)
    # A mean of 1e5 leaves fewer digits.
    close = {"rtol": 1e-6, "atol": 1e-6 if offset else 1e-9}
    torch.testing.assert_close(torch.cat([result for result, _, _ in results]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), whole.grad, **close)
    for _, _, made in results:
        for own, known in zip(made.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(own, known, **close)
    if affine:
        for name in ("weight", "bias"):
            parts = sum(getattr(made, name).grad for _, _, made in results)
            torch.testing.assert_close(parts, getattr(expected, name).grad, **close)


def test_batch_normalisation_in_evaluation_mode_is_left_alone():
    layer, x = nn.BatchNorm2d(2).eval(), normal(3, 2, 2, 2).float()

    def work(ranks: Group):
        with SharedBatchNorm(ranks):
            return layer(x)

    for result in together(2, work):
        assert torch.equal(result, layer(x))


def test_one_value_a_channel_is_refused_in_torchs_words():
    class One:
        rank, size = 0, 1

        def total(self, tensor):
            return tensor

    with SharedBatchNorm(One()), pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(normal(1, 2), None, None, training=True)


def test_a_parameter_that_one_ranks_images_do_not_reach_has_the_gradient_of_the_other():
    def work(ranks: Group):
        both, some, none = (nn.Parameter(torch.ones(2)) for _ in range(3))
        loss = both.sum() + (3 * some.sum() if ranks.rank == 1 else 0)
        ranks.backward(loss, torch.optim.SGD([both, some, none], lr=0.1))
        return both.grad, some.grad, none.grad

    for both, some, none in together(2, work):
        assert torch.equal(both, torch.ones(2))
        assert torch.equal(some, torch.full((2,), 1.5))
        assert none is None


def test_the_first_ones_word_and_its_error_are_everybodys():
    assert together(3, lambda ranks: ranks.first(lambda: ranks.rank)) == [0, 0, 0]

    def refuse():
        raise FairlineError("No.")

    def work(ranks: Group):
        with pytest.raises(FairlineError, match=r"No\."):
            ranks.first(refuse)
        return True

    assert together(2, work) == [True, True]


def test_agreeing_takes_over_the_first_ones_state():
    layers = [nn.BatchNorm1d(2) for _ in range(3)]
    for position, layer in enumerate(layers):
        layer.running_mean.fill_(position)
    together(3, lambda ranks: ranks.agree(layers[ranks.rank]))
    assert all(layer.running_mean.eq(0).all() for layer in layers)


def test_alone_everything_is_trivial():
    alone, rows = Ranks(), normal(3, 2)
    assert alone.is_first
    assert alone.gather(rows, 3) is rows
    assert alone.sum(rows, 3) is rows
    assert alone.first(lambda: 5) == 5
    assert here().size == 1
