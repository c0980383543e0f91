"""A study's table with planted effects, for the figures and the claims."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fairline.study.store import COLUMNS

GROUPS = {"large": 4000, "middle": 2000, "small": 500}
BUDGETS = (100, 50, 10, 2)


def study_table(
    *,
    study: str = "planted",
    data: str = "utkface:race",
    model: str = "resnet18",
    method: str = "snl",
    seeds: Sequence[int] = (0, 1, 2, 3),
    slope: float = 4.0,
    loss: float = 0.1,
    gain: float | dict[str, float] = 3.0,
    mus: Sequence[float] = (0.005,),
    mu_effect: float = 0.0,
    ratio: float = 2.0,
    distance: float = 0.5,
    groups: dict[str, int] = GROUPS,
    data_options: str = "",
    noise: float = 0.1,
) -> pd.DataFrame:
    """Rows of one panel.

    Args:
        study: Name.
        data: Data set.
        model: Network.
        method: Linearizer.
        seeds: Seeds.
        slope: Points of drop, smallest less largest group, for each halving of the ReLUs.
        loss: Points of overall accuracy lost for each halving.
        gain: Points that Algorithm 1 gains, of all groups or of each.
        mus: Values of μ.
        mu_effect: Points of accuracy between successive values of μ.
        ratio: Gradient norm and λ_max of the smallest over the largest group; the margins' inverse.
        distance: Growth of ‖θ̃ − θ‖ for each halving.
        groups: Training images.
        data_options: As JSON.
        noise: Of the accuracies over seeds, in points.
    """
    rng = np.random.default_rng(0)
    names = list(groups)
    rows: list[dict[str, object]] = []
    gains = gain if isinstance(gain, dict) else dict.fromkeys(names, gain)

    def add(seed: int, percent: float, finetune: str, options: dict[str, float], group: str, **values: float) -> None:
        for measure, value in values.items():
            rows.append(
                {
                    **dict.fromkeys(COLUMNS, ""),
                    "study": study,
                    "scale": "Planted: numbers of a test.",
                    "data": data,
                    "data_label": data,
                    "data_options": data_options,
                    "model": model,
                    "seed": seed,
                    "stage": "finetuned" if finetune else "base",
                    "method": method if finetune else "",
                    "masks": method if finetune else "",
                    "surrogate": "identity",
                    "objective": finetune.partition("-")[0],
                    "objective_options": json.dumps(options),
                    "finetune": finetune,
                    "relus": round(100 * percent),
                    "asked": round(100 * percent),
                    "total_relus": 10_000,
                    "percent": percent,
                    "group": group,
                    "measure": measure,
                    "value": value,
                    "low": value - 0.01,
                    "high": value + 0.01,
                    "n": groups.get(group, sum(groups.values())) // 4,
                    "train_n": groups.get(group, sum(groups.values())),
                    "spec_hash": "0123456789abcdef",
                    "commit": "c" * 40,
                    "device": "CPU, 1 threads",
                }
            )

    variants = [("erm", {}), *((f"lagrangian-{i}" if i else "lagrangian", {"mu": mu}) for i, mu in enumerate(mus))]
    for seed in seeds:
        for place, group in enumerate(names):
            share = place / (len(names) - 1)
            before = 0.9 - 0.4 * share
            sharp = {
                name: ratio ** (sign * share) * (1 + 0.01 * noise * rng.normal())
                for name, sign in (("gradient_norm", 1), ("hessian_max", 1), ("margin", -1), ("margin_normalized", -1))
            }
            add(seed, 100, "", {}, group, accuracy=before, **sharp)
            for percent in BUDGETS[1:]:
                drop = slope * share * np.log2(100 / percent) + noise * rng.normal()
                for i, (finetune, options) in enumerate(variants):
                    helped = 0.0 if i == 0 else gains[group] + mu_effect * (i - 1) + noise * rng.normal()
                    accuracy = before * (1 - drop / 100) + helped / 100
                    dropped = 100 * (before - accuracy) / before
                    add(seed, percent, finetune, options, group, accuracy=accuracy, relative_drop=dropped, **sharp)
        add(seed, 100, "", {}, "overall", accuracy=0.8)
        for percent in BUDGETS[1:]:
            halvings = np.log2(100 / percent)
            for finetune, options in variants:
                add(
                    seed,
                    percent,
                    finetune,
                    options,
                    "overall",
                    accuracy=0.8 - loss / 100 * halvings + noise / 100 * rng.normal(),
                    parameter_distance=3 + distance * halvings + noise * 0.1 * rng.normal(),
                )
    return pd.DataFrame(rows)[list(COLUMNS)]
