"""Ranks that are threads of this process: what they exchange is added up where they meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fairline.ranks.group import Group


class Thread(Group):
    """One of several threads."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, brought: dict[int, Any]) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        self.meeting, self.brought = meeting, brought

    def total(self, tensor):
        self.brought[self.rank] = tensor.detach().clone()
        self.meeting.wait(60)
        whole = sum(self.brought[rank] for rank in range(self.size))
        self.meeting.wait(60)
        return tensor.copy_(whole)

    def _from_first(self, value):
        self.brought[self.rank] = value
        self.meeting.wait(60)
        found = self.brought[0]
        self.meeting.wait(60)
        return found


def together(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What each of ``size`` ranks makes of its work."""
    meeting, brought = threading.Barrier(size), {}

    def one(rank: int) -> Any:
        try:
            return work(Thread(rank, size, meeting, brought))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(one, rank) for rank in range(size)]]
