"""Several processes, a device each, that do one and the same work together; each of them is a rank.

Every rank runs the whole program on the whole data and keeps the whole network. What costs time is divided: the
images of a training batch, the batches of a pass over data. What comes of it, a logit or a sum, is gathered at once,
so that all ranks go on with the same numbers, and whatever is computed from them is what one process computes.
:func:`here` tells a process what part it has; :func:`launch` starts them.
"""

from __future__ import annotations

from fairline.ranks.alone import Ranks, become, here
from fairline.ranks.launch import STRATEGIES, end_with_parent, launch
from fairline.ranks.lost import RankLost

__all__ = ["STRATEGIES", "RankLost", "Ranks", "become", "end_with_parent", "here", "launch"]
