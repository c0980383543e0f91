"""How often 95 % limits hold the truth: images drawn from known chances, the limits of an audit and a comparison.

A scenario gives each group the chance that the base network is right, and that the linearized one is where the base
network is right and where it is wrong. Each row is a scenario at one size of all groups; "mixed" has groups of 1,000,
50, 10 and 2 images in one data set.

    python benchmarks/coverage.py [--draws 2000] [--resamples 2000] [--sizes 2 10 50 1000]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import numpy as np

from fairline.audit.accuracy import relative_drop
from fairline.audit.intervals import (
    draw,
    draws_needed,
    gap_interval,
    lowest_interval,
    percentile_interval,
    pooled,
)

#: Base network right; linearized right where it is; where it is not. One a group.
SCENARIOS = {
    "equal": [(0.9, 0.95, 0.2)] * 5,
    "unequal": [(0.95, 0.98, 0.2), (0.93, 0.97, 0.2), (0.9, 0.95, 0.2), (0.85, 0.9, 0.2), (0.7, 0.8, 0.2)],
    "two groups": [(0.9, 0.95, 0.2), (0.75, 0.85, 0.2)],
    "few errors": [(0.99, 0.995, 0.3)] * 3 + [(0.97, 0.98, 0.3)] * 2,
}
MIXED = (1000, 50, 10, 2)

Limits = dict[str, tuple[float, float]]


def truth(groups: Sequence[tuple[float, float, float]], sizes: Sequence[int]) -> dict[str, float]:
    """What the limits should hold."""
    before = np.array([b for b, _, _ in groups])
    after = np.array([b * kept + (1 - b) * won for b, kept, won in groups])
    drop = relative_drop(before, after)
    return {
        "accuracy": after[-1],
        "overall": np.average(after, weights=sizes),
        "difference": after[-1] - before[-1],
        "relative drop": drop[-1],
        "worst group": after.min(),
        "gap": np.ptp(after),
        "gap of drops": np.ptp(drop),
        "worst group's gain": after.min() - before.min(),
    }


def images(
    groups: Sequence[tuple[float, float, float]], sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Whether each image of each group is right, bool, (n, 2): under the linearized and the base network."""
    found = []
    for (b, kept, won), n in zip(groups, sizes, strict=True):
        before = rng.random(n) < b
        found.append(np.stack([rng.random(n) < np.where(before, kept, won), before], axis=1))
    return found


def limits(correct: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> Limits:
    """As ``audit.accuracy`` and ``audit.comparison`` make them; those of one group are the last one's."""
    draws = draws_needed(len(correct), resamples)
    drawn = [draw(own, draws, rng) for own in correct]
    accuracy = np.stack([own.shares([0], [1])[0] for own in drawn])
    paired = np.stack([own.shares([0, 1], [1, -1]) for own in drawn])
    drops = np.stack([relative_drop(*own.shares([1, 0], [1, -1])) for own in drawn])
    defined = np.array([own[:, 1].any() for own in correct])
    worst = paired.min(0)
    none = math.nan, math.nan
    return {
        "accuracy": percentile_interval(accuracy[-1]),
        "overall": percentile_interval(pooled(drawn, rng).shares([0], [1])[0]),
        "difference": percentile_interval(paired[-1, 0] - paired[-1, 1]),
        "relative drop": percentile_interval(drops[-1]) if defined[-1] else none,
        "worst group": lowest_interval(accuracy),
        "gap": gap_interval(accuracy),
        "gap of drops": gap_interval(drops[defined]) if defined.all() else none,
        "worst group's gain": percentile_interval(worst[0] - worst[1]),
    }


def coverage(
    groups: Sequence[tuple[float, float, float]], sizes: Sequence[int], draws: int, resamples: int, seed: int = 0
) -> dict[str, float]:
    """Share of the draws whose limits hold the truth, of those that have limits."""
    rng = np.random.default_rng(seed)
    known = truth(groups, sizes)
    held: dict[str, list[bool]] = {name: [] for name in known}
    for _ in range(draws):
        for name, (low, high) in limits(images(groups, sizes, rng), resamples, rng).items():
            if not math.isnan(low):
                # Rounding: a lower limit of 0 for a gap of 0.
                held[name].append(low - 1e-9 <= known[name] <= high + 1e-9)
    return {name: float(np.mean(own)) for name, own in held.items()}


def table(sizes: Sequence[int], draws: int, resamples: int) -> Iterator[dict[str, object]]:
    """Rows of the table."""
    for n in sizes:
        for name, groups in SCENARIOS.items():
            yield {"images": f"{n:,}", "scenario": name, **coverage(groups, [n] * len(groups), draws, resamples)}
    yield {
        "images": "mixed",
        "scenario": "unequal",
        **coverage(SCENARIOS["unequal"][1:], MIXED, draws, resamples),
    }


def main() -> None:
    """Print the table, in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="data sets drawn for each row")
    parser.add_argument("--resamples", type=int, default=2000, help="as of an audit")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 10, 50, 1000], help="images of each group")
    options = parser.parse_args()
    names: list[str] = []
    for row in table(options.sizes, options.draws, options.resamples):
        if not names:
            names = list(row)
            print("| " + " | ".join(names) + " |")
            print("|" + "---|" * len(names))
        cells = [f"{100 * value:.1f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
