"""Which parts ``make gpu`` has, in which order, and for how long. How they run is in run.py.

Each benchmark of the catalog brings its parts: its benchmark, and an op also its tests and its kernels under the
sanitizer. All of them are chosen by ``--part name``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.catalog import CATALOG, Entry

RUN = (sys.executable, "-m")
CHECK_SECONDS = 120  # of the parts that run at once: tests and sanitizer, most of whose time compiles kernels


@dataclass(frozen=True)
class Part:
    """``writes``: the command itself writes {json}; otherwise its output and status are the result.

    ``alone``: nothing runs beside it, as what it measures, or what the others need, comes from it. ``asked``: it runs
    only where it is named.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    groups: tuple[str, ...] = ()  # other names that select it
    writes: bool = False
    alone: bool = True
    asked: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def parts(dry_run: bool) -> list[Part]:
    """Checks first, as no speed of an op is shown whose tests failed; then benchmarks in the order of their worth."""
    cores = os.cpu_count() or 1
    pytest = (*RUN, "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    pytest += ("--junitxml", "{xml}", *(("--collect-only",) if dry_run else ()))
    few = (*pytest, *_workers(max(1, cores // 4)), "-m", "gpu")
    # Triton's interpreter stands in for the GPU in a dry run.
    interpreter = {"TRITON_INTERPRET": "1"} if dry_run else {}
    check = {"seconds": CHECK_SECONDS, "alone": False}
    found = [Part("build", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 20)]
    tested = {op: entry for op, entry in CATALOG.items() if entry.tests}
    for op, entry in tested.items():
        groups = _groups(op, entry)
        found.append(Part(f"tests-{entry.part}", (*few, entry.tests), groups=("tests", *groups), **check))
        for tool in ("memcheck", "racecheck"):
            how = ("--device", "cpu") if dry_run else ("--tool", tool)
            command = (*RUN, "benchmarks.gpu.sanitize", *how, "--only", entry.part)
            named = {"groups": ("sanitizer", tool, *groups), "environment": interpreter}
            found.append(Part(f"{tool}-{entry.part}", command, **named, **check))
    for tool in ("memcheck", "racecheck"):
        how = ("--device", "cpu") if dry_run else ("--tool", tool)
        command = (*RUN, "benchmarks.gpu.sanitize", *how, "--only", "other")
        found.append(Part(f"{tool}-other", command, groups=("sanitizer", tool), environment=interpreter, **check))
    others = [word for entry in tested.values() for word in ("--ignore", entry.tests)]
    found.append(Part("tests-other", (*few, "tests", *others), groups=("tests",), **check))
    # As CI runs them, on the versions that are here: without the GPU, which would change the trainer's dtype.
    everything = (*pytest, "tests", *_workers(max(1, cores // 2)), "-m", "not gpu and not slow")
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found.append(Part("tests-all", everything, groups=("tests",), environment=hidden, **check))
    found += [_benchmark(op, entry, dry_run) for op, entry in CATALOG.items()]
    how = ("--dry-run",) if dry_run else ()
    found.append(Part("tune", (*RUN, "benchmarks.gpu.tune", *how), 240, asked=True, environment=interpreter))
    return found


def _groups(op: str, entry: Entry) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, [entry.part, op, entry.group])))


def _benchmark(op: str, entry: Entry, dry_run: bool) -> Part:
    how = ("--dry-run",) if dry_run else entry.arguments
    if entry.tests and not dry_run:
        how = (*how, "--no-tests")  # they are a part of their own
    device = "cpu" if dry_run else "cuda"
    command = (*RUN, "benchmarks", op, "--device", device, "--json", "{json}", *how)
    groups = ("benchmarks", *_groups(op, entry))
    return Part(f"bench-{entry.part}", command, entry.seconds, groups, writes=True, asked=entry.asked)


def _workers(count: int) -> tuple[str, ...]:
    return ("-n", str(count)) if importlib.util.find_spec("xdist") else ()


def chosen(every: list[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these names or groups; without names all but tune, which writes into the package, and what is long.
    "bench-moe=300" gives that one 300 seconds, "moe=300" each of the group."""
    if not names:
        return [part for part in every if not part.asked]
    given = dict(name.partition("=")[::2] for name in names)
    known = {name for part in every for name in (part.name, *part.groups)}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"--part: unknown {unknown}; expected some of {', '.join(sorted(known))}")
    wrong = [f"{name}={seconds}" for name, seconds in given.items() if seconds and not seconds.isdecimal()]
    if wrong:
        raise ValueError(f"--part: got {wrong}, expected seconds after =, as in bench-moe=300")
    found = []
    for part in every:
        named = [given[name] for name in (part.name, *part.groups) if name in given]
        if named:  # the part's own name, then its groups
            seconds = next(filter(None, named), "")
            found.append(replace(part, seconds=float(seconds)) if seconds else part)
    return found
