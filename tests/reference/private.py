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


def cheapest_blocks(m: int, k: int, n: int, degree: int, *, packed: bool) -> tuple[int, int, int]:
    """Block sizes of the cheapest cut, by trying every one in SPU's order; of several the last."""
    best, least = (1, 1, 1), math.inf
    for a in range(1, min(degree, m) + 1):
        for b in [2**i for i in range(k.bit_length())] if packed else range(1, k + 1):
            if a * b <= degree:
                c = min(n, degree // (a * b))
                rows, inner, columns = math.ceil(m / a), math.ceil(k / b), math.ceil(n / c)
                ciphertexts = min(rows, columns) * inner + math.ceil(rows * columns / b)
                rotations = math.ceil(m * n / degree) * b if packed else 0
                price = 1000 * ciphertexts + rotations + rows * inner * columns / 10
                if price <= least:
                    best, least = (a, b, c), price
    return best


def merges(there: list[bool]) -> int:
    """Merge the first half of a list into the second until one is left; count merges of which one side is there."""
    count = 0
    while len(there) > 1:
        half = len(there) // 2
        there = [one or other for one, other in zip(there[:half], there[half:], strict=True)]
        count += sum(there)
    return count
