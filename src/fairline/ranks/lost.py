"""What is said where a process is lost."""

from __future__ import annotations

from fairline.errors import FairlineError


class RankLost(FairlineError):
    """A process that others work with is gone; the work itself may be sound."""
