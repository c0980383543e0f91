from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.audit.curvature import SUBSAMPLE, group_curvature, hessian_trace
from fairline.audit.functional import Functional
from fairline.audit.lanczos import largest_eigenvalue, start_vector
from fairline.errors import FairlineError
from tests.audit.networks import KINDS, network, seen, small_data
from tests.reference import curvature as reference


def start(n: int, seed: int = 0) -> torch.Tensor:
    return start_vector(n, seed, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_products_by_the_full_matrices(kind):
    data, model = small_data(24), network(kind)
    index = torch.arange(3, 20)
    images, labels = seen(data, index)
    functional = Functional(model, data, batch_size=5)
    vector = start(functional.size)
    for product, full in (
        (functional.hessian_product(index), reference.hessian(model, images, labels)),
        (functional.ggn_product(index), reference.ggn(model, images)),
    ):
        torch.testing.assert_close(product(vector), full @ vector, rtol=1e-8, atol=1e-10)


def test_the_reference_hessian_by_finite_differences():
    data, model = small_data(12), network("masked")
    images, labels = seen(data, torch.arange(12))
    full = reference.hessian(model, images, labels)
    torch.testing.assert_close(reference.hessian_by_differences(model, images, labels), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-2)])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", KINDS)
def test_largest_eigenvalue_by_the_full_matrix(kind, matrix, dtype, tolerance):
    data = small_data(40)
    exact = network(kind)
    functional = Functional(network(kind, dtype=dtype), data, batch_size=9)
    for group in range(data.num_groups):
        index = torch.nonzero(data.groups == group).flatten()
        images, labels = seen(data, index)
        full = reference.hessian(exact, images, labels) if matrix == "hessian" else reference.ggn(exact, images)
        expected = float(torch.linalg.eigvalsh(full)[-1])
        found = group_curvature(functional, index, matrix, tolerance=tolerance / 2)
        assert found.converged
        assert found.value == pytest.approx(expected, rel=tolerance)


def test_as_curvlinops_has_it():
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    data, model = small_data(), network("convolutional")
    functional, index = Functional(model, data), torch.arange(len(data))
    vector = start(functional.size)
    for operator, product in (
        (HessianLinearOperator, functional.hessian_product(index)),
        (GGNLinearOperator, functional.ggn_product(index)),
    ):
        theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), [seen(data, index)])
        torch.testing.assert_close(theirs @ vector, product(vector), rtol=1e-6, atol=1e-9)


def symmetric(eigenvalues, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ q.T


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-10, 10).filter(lambda v: abs(v) > 1e-3), min_size=2, max_size=30),
    seed=st.integers(0, 100),
)
def test_lanczos_on_any_spectrum(values, seed):
    matrix = symmetric(values, seed)
    found = largest_eigenvalue(lambda v: matrix @ v, start(len(values), seed), tolerance=1e-6, max_products=100)
    assert found.converged
    assert found.value == pytest.approx(max(values), abs=1e-5 * max(abs(v) for v in values))


def test_ritz_values_rise_and_the_error_estimate_holds():
    matrix = symmetric([*np.linspace(-1, 1, 300), 1.2, 1.5], 3)
    previous = -math.inf
    for products in range(2, 14):
        found = largest_eigenvalue(lambda v: matrix @ v, start(302), tolerance=1e-12, max_products=products)
        assert previous - 1e-12 <= found.value <= 1.5 + 1e-12
        assert found.products == products
        assert not found.converged
        previous = found.value
    loose = largest_eigenvalue(lambda v: matrix @ v, start(302), tolerance=1e-2)
    assert loose.converged
    assert abs(loose.value / 1.5 - 1) < 1e-2


def test_special_operators():
    zero = largest_eigenvalue(torch.zeros_like, start(10))
    assert (zero.value, zero.error, zero.converged, zero.relative_error) == (0, 0, True, 0)
    identity = largest_eigenvalue(lambda v: 3 * v, start(10))
    assert identity.value == pytest.approx(3)
    assert identity.products == 1
    negative = largest_eigenvalue(lambda v: symmetric([-4, -3, -1, -2]) @ v, start(4), tolerance=1e-6)
    assert negative.value == pytest.approx(-1)
    counted = []
    largest_eigenvalue(lambda v: symmetric([1, 2, 5]) @ v, start(3), seen=counted.append)
    assert counted == list(range(1, len(counted) + 1))


def test_a_start_among_eigenvectors_of_a_subsample_finds_the_one_that_wins():
    """The subsample's order of two close eigenvalues is not the group's."""
    basis, _ = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    few = basis @ torch.tensor([10.0, 8.0, *[0.1] * 48], dtype=torch.float64).diag() @ basis.T
    all_ = basis @ torch.tensor([8.0, 10.0, *[0.1] * 48], dtype=torch.float64).diag() @ basis.T
    rough = largest_eigenvalue(lambda v: few @ v, start(50), tolerance=0.05)
    assert 0.1 < rough.gap <= 0.2 + 1e-9
    found = largest_eigenvalue(lambda v: all_ @ v, rough.direction, tolerance=1e-2, gap=rough.gap)
    assert found.value == pytest.approx(10, rel=1e-2)


def test_large_groups_start_from_a_subsample_and_agree():
    data = small_data(6 * SUBSAMPLE, classes=2, groups=1)
    model = network("convolutional", 2)
    index = torch.arange(len(data))
    expected = float(torch.linalg.eigvalsh(reference.hessian(model, *seen(data, index)))[-1])
    found = group_curvature(Functional(model, data), index)
    assert found.value == pytest.approx(expected, rel=1e-2)


def test_trace_by_the_full_matrix():
    data, model = small_data(30), network("perceptron")
    index = torch.arange(8)
    functional = Functional(model, data)
    exact = float(reference.ggn(model, seen(data, index)[0]).trace())
    # The matrix has rank 16 at most; with more products for its range than that the estimate is exact.
    assert hessian_trace(functional, index, "ggn", products=60) == pytest.approx(exact, rel=1e-4)
    few = [hessian_trace(functional, index, "ggn", products=12, seed=seed) for seed in range(5)]
    assert np.mean(few) == pytest.approx(exact, rel=0.2)
    assert hessian_trace(functional, index, "ggn", products=12, seed=3) == few[3]


def test_rows_of_an_audit():
    data, model = small_data(60), network("convolutional", dtype=torch.float32)
    updates = []
    report = fl.audit(
        model,
        data,
        measures=["curvature"],
        options={"curvature": {"matrices": ["hessian", "ggn"], "tolerance": 1e-3, "trace": 6}},
        progress=updates.append,
        device="cpu",
    )
    table = report.by_group
    exact = network("convolutional")
    for group, name in enumerate(data.group_names):
        index = torch.nonzero(data.groups == group).flatten()
        full = reference.hessian(exact, *seen(data, index))
        assert table.loc[name, "hessian_max"] == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-2)
        assert table.loc[name, "n"] == len(index)
    assert (table["hessian_error"] <= 1e-3).all()
    assert (table["hessian_converged"] == 1).all()
    assert (table["ggn_max"] > 0).all()
    assert table[["hessian_trace", "ggn_trace"]].notna().all(axis=None)
    assert {update.stage for update in updates} == {"model: hessian eigenvalues", "model: ggn eigenvalues"}
    assert any("class 1, product 2" in update.message for update in updates)
    assert updates[-1].done == updates[-1].total == data.num_groups


def test_the_cap_is_kept_and_said():
    data, model = small_data(60), network("convolutional", dtype=torch.float32)
    options = {"curvature": {"tolerance": 1e-6, "max_products": 2}}
    table = fl.audit(model, data, measures=["curvature"], options=options).by_group
    assert (table["hessian_products"] <= 2).all()
    assert (table["hessian_converged"] == 0).any()


def test_subsamples_have_a_standard_error():
    data, model = small_data(300), network("convolutional", dtype=torch.float32)
    options = {"curvature": {"samples": 20, "repeats": 8}}
    table = fl.audit(model, data, measures=["curvature"], options=options).by_group
    big = table.iloc[0]
    assert big["n"] == 20
    assert big["hessian_se"] > 0
    half = 2.364624 * big["hessian_se"]  # t quantile of 7 degrees of freedom
    assert big["hessian_max_high"] - big["hessian_max"] == pytest.approx(half, rel=1e-3)
    whole = fl.audit(model, data, measures=["curvature"]).by_group
    # λ_max is convex, so subsamples overestimate it on average.
    assert big["hessian_max"] > 0.9 * whole.iloc[0]["hessian_max"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrices": ["fisher"]}, "knows the matrices hessian and ggn, not 'fisher'"),
        ({"tolerance": 0}, "relative error between 0 and 1, not 0"),
        ({"max_products": 0}, "at least one product"),
        ({"samples": 0}, "a sample and two repeats at least, not 0 samples"),
        ({"samples": 5, "repeats": 1}, "two repeats at least"),
        ({"tolerance": "tight"}, "is a number, not 'tight'"),
        ({"trace": 4}, "a multiple of 3 below the number of parameters, not 4"),
        ({"speed": 2}, "knows no option 'speed'; it takes matrices, tolerance"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(FairlineError, match=message):
        fl.audit(
            network("perceptron", dtype=torch.float32),
            small_data(),
            measures=["curvature"],
            options={"curvature": options},
        )
