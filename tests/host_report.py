"""The report of tests that run in environments of their own: a table of figures, in the file of PRISM_REPORT."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

BEGUN = time.monotonic()


def seconds() -> str:
    """Of this process so far, by the clock; of CPUs, with the processes that it started and that have ended."""
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    return f"{time.monotonic() - BEGUN:.0f} (load {os.getloadavg()[2]:.0f}); {cpu:.0f}"


def installed(name: str) -> bool:
    """Whether a module is there, without importing it: verl's import loads our plugin."""
    try:
        return find_spec(name) is not None
    except ImportError:  # of a dry run, which hides packages
        return False


@dataclass
class Report:
    """Rows of a table: what was looked at, how it came out, the limit."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, found: object, expected: str) -> None:
        """``found``: a figure, or an error, of which the first words are kept, without folders."""
        words = re.sub(r"(/[\w.-]+)+/", "", str(found)).replace("|", "/")
        self.rows.append((what, shorten(words, 200, placeholder=" ..."), expected))


def reported(target: str, packages: Sequence[str], about: Sequence[str]) -> Iterator[Report]:
    """A report that is written at the end, as a fixture's generator. ``target``: of make; ``packages``: whose versions
    it names; ``about``: lines behind them."""
    kept = Report()
    yield kept
    if not os.environ.get("PRISM_REPORT"):
        return
    kept.add("seconds of the whole run, on a busy machine too; CPU seconds", seconds(), "600")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        f"# make {target}",
        "",
        f"`make {target}` (Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, no GPU{about[0]}",
        *about[1:],
        "",
        "| what | found | expected |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in kept.rows),
        "",
    ]
    path = Path(os.environ["PRISM_REPORT"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
