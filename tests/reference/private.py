"""Slow and obviously right: which ReLUs an exported network may still evaluate, and ways to cut a matrix product."""

from __future__ import annotations

import math

import numpy as np


def pareto(cost: list[float], score: list[float]) -> list[bool]:
    """Point by point, by the definition."""
    front = []
    for i in range(len(cost)):
        beaten = any(
            cost[j] <= cost[i] and score[j] >= score[i] and (cost[j] < cost[i] or score[j] > score[i])
            for j in range(len(cost))
        )
        front.append(not beaten)
    return front


def fixed_point_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    """``x @ weight.T + bias`` with every number rounded to ``bits`` fraction bits, in exact Python integers."""
    scale = 1 << bits
    whole = [[round(float(v) * scale) for v in row] for row in x]
    weights = [[round(float(v) * scale) for v in row] for row in weight]
    offsets = [round(float(v) * scale) for v in bias]
    out = [
        [
            (sum(a * b for a, b in zip(row, column, strict=True)) >> bits) + c
            for column, c in zip(weights, offsets, strict=True)
        ]
        for row in whole
    ]
    return np.array(out, float) / scale


def cheapest_cut(m: int, k: int, n: int, degree: int) -> float:
    """Price of the cheapest cut into blocks of which one product fits into a polynomial, by trying every one."""
    best = math.inf
    packed_inner = [2**i for i in range(20) if 2**i <= k]
    for rows in range(1, m + 1):
        for inner in packed_inner:
            for columns in range(1, n + 1):
                if rows * inner * columns <= degree:
                    a, b, c = (math.ceil(size / block) for size, block in ((m, rows), (k, inner), (n, columns)))
                    ciphertexts = min(a, c) * b + math.ceil(a * c / inner)
                    rotations = math.ceil(m * n / degree) * inner
                    best = min(best, 1000 * ciphertexts + rotations + a * b * c / 10)
    return best
