"""How many cores this process was given: by its affinity (``taskset``), its control group, and ``OMP_NUM_THREADS``."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

#: Variables that the libraries of numbers read as they are loaded.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def cores() -> int:
    """Cores that this process may use, by affinity and control group."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota()
    return there if limit is None else max(1, min(there, limit))


def given() -> int:
    """Threads that this process should take: its cores, or fewer where ``OMP_NUM_THREADS`` says so."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores(), int(said)) if said.isdigit() and int(said) > 0 else cores()


def quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores that a control group's quota comes to, rounded up; None where there is none."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((root / name).read_text() for name in names).split()
            limit, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):
            # "max" is no number.
            continue
        if limit > 0 and period > 0:
            return math.ceil(limit / period)
    return None


@contextlib.contextmanager
def told_to_children(threads: int) -> Iterator[None]:
    """Let processes that are started meanwhile take this many threads, in every library."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
