"""Memory that stays with the process while it computes.

glibc maps every large block anew and gives freed memory back to the system, so each pass through a network pays for
the page faults of all its activations: a ReLU of 32 MB then takes ten times as long. Source: mallopt(3), glibc.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Parameters of mallopt, as in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
#: Where glibc's own rules end up in a process that has freed large blocks, and its default.
_LARGEST_THRESHOLD, _MAPS = 32 * 2**20, 65536

_lock = threading.Lock()
_users = 0


@contextmanager
def memory_kept() -> Iterator[None]:
    """Reuse freed memory instead of giving it back to the system, which gets it back when the last user ends.

    Under other allocators than glibc's nothing changes.

    Yields:
        Nothing.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set({_MMAP_MAX: _MAPS, _MMAP_THRESHOLD: _LARGEST_THRESHOLD, _TRIM_THRESHOLD: 2 * _LARGEST_THRESHOLD})
                _call("malloc_trim", 0)


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        _call("mallopt", option, value)


def _call(name: str, *arguments: int) -> None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*arguments)
