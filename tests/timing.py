"""How long something takes, by comparison alone: no test asserts seconds, which belong to a machine and to its load.

CPU time of the calling thread, so that neighbours and waiting do not count; the best of some calls; a factor that is
wide beside what it has to tell apart; and more than one try. Tests that use it are marked ``slow``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST = 1e-3  # seconds: what is shorter is called several times


def cpu_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Of one call, at best."""
    best, calls = float("inf"), 1
    while repeats:
        begin = time.thread_time()
        for _ in range(calls):
            call()
        spent = time.thread_time() - begin
        if spent < LEAST:
            calls *= 2
            continue
        best, repeats = min(best, spent / calls), repeats - 1
    return best


def assert_faster(call: Callable[[], object], other: Callable[[], object], factor: float, tries: int = 3) -> None:
    """``call`` takes at most 1 / ``factor`` of the time of ``other``."""
    found = []
    while len(found) < tries:
        found.append(cpu_seconds(other) / cpu_seconds(call))
        if found[-1] >= factor:
            return
    raise AssertionError(f"faster by {[f'{ratio:.1f}' for ratio in found]}, expected {factor:g}")


def assert_linear(make: Callable[[int], Callable[[], object]], size: int, tries: int = 3) -> None:
    """``make(n)`` is a call on input of size n: eight times the size takes at most three times eight times as long,
    where a quadratic way takes eight times that."""
    small, large, found = make(size), make(8 * size), []
    while len(found) < tries:
        found.append(cpu_seconds(large) / cpu_seconds(small))
        if found[-1] <= 24:
            return
    raise AssertionError(f"8 times the size took {[f'{ratio:.0f}' for ratio in found]} times as long")
