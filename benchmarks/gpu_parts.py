"""Which parts ``make gpu`` has, in which order, and for how long. How they run is in gpu.py.

A bench_<op>.py brings its parts: ``GPU_PART = (name, seconds)``, or (name, seconds, larger group), ``GPU_ARGUMENTS``,
and either ``problems`` (run by the harness) or a ``main`` that takes ``--json FILE``, ``--device`` and ``--dry-run``.
With problems come its ``TESTS`` and its kernels under the sanitizer. All of them are chosen by ``--part name``.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECK_SECONDS = 120  # of the parts that run at once: tests and sanitizer, most of whose time compiles kernels


@dataclass(frozen=True)
class Part:
    """``writes``: the command itself writes {json}; otherwise its output and status are the result.

    ``alone``: nothing runs beside it, as what it measures, or what the others need, comes from it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    groups: tuple[str, ...] = ()  # other names that select it
    writes: bool = False
    alone: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def parts(dry_run: bool) -> list[Part]:
    """Checks first, as no speed of an op is shown whose tests failed; then benchmarks in the order of their worth."""
    run = (sys.executable, "-m")
    cores = os.cpu_count() or 1
    benches = _benches()
    pytest = (*run, "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    pytest += ("--junitxml", "{xml}", *(("--collect-only",) if dry_run else ()))
    few = _workers(max(1, cores // 4))
    # Triton's interpreter stands in for the GPU in a dry run.
    interpreter = {"TRITON_INTERPRET": "1"} if dry_run else {}
    check = {"seconds": CHECK_SECONDS, "alone": False}
    found = [Part("build", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 20)]
    for bench in benches:
        if bench.tests:
            command = (*pytest, *few, "-m", "gpu", *bench.tests)
            found.append(Part(f"tests-{bench.name}", command, groups=("tests", *bench.groups), **check))
            for tool in ("memcheck", "racecheck"):
                how = ("--device", "cpu") if dry_run else ("--tool", tool)
                command = (*run, "benchmarks.sanitize", *how, "--only", bench.name)
                groups = ("sanitizer", tool, *bench.groups)
                found.append(Part(f"{tool}-{bench.name}", command, groups=groups, environment=interpreter, **check))
    others = [word for bench in benches for path in bench.tests for word in ("--ignore", path)]
    found.append(Part("tests-other", (*pytest, "tests", "-m", "gpu", *others), groups=("tests",), **check))
    # As CI runs them, on the versions that are here: without the GPU, which would change the trainer's dtype.
    everything = (*pytest, "tests", *_workers(max(1, cores // 2)), "-m", "not gpu and not slow")
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found.append(Part("tests-all", everything, groups=("tests",), environment=hidden, **check))
    found += [bench.part(dry_run) for bench in benches]
    how = ("--dry-run",) if dry_run else ()
    found.append(Part("tune", (*run, "benchmarks.tune", *how), 240, environment=interpreter))
    return found


def _workers(count: int) -> tuple[str, ...]:
    return ("-n", str(count)) if importlib.util.find_spec("xdist") else ()


@dataclass(frozen=True)
class _Bench:
    """What a bench_<op>.py says of its parts."""

    op: str
    name: str
    seconds: float
    groups: tuple[str, ...]
    tests: tuple[str, ...]  # none: a whole step, which checks its own agreement
    arguments: tuple[str, ...]

    def part(self, dry_run: bool) -> Part:
        command = ["benchmarks", self.op] if self.tests else [f"benchmarks.bench_{self.op}"]
        command += ["--device", "cpu" if dry_run else "cuda", "--json", "{json}"]
        if dry_run:
            command += ["--dry-run", *(["--shape", "tiny", "--no-memory"] if self.tests else [])]
        else:
            command += [*self.arguments, *(["--no-tests"] if self.tests else [])]  # they are a part of their own
        groups = ("benchmarks", *self.groups)
        return Part(f"bench-{self.name}", (sys.executable, "-m", *command), self.seconds, groups, writes=True)


def _benches() -> list[_Bench]:
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        values = _constants(path)
        if "GPU_PART" in values:
            op, (name, seconds, *larger) = path.stem.removeprefix("bench_"), values["GPU_PART"]
            groups = tuple(dict.fromkeys([name, op, *larger]))
            tests = tuple(values["TESTS"]) if "problems" in values["functions"] else ()
            found.append(_Bench(op, name, seconds, groups, tests, tuple(values.get("GPU_ARGUMENTS", ()))))
    # A short one first; then by the targets that hang on them; what is left over goes to the whole steps, at the end.
    order = ("advantage", "linear", "moe", "discriminator", "policy")
    return sorted(found, key=lambda bench: order.index(bench.name) if bench.name in order else len(order))


def _constants(path: Path) -> dict[str, Any]:
    """A benchmark's TESTS, GPU_* and functions, read without importing what may not be installed."""
    values: dict[str, Any] = {"functions": set()}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            values["functions"].add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name == "TESTS" or name.startswith("GPU_"):
                values[name] = ast.literal_eval(node.value)
    return values


def chosen(every: list[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these names or groups; without names all but tune, which writes into the package.
    "bench-moe=300" gives that one 300 seconds, "moe=300" each of the group."""
    if not names:
        return [part for part in every if part.name != "tune"]
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
