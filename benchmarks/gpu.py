"""``make gpu``: all that needs a GPU, in parts, within a time limit: python -m benchmarks.gpu [--part linear,moe].

Each part is a process of its own; one that fails or runs out of time costs the others nothing. Every part writes
benchmarks/results/<gpu>/<date>-<commit>-<part>.json as it goes; RESULTS.md is made from them at the end. What is not
timed, tests and sanitizer, runs at once; what is timed runs alone. A part is sure of its seconds, and may take besides
what those before it left over; out of time it is asked to stop, as by Ctrl-C, and keeps what it has written.

Which parts there are is in gpu_parts.py: each bench_<op>.py brings its own. ``--part moe`` takes all of an op.

Uses this Python and its torch, and installs nothing. ``--dry-run`` walks through every part on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_parts import Part, chosen, parts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL_SECONDS = 525  # nine minutes, less start and report
DRY_RUN_PATIENCE = 4  # times the budgets: a dry run looks for mistakes, and Triton's interpreter is slow
TAIL = 40  # lines of a part's output that its result keeps
GRACE_SECONDS = 8  # for a part that ran out of time to write what it has
INTERRUPTED = 130


class Runner:
    """Runs parts as processes, and can stop those that run."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def part(self, part: Part, path: Path, seconds: float, commit: str, prefix: str | None = "") -> dict[str, Any]:
        """Runs it; whatever happens, ``path`` holds a result afterwards. ``prefix`` of its lines; None: not shown."""
        from benchmarks import harness

        xml = Path(tempfile.mkdtemp(prefix="prism-gpu-")) / "junit.xml"
        values = {"{json}": str(path), "{xml}": str(xml)}
        command = [values.get(word, word) for word in part.command]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment |= {"PRISM_COMMIT": commit, **part.environment}
        began = time.monotonic()
        code, tail = self._run(command, environment, seconds, prefix)
        outcome = {
            "name": part.name,
            "status": "timeout" if code is None else "ok" if code == 0 else "failed",
            "returncode": code,
            "seconds": round(time.monotonic() - began, 1),
            "budget_seconds": round(seconds, 1),
            "tail": list(tail),
        }
        if self.stopped and code != 0:
            outcome["status"] = "interrupted"
        elif code == 2 and "sanitizer" in part.groups:
            outcome["status"] = "unavailable"
        with suppress(ElementTree.ParseError):  # killed while it wrote
            if xml.exists():
                outcome["tests"] = _junit(xml)
        document = json.loads(path.read_text()) if part.writes and path.exists() else _bare(part.name, commit)
        document["part"] = outcome
        harness.save(document, path)
        return outcome

    def _run(
        self, command: list[str], environment: dict[str, str], seconds: float, prefix: str | None
    ) -> tuple[int | None, deque[str]]:
        """(exit status, or None where it ran out of time; the last lines). Prints as it goes."""
        tail: deque[str] = deque(maxlen=TAIL)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.running.add(process)
        if self.stopped:
            _stop(process)

        def read() -> None:
            for line in process.stdout:
                if prefix is not None and not line.startswith('{"schema"'):  # the result as one line: it is in the file
                    tail.append(line.rstrip()[:400])
                    print(f"{prefix}{line}", end="", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            _stop(process)
            code = None
        self.running.discard(process)
        reader.join(timeout=5)
        return code, tail

    def stop(self) -> None:
        self.stopped = True
        with ThreadPoolExecutor() as pool:
            list(pool.map(_stop, list(self.running)))


def _stop(process: subprocess.Popen) -> None:
    """As Ctrl-C first: pytest then writes what it has. Its own session: children of the part end with it."""
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
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


def batches(todo: list[Part]) -> list[list[Part]]:
    """What runs at once, one after the other."""
    # One that runs alone has a key of its own.
    return [list(some) for _, some in groupby(todo, lambda part: part.name if part.alone else "")]


def run_all(todo: list[Part], folder: Path, commit: str, total: float) -> list[dict[str, Any]]:
    """Part after part, those that bear company at once. Ctrl-C stops what runs; all that ran has written its result."""
    deadline = time.monotonic() + total
    stamp = time.strftime("%Y%m%d-%H%M", time.gmtime())
    outcomes: list[dict[str, Any]] = []
    todo_batches = batches(todo)
    runner = Runner()
    for index, batch in enumerate(todo_batches):
        left = deadline - time.monotonic()
        if left < 5 or runner.stopped:
            why = "interrupted" if runner.stopped else "no time left"
            outcomes += [{"name": part.name, "status": "not run", "seconds": 0.0, "tail": [why]} for part in batch]
            continue
        # Later parts keep their seconds; what is over is for whoever comes first.
        spare = left - sum(max(part.seconds for part in later) for later in todo_batches[index + 1 :])
        with ThreadPoolExecutor(len(batch)) as pool:
            futures = []
            for part in batch:
                path = folder / f"{stamp}-{_end(commit, part.name)}"
                seconds = min(left, max(part.seconds, spare))
                prefix: str | None = f"[{part.name}] " if len(batch) > 1 else ""
                print(f"\n=== {part.name} (at most {seconds:.0f} s)", flush=True)
                if part.writes and _tests_failed(part, folder, commit):
                    print("its tests failed: measured for the record, no speed is shown", flush=True)
                    prefix = None
                futures.append(pool.submit(runner.part, part, path, seconds, commit, prefix))
            try:
                wait(futures)
            except KeyboardInterrupt:
                runner.stop()
        for future in futures:
            outcomes.append(future.result())
            print("=== {name}: {status}, {seconds} s".format(**outcomes[-1]), flush=True)
    return outcomes


def _end(commit: str, name: str) -> str:
    return f"{commit.replace('+', '-dirty')}-{name}.json"


def _tests_failed(part: Part, folder: Path, commit: str) -> bool:
    """Those of this run, or of an earlier one on the same commit."""
    from benchmarks.tested import failed

    found = sorted(folder.glob(f"*-{_end(commit, part.name.replace('bench-', 'tests-'))}"))
    return bool(found) and failed(json.loads(found[-1].read_text())["part"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="", help="names or groups, comma-separated, bench-moe=300 for more seconds")
    parser.add_argument("--dry-run", action="store_true", help="every part on a CPU at toy sizes")
    parser.add_argument("--results", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of all parts together")
    parser.add_argument("--list", action="store_true", help="list the parts")
    given = parser.parse_args(arguments)
    every = parts(given.dry_run)
    if given.list:
        for part in every:
            print(f"{part.name:<20} {part.seconds:>5.0f} s  {' '.join(part.command)}")
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
        print(f"  {outcome['name']:<20} {outcome['status']:<12} {outcome['seconds']:>6} s  {_summary(outcome)}")
    if not given.dry_run and given.results is None:
        make_results.write(HERE / "results", HERE / "RESULTS.md")
        print(f"written: {HERE / 'RESULTS.md'}")
    if any(outcome["status"] == "interrupted" for outcome in outcomes):
        return INTERRUPTED
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
