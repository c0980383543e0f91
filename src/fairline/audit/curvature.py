"""Largest Hessian eigenvalue of each group's loss (paper, Theorem 4.4 and Figure 4), by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairline.audit.base import Row, Subject
from fairline.audit.functional import Functional, Product
from fairline.audit.intervals import mean_interval
from fairline.audit.lanczos import Extreme, largest_eigenvalue, start_vector
from fairline.errors import FairlineError

Matrix = Literal["hessian", "ggn"]
MATRICES: tuple[Matrix, ...] = ("hessian", "ggn")
#: Samples of the subsample that the start vector comes from, at least.
SUBSAMPLE = 48


def product_of(functional: Functional, index: Tensor, matrix: Matrix) -> Product:
    """Products with the Hessian or the generalized Gauss–Newton matrix of the mean loss over ``index``."""
    return functional.hessian_product(index) if matrix == "hessian" else functional.ggn_product(index)


def group_curvature(
    functional: Functional,
    index: Tensor,
    matrix: Matrix = "hessian",
    *,
    tolerance: float = 1e-2,
    max_products: int = 100,
    seed: int = 0,
    seen: Callable[[int], None] | None = None,
) -> Extreme:
    """λ_max of ∇²J(θ; S) or of the generalized Gauss–Newton matrix, S all samples in ``index``.

    A random subsample is cheap to iterate on, and its top eigenvectors lie close to those of the whole group; one to
    three products over the whole group then suffice. All eigenvectors whose values come close to the largest enter
    the start, so that the subsample does not decide which one is largest. The subsample also tells the gap below
    the largest eigenvalue, from which the error follows. Small groups are iterated on from a random vector.

    Args:
        functional: The network on its data.
        index: Sample positions.
        matrix: Which one.
        tolerance: Relative error to stop at.
        max_products: Products to take at most, each a pass over S.
        seed: Of the start vector and the subsample.
        seen: Told after each product how many there have been.

    Returns:
        The eigenvalue, nats per squared unit of parameter distance. ``products`` counts those over the whole of S.
    """
    start = start_vector(functional.size, seed, functional.device, functional.dtype)
    gap = None
    order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
    few = max(SUBSAMPLE, len(index) // 32)
    if len(index) >= 4 * few:
        product = product_of(functional, order[:few], matrix)
        rough = largest_eigenvalue(product, start, tolerance=max(tolerance, 0.05), max_products=max_products)
        # A matrix without a positive eigenvalue leaves no direction worth starting from.
        if rough.value > 0:
            start, gap = rough.direction, rough.gap
    return largest_eigenvalue(
        product_of(functional, index, matrix),
        start,
        tolerance=tolerance,
        max_products=max_products,
        gap=gap,
        seen=seen,
    )


def hessian_trace(
    functional: Functional, index: Tensor, matrix: Matrix = "hessian", *, products: int = 30, seed: int = 0
) -> float:
    """Trace of the group's curvature matrix by Hutch++ (Meyer et al. 2021), through curvlinops.

    Args:
        functional: The network on its data.
        index: Sample positions.
        matrix: Which one.
        products: Matrix–vector products to spend, a multiple of 3.
        seed: Of the random vectors.

    Returns:
        The trace, nats per squared unit of parameter distance.

    Raises:
        FairlineError: The number of products does not suit.
    """
    from curvlinops import hutchpp_trace

    if products < 3 or products % 3 or products >= functional.size:
        raise FairlineError(
            f"The trace takes a number of products that is a multiple of 3 below the number of parameters, "
            f"not {products}."
        )
    operator = _operator(functional, product_of(functional, index, matrix))
    with torch.random.fork_rng(devices=[functional.device] if functional.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return float(hutchpp_trace(operator, products))


def _operator(functional: Functional, product: Product) -> Any:
    """The product as curvlinops takes it: on matrices whose columns are the vectors."""
    # curvlinops exports its operators and not their base class.
    from curvlinops._torch_base import PyTorchLinearOperator

    class Operator(PyTorchLinearOperator):
        SELF_ADJOINT = True

        def __init__(self) -> None:
            super().__init__([(functional.size,)], [(functional.size,)])

        @property
        def device(self) -> torch.device:
            return functional.device

        @property
        def dtype(self) -> torch.dtype:
            return functional.dtype

        def _matmat(self, matrix: list[Tensor]) -> list[Tensor]:
            columns = [product(column).to(functional.dtype) for column in matrix[0].unbind(-1)]
            return [torch.stack(columns, dim=-1)]

    return Operator()


def measure(
    subject: Subject,
    *,
    matrices: str | Sequence[str] = ("hessian",),
    tolerance: float = 1e-2,
    max_products: int = 100,
    samples: int | None = None,
    repeats: int = 5,
    trace: int = 0,
) -> list[Row]:
    """Rows for the curvature, nats per squared unit of parameter distance.

    Measures, for ``hessian`` and likewise for ``ggn``: ``hessian_max``; ``hessian_error``, its estimated relative
    error; ``hessian_products``, the products taken; ``hessian_converged``, 1 if the error met the tolerance.
    With ``samples``, ``hessian_max`` is the mean over random subsamples with a 95 % t interval from their standard
    error ``hessian_se``; λ_max of a subsample is biased upwards, and the interval does not cover that bias. With
    ``trace``, also ``hessian_trace``.

    Args:
        subject: The model.
        matrices: ``"hessian"``, ``"ggn"`` or both.
        tolerance: Relative error to stop at.
        max_products: Products to take at most, each a pass over the group.
        samples: Use random subsamples of so many of a group's samples; the whole group by default.
        repeats: Subsamples to average over.
        trace: Products to spend on the trace; none by default.

    Returns:
        The rows.

    Raises:
        FairlineError: An option is out of range.
    """
    matrices = [matrices] if isinstance(matrices, str) else list(matrices)
    for matrix in matrices:
        if matrix not in MATRICES:
            raise FairlineError(f"Curvature knows the matrices {' and '.join(MATRICES)}, not '{matrix}'.")
    if not 0 < tolerance < 1:
        raise FairlineError(f"The tolerance of curvature is a relative error between 0 and 1, not {tolerance:g}.")
    if max_products < 1:
        raise FairlineError(f"Curvature needs at least one product, not {max_products}.")
    if samples is not None and (samples < 1 or repeats < 2):
        raise FairlineError(
            f"Subsamples need a sample and two repeats at least, not {samples} samples and {repeats} repeats."
        )
    rows = []
    for matrix in MATRICES:
        if matrix not in matrices:
            continue
        for name, index in subject.group_index():
            if samples is None or samples >= len(index):
                rows += _whole(subject, name, index, matrix, tolerance, max_products)
            else:
                rows += _subsampled(subject, name, index, matrix, tolerance, max_products, samples, repeats)
            if trace:
                value = hessian_trace(
                    subject.functional, torch.from_numpy(index), matrix, products=trace, seed=subject.seed
                )
                rows.append(Row(name, f"{matrix}_trace", value, n=len(index)))
    return rows


def once(
    subject: Subject, name: str, matrix: Matrix = "hessian", tolerance: float = 1e-2, max_products: int = 100
) -> Extreme:
    """λ_max of one group of a subject, over all its samples, computed once."""

    def compute() -> Extreme:
        _ = subject.predictions
        index = torch.from_numpy(dict(subject.group_index())[name])
        position, groups = subject.data.group_names.index(name), subject.data.num_groups

        def seen(products: int) -> None:
            subject.report(f"{matrix} eigenvalues", position, groups, f"{name}, product {products}")

        result = group_curvature(
            subject.functional,
            index,
            matrix,
            tolerance=tolerance,
            max_products=max_products,
            seed=subject.seed,
            seen=seen,
        )
        subject.report(f"{matrix} eigenvalues", position + 1, groups, f"{name}: {result.value:.4g}")
        return result

    return subject.once(("curvature", name, matrix, tolerance, max_products), compute)


def _whole(
    subject: Subject, name: str, index: NDArray[np.int64], matrix: Matrix, tolerance: float, max_products: int
) -> list[Row]:
    result = once(subject, name, matrix, tolerance, max_products)
    return _rows(name, matrix, result, len(index))


def _rows(name: str, matrix: Matrix, result: Extreme, n: int) -> list[Row]:
    return [
        Row(name, f"{matrix}_max", result.value, n=n),
        Row(name, f"{matrix}_error", result.relative_error, n=n),
        Row(name, f"{matrix}_products", result.products, n=n),
        Row(name, f"{matrix}_converged", float(result.converged), n=n),
    ]


def _subsampled(
    subject: Subject,
    name: str,
    index: NDArray[np.int64],
    matrix: Matrix,
    tolerance: float,
    max_products: int,
    samples: int,
    repeats: int,
) -> list[Row]:
    rng = np.random.default_rng([subject.seed, *index[:1]])
    results = []
    for repeat in range(repeats):
        chosen = torch.from_numpy(rng.choice(index, samples, replace=False))
        results.append(
            group_curvature(
                subject.functional,
                chosen,
                matrix,
                tolerance=tolerance,
                max_products=max_products,
                seed=subject.seed + repeat,
            )
        )
        subject.report(f"{matrix} eigenvalues of {name}", repeat + 1, repeats)
    values = np.array([result.value for result in results])
    error = float(values.std(ddof=1) / math.sqrt(repeats))
    return [
        Row(name, f"{matrix}_max", float(values.mean()), *mean_interval(values), n=samples),
        Row(name, f"{matrix}_se", error, n=samples),
        Row(name, f"{matrix}_error", max(r.relative_error for r in results), n=samples),
        Row(name, f"{matrix}_products", sum(r.products for r in results), n=samples),
        Row(name, f"{matrix}_converged", float(all(r.converged for r in results)), n=samples),
    ]
