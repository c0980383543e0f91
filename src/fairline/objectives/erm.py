"""Empirical risk minimisation: the mean loss, blind to groups."""

from __future__ import annotations

from fairline.objectives.base import Objective


class ERM(Objective):
    """Minimise the mean of ``CE + T²·KL`` over samples; the finetune of SNL (Cho et al. 2022, Algorithm 1)."""
