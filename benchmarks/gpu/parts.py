"""Which parts ``make gpu`` has, in which order, and for how long. How they run is in run.py.

Three stages, each within ten minutes: "first" has what counts most, a whole step of a 4B policy before all else; then
"checks", tests and sanitizer; then "speed", every benchmark with its peers. Each benchmark of the catalog brings its
parts: its benchmark, and an op also its tests and its kernels under the sanitizer. A stage, a part or what parts have
in common is chosen by ``--part name``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.catalog import CATALOG, Entry

RUN = (sys.executable, "-m")
STAGES = ("first", "checks", "speed")
STAGE_SECONDS = 560  # of ten minutes: the rest starts, stops and packs
BUILD_SECONDS = 60
# Tests of environments of their own (make test-embed, test-eval, test-vllm): the wheels of peers alone do not import.
ELSEWHERE = ("tests/embed", "tests/eval", "tests/vllm")
CHECK_SECONDS = 420  # of the parts that run at once: tests and sanitizer, most of whose time compiles kernels
# What KERNELS' stress tests need first: products above 2^31 elements, repeats, capture, the host that never waits.
STRESS = (
    "tests/kernels/test_stress.py",
    "tests/kernels/linear_logprob/test_gpu.py",
    "tests/kernels/adamw",
    "tests/kernels/tree_attention/test_gpu.py::test_a_library_keeps_its_contract",
    "tests/kernels/tree_attention/test_gpu.py::test_the_host_never_waits",
    "tests/kernels/tree_attention/test_decode.py",
    "tests/kernels/sample_tokens/test_sample_tokens.py",
    "tests/trainer/models/test_token_step.py",
    "tests/trainer/steps/test_sampler.py",
    "tests/trainer/steps/test_waits.py",
)


@dataclass(frozen=True)
class Part:
    """``writes``: the command itself writes {json}; otherwise its output and status are the result.

    ``beside``: parts in a row with the same name here run at once; "": nothing runs beside it, as what it measures, or
    what the others need, comes from it. ``asked``: it runs only where it is named.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    groups: tuple[str, ...] = ()  # other names that select it, its stage among them
    writes: bool = False
    beside: str = ""
    asked: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def parts(dry_run: bool) -> list[Part]:
    """Stage after stage."""
    return [*_first(dry_run), *_checks(dry_run), *_speed(dry_run)]


def _first(dry_run: bool) -> list[Part]:
    """One number of a whole step before all else, then in the order of what hangs on it; each writes as it ends."""
    # The extension is built, by nvcc too where it is there, while what needs torch alone is tried out.
    cuda = {"PRISM_BUILD_CUDA": "1"} if shutil.which("nvcc") and not dry_run else {}
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    probe = (*RUN, "benchmarks.gpu.probe", *(("--device", "cpu") if dry_run else ()))
    shape = () if dry_run else ("--shape", "Hq=32")  # one shape: the policy's
    quick = ("--seconds", "2", "--no-memory")
    stress = (*_pytest(dry_run), "-m", "gpu", *STRESS)
    return [
        Part("build", build, BUILD_SECONDS, STAGES, beside="start", environment=cuda),
        Part("probe", probe, BUILD_SECONDS, ("first",), beside="start"),
        _early("step", "rlvr", 180, dry_run, "--stage", "rlvr", "--rounds", "1"),
        _early("tree_attention", "attention", 35, dry_run, *quick, *shape, "--problem", "gradient", "--peers", "SDPA"),
        _early("step", "align", 120, dry_run, "--stage", "align", "--rounds", "1"),
        Part("stress", stress, 80, ("first", "tests")),
        _early("linear_logprob", "linear", 30, dry_run, *quick, "--problem", "policy_loss", "--peers", "liger"),
        _early("moe", "moe", 35, dry_run, *quick, "--problem", "experts", "--peers", "grouped_mm"),
        _early("update", "update", 12, dry_run, *quick, "--problem", "bfloat16", "--peers", "fused"),
    ]


def _early(op: str, name: str, seconds: float, dry_run: bool, *options: str) -> Part:
    """A few of a benchmark's rows, of which `speed` has all."""
    if CATALOG[op].tests and not dry_run:
        options = (*options, "--no-tests")  # PART=checks runs them
    return Part(f"first-{name}", _bench(op, dry_run, *options), seconds, ("first",), writes=True)


def _checks(dry_run: bool) -> list[Part]:
    """All at once: no speed of an op is shown whose tests failed."""
    cores = os.cpu_count() or 1
    few = (*_pytest(dry_run), *_workers(max(1, cores // 4)), "-m", "gpu")
    found = []
    tested = {op: entry for op, entry in CATALOG.items() if entry.tests and entry.part}
    for op, entry in tested.items():
        groups = _groups(op, entry)
        found.append(_check(f"tests-{entry.part}", (*few, entry.tests), ("tests", *groups)))
        found += _sanitized(entry.part, groups, dry_run)
    found += _sanitized("other", (), dry_run)
    elsewhere = [word for path in ELSEWHERE for word in ("--ignore", path)]
    others = [word for entry in tested.values() for word in ("--ignore", entry.tests)]
    found.append(_check("tests-other", (*few, "tests", *others, *elsewhere), ("tests",)))
    # As CI runs them, on the versions that are here: without the GPU, which would change the trainer's dtype.
    everything = (*_pytest(dry_run), "tests", *elsewhere, *_workers(max(1, cores // 2)), "-m", "not gpu and not slow")
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [*found, _check("tests-all", everything, ("tests",), hidden)]


def _sanitized(name: str, groups: tuple[str, ...], dry_run: bool) -> list[Part]:
    """Triton's interpreter stands in for the GPU in a dry run."""
    interpreter = {"TRITON_INTERPRET": "1"} if dry_run else {}
    found = []
    for tool in ("memcheck", "racecheck"):
        how = ("--device", "cpu") if dry_run else ("--tool", tool)
        command = (*RUN, "benchmarks.gpu.sanitize", *how, "--only", name)
        found.append(_check(f"{tool}-{name}", command, ("sanitizer", tool, *groups), interpreter))
    return found


def _check(
    name: str, command: tuple[str, ...], groups: tuple[str, ...], environment: dict[str, str] | None = None
) -> Part:
    return Part(name, command, CHECK_SECONDS, ("checks", *groups), beside="checks", environment=environment or {})


def _speed(dry_run: bool) -> list[Part]:
    """Every benchmark, in the catalog's order; and what takes all the time, where it is named."""
    found = []
    for op, entry in CATALOG.items():
        if not entry.part:
            continue
        options = entry.arguments
        if entry.tests and not dry_run:
            options = (*options, "--no-tests")  # they are a part of their own
        groups = ("benchmarks", *_groups(op, entry))
        groups = groups if entry.asked else ("speed", *groups)
        command = _bench(op, dry_run, *(() if dry_run else options))
        found.append(Part(f"bench-{entry.part}", command, entry.seconds, groups, writes=True, asked=entry.asked))
    interpreter = {"TRITON_INTERPRET": "1"} if dry_run else {}
    tune = (*RUN, "benchmarks.gpu.tune", *(("--dry-run",) if dry_run else ()))
    return [*found, Part("tune", tune, 240, asked=True, environment=interpreter)]


def _bench(op: str, dry_run: bool, *options: str) -> tuple[str, ...]:
    device = ("--device", "cpu", "--dry-run") if dry_run else ("--device", "cuda")
    return (*RUN, "benchmarks", op, *device, "--json", "{json}", *options)


def _pytest(dry_run: bool) -> tuple[str, ...]:
    command = (*RUN, "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return (*command, "--junitxml", "{xml}", *(("--collect-only",) if dry_run else ()))


def _groups(op: str, entry: Entry) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, [entry.part, op, entry.group])))


def _workers(count: int) -> tuple[str, ...]:
    return ("-n", str(count)) if importlib.util.find_spec("xdist") else ()


def chosen(every: list[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these stages, names or groups; without names all but tune, which writes into the package, and what
    is long. "bench-moe=300" gives that one 300 seconds, "moe=300" each of the group."""
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


def by_stage(todo: Sequence[Part], names: Sequence[str]) -> list[list[Part]]:
    """What has a total of its own: each stage where all are run, else what was named."""
    if names:
        return [list(todo)]
    found = [[part for part in todo if part.groups and part.groups[0] == stage] for stage in STAGES]
    return [some for some in found if some]
