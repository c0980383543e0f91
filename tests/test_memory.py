"""Freed memory stays with the process while something computes, and not longer."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

from fairline import _memory
from fairline._memory import memory_kept
from tests.commands import ENVIRONMENT

GLIBC = hasattr(ctypes.CDLL(None), "malloc_trim") if sys.platform == "linux" else False

FAULTS = """
import resource
import torch
from fairline._memory import memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10 * 2**20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

faults()
without = min(faults() for _ in range(5))
with memory_kept():
    with memory_kept():
        faults()
    # Chunks of memory find their places in a few rounds.
    within = min(faults() for _ in range(10))
    kept = resident()
print(without, within, kept - resident())
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
def test_large_tensors_cost_page_faults_once_and_their_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    without, within, given_back = map(int, done.stdout.split())
    pages = 4 * 40 * 2**20 / resource.getpagesize()
    assert within < pages / 8 < pages / 2 < without
    assert given_back > 64 * 2**20


def test_an_allocator_without_these_switches_is_left_alone(monkeypatch):
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _name: object())
    with memory_kept():
        assert _memory._users == 1
    assert _memory._users == 0
