"""Memory of the host while something runs: of this process, and of the machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERVAL_SECONDS = 0.05


class Host:
    """``bytes()`` since it was made: see benchmarks/steps/training.py for what they are."""

    def __init__(self) -> None:
        self.resident, self.largest = _kilobytes("/proc/self/status", "VmRSS"), 0
        self.available = self.least = _kilobytes("/proc/meminfo", "MemAvailable")

    def look(self) -> None:
        self.largest = max(self.largest, _kilobytes("/proc/self/status", "VmRSS") - self.resident)
        self.least = min(self.least, _kilobytes("/proc/meminfo", "MemAvailable"))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Looks all the time: what an optimizer holds for a moment is seen."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(INTERVAL_SECONDS):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def bytes(self) -> dict[str, int]:
        self.look()
        return {"host_bytes": self.largest << 10, "host_taken_bytes": (self.available - self.least) << 10}


def _kilobytes(path: str, field: str) -> int:
    """0 where the system does not say."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
