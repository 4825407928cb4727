"""``make gpu``: all that needs a GPU, in parts, within a time limit: python -m benchmarks.gpu [--part linear,moe].

Each part is a process of its own with a time budget; one that fails or runs out of time costs the others nothing. Every
part writes benchmarks/results/<gpu>/<date>-<commit>-<part>.json as it goes; RESULTS.md is made from them at the end.
A bench_<op>.py brings its part: ``GPU_PART = (name, seconds)``, ``GPU_ARGUMENTS = [...]``, and either ``problems`` (run
by the harness) or a ``main`` that takes ``--json FILE``, ``--device`` and ``--dry-run``.

A part out of time is asked to stop, as by Ctrl-C, and keeps what it has written; ``--part moe=300`` gives it more.

Uses this Python and its torch, and installs nothing. ``--dry-run`` walks through every part on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL_SECONDS = 525  # nine minutes, less start and report
DRY_RUN_PATIENCE = 4  # times the budgets: a dry run looks for mistakes, and Triton's interpreter is slow
TAIL = 40  # lines of a part's output that its result keeps
GRACE_SECONDS = 8  # for a part that ran out of time to write what it has


@dataclass(frozen=True)
class Part:
    """``writes``: the command itself writes {json}; otherwise its output and status are the result."""

    name: str
    command: tuple[str, ...]
    seconds: float
    group: str = ""  # another name that selects it
    writes: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def parts(dry_run: bool) -> list[Part]:
    """In the order of their worth: what does not fit the time comes last, and says so."""
    run = (sys.executable, "-m")
    device = "cpu" if dry_run else "cuda"
    pytest = (*run, "pytest", "tests", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    pytest += ("--junitxml", "{xml}", *(("--collect-only", "-q") if dry_run else ()))
    found = [
        Part("build", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 30),
        # Most of their time compiles kernels: as many workers as there are cores, up to what one GPU's memory bears.
        Part("tests-gpu", (*pytest, *_workers(min(8, os.cpu_count() or 1)), "-m", "gpu"), 150, "tests"),
        *_benchmarks(dry_run, device),
    ]
    # Triton's interpreter stands in for the GPU in a dry run.
    sanitize = (*run, "benchmarks.sanitize")
    interpreter = {"TRITON_INTERPRET": "1"} if dry_run else {}
    for tool in ("memcheck", "racecheck"):
        how = ("--device", "cpu") if dry_run else ("--tool", tool)
        found.append(Part(tool, (*sanitize, *how), 120, "sanitizer", environment=interpreter))
    everything = (*pytest, *_workers(os.cpu_count() or 1), "-m", "not gpu and not slow")
    # As CI runs them, on the versions that are here: without the GPU, which would change the trainer's dtype.
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found.append(Part("tests-all", everything, 150, "tests", environment=hidden))
    how = ("--dry-run",) if dry_run else ()
    found.append(Part("tune", (*run, "benchmarks.tune", *how), 240, "tune", environment=interpreter))
    return found


def _workers(count: int) -> tuple[str, ...]:
    return ("-n", str(count)) if importlib.util.find_spec("xdist") else ()


def _benchmarks(dry_run: bool, device: str) -> list[Part]:
    found = []
    for path in sorted(HERE.glob("bench_*.py")):
        values = _constants(path)
        if "GPU_PART" not in values:
            continue
        name, seconds = values["GPU_PART"]
        op = path.stem.removeprefix("bench_")
        harness = "problems" in values["functions"]
        command = [sys.executable, "-m", *(["benchmarks", op] if harness else [f"benchmarks.{path.stem}"])]
        command += ["--device", device, "--json", "{json}"]
        if dry_run:
            command += ["--dry-run", *(["--shape", "tiny", "--no-memory"] if harness else [])]
        else:
            command += values.get("GPU_ARGUMENTS", [])
        found.append(Part(name, tuple(command), seconds, op, writes=True))
    order = ("linear", "discriminator", "moe", "advantage", "policy")
    return sorted(found, key=lambda part: order.index(part.name) if part.name in order else len(order))


def _constants(path: Path) -> dict[str, Any]:
    """A benchmark's GPU_* constants and its functions, read without importing what may not be installed."""
    values: dict[str, Any] = {"functions": set()}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            values["functions"].add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.startswith("GPU_"):
                values[name] = ast.literal_eval(node.value)
    return values


def chosen(every: list[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these names or groups; without names all but tune, which writes into the package. "moe=300" gives
    that one 300 seconds."""
    if not names:
        return [part for part in every if part.group != "tune"]
    given = dict(name.partition("=")[::2] for name in names)
    known = {part.name for part in every} | {part.group for part in every if part.group}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"--part: unknown {unknown}; expected some of {', '.join(sorted(known))}")
    wrong = [f"{name}={seconds}" for name, seconds in given.items() if seconds and not seconds.isdecimal()]
    if wrong:
        raise ValueError(f"--part: got {wrong}, expected seconds after =, as in moe=300")
    found = []
    for part in every:
        seconds = given.get(part.name, given.get(part.group))
        if seconds is not None:
            found.append(replace(part, seconds=float(seconds)) if seconds else part)
    return found


def run_part(part: Part, path: Path, seconds: float, commit: str) -> dict[str, Any]:
    """Runs it; whatever happens, ``path`` holds a result afterwards."""
    from benchmarks import harness

    xml = Path(tempfile.mkdtemp(prefix="prism-gpu-")) / "junit.xml"
    values = {"{json}": str(path), "{xml}": str(xml)}
    command = [values.get(word, word) for word in part.command]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment |= {"PRISM_COMMIT": commit, **part.environment}
    began = time.monotonic()
    code, tail = _run(command, environment, seconds)
    took = time.monotonic() - began
    outcome = {
        "name": part.name,
        "status": "timeout" if code is None else "ok" if code == 0 else "failed",
        "returncode": code,
        "seconds": round(took, 1),
        "budget_seconds": round(seconds, 1),
        "tail": list(tail),
    }
    if code == 2 and part.group == "sanitizer":
        outcome["status"] = "unavailable"
    if xml.exists():
        outcome["tests"] = _junit(xml)
    document = json.loads(path.read_text()) if part.writes and path.exists() else _bare(part.name, commit)
    document["part"] = outcome
    harness.save(document, path)
    return outcome


def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, deque[str]]:
    """(exit status, or None where it ran out of time; the last lines). Prints as it goes."""
    tail: deque[str] = deque(maxlen=TAIL)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip

    def read() -> None:
        for line in process.stdout:
            if not line.startswith('{"schema"'):  # the result as one line: it is in the file
                tail.append(line.rstrip()[:400])
                print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        _stop(process)
        code = None
    reader.join(timeout=5)
    return code, tail


def _stop(process: subprocess.Popen) -> None:
    """As Ctrl-C first: pytest then writes what it has. Its own session: children of the part end with it."""
    with suppress(subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _bare(name: str, commit: str) -> dict[str, Any]:
    import torch

    from benchmarks import harness, machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "schema": harness.SCHEMA,
        "op": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "environment": machine.environment(device),
        "tests": None,
        "limits": {},
        "problems": [],
    }


def _junit(path: Path) -> dict[str, Any]:
    """Counts, and what failed. A file that lacks an optional package is counted apart: it was not run."""
    counts: dict[str, Any] = {
        "passed": 0,
        "failed": 0,
        "skipped": 0,
        "unfinished": 0,
        "not collected": [],
        "failures": [],
    }
    for case in ElementTree.parse(path).iter("testcase"):
        if case.get("name") is None:  # was running when the tests were stopped
            counts["unfinished"] += 1
            continue
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is None:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
        elif "ModuleNotFoundError" in (problem.text or "") and "collection" in (problem.get("message") or ""):
            missing = (problem.text or "").rsplit("ModuleNotFoundError:", 1)[1].splitlines()[0].strip()
            counts["not collected"].append(f"{case.get('name')}: {missing}")
        else:
            counts["failed"] += 1
            counts["failures"].append(f"{name}: {(problem.get('message') or '')[:200]}")
    return counts


def run_all(todo: list[Part], folder: Path, commit: str, total: float) -> list[dict[str, Any]]:
    deadline = time.monotonic() + total
    stamp = time.strftime("%Y%m%d-%H%M", time.gmtime())
    outcomes = []
    for part in todo:
        left = deadline - time.monotonic()
        if left < 5:
            outcomes.append({"name": part.name, "status": "not run", "seconds": 0.0, "tail": ["no time left"]})
            continue
        print(f"\n=== {part.name} (at most {min(part.seconds, left):.0f} s)", flush=True)
        path = folder / f"{stamp}-{commit.replace('+', '-dirty')}-{part.name}.json"
        outcomes.append(run_part(part, path, min(part.seconds, left), commit))
        print(f"=== {part.name}: {outcomes[-1]['status']}, {outcomes[-1]['seconds']} s", flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="", help="names or groups, comma-separated, moe=300 for more seconds")
    parser.add_argument("--dry-run", action="store_true", help="every part on a CPU at toy sizes")
    parser.add_argument("--results", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of all parts together")
    parser.add_argument("--list", action="store_true", help="list the parts")
    given = parser.parse_args(arguments)
    every = parts(given.dry_run)
    if given.list:
        for part in every:
            print(f"{part.name:<14} {part.seconds:>5.0f} s  {' '.join(part.command)}")
        return 0
    if importlib.util.find_spec("torch") is None:
        print(f"make gpu: {sys.executable} has no torch; name one that has: make gpu PYTHON=...", file=sys.stderr)
        return 2
    import torch

    from benchmarks import machine, make_results

    if not given.dry_run and not torch.cuda.is_available():
        print("make gpu: needs an NVIDIA GPU, and torch sees none (--dry-run runs toy sizes on a CPU)", file=sys.stderr)
        return 2
    try:
        todo = chosen(every, [name for name in given.part.split(",") if name])
    except ValueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    if _has_native():
        todo = [part for part in todo if part.name != "build"]
    gpu = "dry-run" if given.dry_run else machine.slug(torch.cuda.get_device_name())
    folder = given.results or (Path(tempfile.mkdtemp(prefix="prism-gpu-")) if given.dry_run else HERE / "results" / gpu)
    folder.mkdir(parents=True, exist_ok=True)
    patience = DRY_RUN_PATIENCE if given.dry_run else 1
    todo = [replace(part, seconds=patience * part.seconds) for part in todo]
    outcomes = run_all(todo, folder, machine.commit(), patience * given.seconds)
    print(f"\nresults: {folder}")
    for outcome in outcomes:
        print(f"  {outcome['name']:<14} {outcome['status']:<12} {outcome['seconds']:>6} s  {_summary(outcome)}")
    if not given.dry_run and given.results is None:
        make_results.write(HERE / "results", HERE / "RESULTS.md")
        print(f"written: {HERE / 'RESULTS.md'}")
    return 0 if all(outcome["status"] in ("ok", "unavailable") for outcome in outcomes) else 1


def _has_native() -> bool:
    return (ROOT / "kernels" / "prism_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


def _summary(outcome: dict[str, Any]) -> str:
    if "tests" in outcome:
        tests = outcome["tests"]
        return ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped", "unfinished"))
    return next((line for line in reversed(outcome["tail"]) if line.strip()), "")[:120]


if __name__ == "__main__":
    sys.exit(main())
