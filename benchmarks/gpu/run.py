"""How the parts of ``make gpu`` run: each a process of its own; one that fails or runs out of time costs no other.

Every part writes <date>-<commit>-<part>.json as it goes, and whenever one has ended all results are packed into one
archive. What is not timed, tests and sanitizer, runs at once; what is timed runs alone. A part is sure of its seconds,
and may take besides what those before it left over; out of time it is asked to stop, as by Ctrl-C, and keeps what it
has written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.gpu.parts import Part
from benchmarks.harness import document as documents
from benchmarks.harness.machine import ROOT
from benchmarks.harness.processes import environment
from benchmarks.report.tested import COUNTS, failed

TAIL = 40  # lines of a part's output that its result keeps
AT_ONCE = 4  # at least, of what may run beside each other
GRACE_SECONDS = 8  # for a part that ran out of time to write what it has


class Runner:
    """Runs parts as processes, and can stop those that run."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.remedies: dict[str, str] = {}  # what benchmarks are started with since a probe has said so

    def part(self, part: Part, path: Path, seconds: float, commit: str, prefix: str | None = "") -> dict[str, Any]:
        """Runs it; whatever happens, ``path`` holds a result afterwards. ``prefix`` of its lines; None: not shown."""
        xml = Path(tempfile.mkdtemp(prefix="prism-gpu-")) / "junit.xml"
        values = {"{json}": str(path), "{xml}": str(xml)}
        command = [values.get(word, word) for word in part.command]
        own = {"TRITON_INTERPRET": None, "PYTHONUNBUFFERED": "1", "PRISM_COMMIT": commit, **part.environment}
        own |= self.remedies if part.writes else {}
        began = time.monotonic()
        code, tail = self._run(command, environment(**own), seconds, prefix)
        outcome = {
            "name": part.name,
            "status": "timeout" if code is None else "ok" if code == 0 else "failed",
            "returncode": code,
            "seconds": round(time.monotonic() - began, 1),
            "budget_seconds": round(seconds, 1),
            "tail": list(tail),
        }
        if part.name == "probe":
            found = [line.removeprefix("remedy: ") for line in tail if line.startswith("remedy: ")]
            self.remedies |= dict(line.partition("=")[::2] for line in found)
        elif part.writes and self.remedies:
            outcome["environment"] = dict(self.remedies)
        if self.stopped and code != 0:
            outcome["status"] = "interrupted"
        elif code == 2 and "sanitizer" in part.groups:
            outcome["status"] = "unavailable"
        with suppress(ElementTree.ParseError):  # killed while it wrote
            if xml.exists():
                outcome["tests"] = _junit(xml)
        if part.writes and path.exists():
            document = json.loads(path.read_text())
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            document = documents.new(part.name, device, commit=commit)
        documents.save({**document, "part": outcome}, path)
        return outcome

    def _run(
        self, command: list[str], own: dict[str, str], seconds: float, prefix: str | None
    ) -> tuple[int | None, deque[str]]:
        """(exit status, or None where it ran out of time; the last lines). Prints as it goes."""
        tail: deque[str] = deque(maxlen=TAIL)
        process = subprocess.Popen(
            command, cwd=ROOT, env=own, text=True, errors="replace", stdout=subprocess.PIPE,
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


def _junit(path: Path) -> dict[str, Any]:
    """Counts, and what failed. A file that lacks an optional package is counted apart: it was not run."""
    counts: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), "not collected": [], "failures": []}
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
    return [list(some) for _, some in groupby(todo, lambda part: part.beside or (part.name,))]


class Archive:
    """All results of a folder as one .tar.gz, packed again after every part: <device>/<file>.json."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder, self.lock = path, folder, threading.Lock()

    def pack(self, *unused: Any) -> None:
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(self.path.name + ".part")
            with tarfile.open(aside, "w:gz") as packed:
                for path in sorted(self.folder.glob("*.json")):
                    packed.add(path, f"{self.folder.name}/{path.name}")
            aside.replace(self.path)


def run_all(
    todo: list[Part], folder: Path, commit: str, total: float, ended: Callable[..., Any] = lambda *unused: None
) -> list[dict[str, Any]]:
    """Part after part, those that bear company at once. Ctrl-C stops what runs; all that ran has written its result.
    ``ended`` is called whenever a part has."""
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
        # All of them on a machine for GPUs; on a small one, in a dry run, some after others.
        with ThreadPoolExecutor(min(len(batch), max(AT_ONCE, 2 * (os.cpu_count() or 1)))) as pool:
            futures = []
            for part in batch:
                path = folder / f"{stamp}-{documents.file_end(commit, part.name)}"
                seconds = min(left, max(part.seconds, spare))
                prefix: str | None = f"[{part.name}] " if len(batch) > 1 else ""
                print(f"\n=== {part.name} (at most {seconds:.0f} s)", flush=True)
                if part.writes and _tests_failed(part, folder, commit):
                    print("its tests failed: measured for the record, no speed is shown", flush=True)
                    prefix = None
                futures.append(pool.submit(runner.part, part, path, seconds, commit, prefix))
                futures[-1].add_done_callback(ended)
            try:
                wait(futures)
            except KeyboardInterrupt:
                runner.stop()
        for future in futures:
            outcomes.append(future.result())
            print("=== {name}: {status}, {seconds} s".format(**outcomes[-1]), flush=True)
    return outcomes


def _tests_failed(part: Part, folder: Path, commit: str) -> bool:
    """Those of this run, or of an earlier one on the same commit."""
    end = documents.file_end(commit, re.sub("^(bench|first)-", "tests-", part.name))
    found = sorted(folder.glob(f"*-{end}"))
    return bool(found) and failed(json.loads(found[-1].read_text())["part"])
