"""The job of ``fairline theory`` (paper, Section 4 and Appendix A.1)."""

from __future__ import annotations

from pathlib import Path

import torch

from fairline._io import write_table
from fairline.data import load
from fairline.errors import FairlineError
from fairline.jobs._common import do_once
from fairline.runs import Run
from fairline.theory import balance, toy
from fairline.theory.rates import rates
from fairline.training import Progress, ProgressCallback


def theory_job(out: str | Path, *, seeds: int = 100, progress: ProgressCallback | None = None) -> Run:
    """Run Figures 2 and 10, Proposition 4.1's rate and Appendix A.1 into ``out``: parquet tables.

    :func:`fairline.report.theory.write_theory_figures` draws them.

    Args:
        out: The run folder.
        seeds: Networks of each kind in Figure 2.
        progress: Told how far it is.

    Returns:
        The run.

    Raises:
        FairlineError: Fewer than two seeds.
    """
    if seeds < 2:
        raise FairlineError(f"An interval over seeds needs two of them at least, not {seeds}.")

    def seen(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("Figure 2", done, total))

    def work(run: Run) -> None:
        result = toy.run(seeds, seen=seen)
        found = result.tables()
        tables = {
            "figure_2": found["accuracy"],
            "figure_2_map": found["map"],
            "figure_2_points": found["points"],
            "figure_2_summary": result.summary(),
            "proposition_4_1": rates()[0],
            "appendix_a1": balance.check(load("digits").split(seed=0)[0]),
        }
        for name, table in tables.items():
            write_table(run.folder / f"{name}.parquet", table)

    return do_once(out, "theory", {"seeds": seeds}, torch.device("cpu"), work)
