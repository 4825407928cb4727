"""Processes of a benchmark's own: their environment, and questions to ``benchmarks.harness.child``, in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import Unavailable, say

CHILD = [sys.executable, "-m", "benchmarks.harness.child"]
PRECOMPILED = "PRISM_PRECOMPILED"  # set in the processes that compile
COMPILERS = 12
COMPILE_SECONDS = 150.0


def environment(kernels: Path = ROOT / "kernels", **changes: str | None) -> dict[str, str]:
    """This process's, with these kernels and this tree first on the path; ``changes``: None takes a variable away."""
    paths = [str(kernels), str(ROOT), os.environ.get("PYTHONPATH", "")]
    values = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}
    return {name: value for name, value in values.items() if value is not None}


def ask_once(request: dict[str, Any], seconds: float = 600, **changes: str) -> dict[str, Any]:
    """The answer of a new process. Raises Unavailable where it fails or takes longer."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment(**changes), "timeout": seconds}
    try:
        done = subprocess.run(CHILD, input=json.dumps(request), **options)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"the measuring process took over {seconds:.0f} s") from None
    if done.returncode != 0:
        raise Unavailable(f"the measuring process failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(request: dict[str, Any]) -> tuple[int, int]:
    """(peak, outputs) in bytes, by resident memory: in a process of its own, as memory that others freed would hide
    what this one takes. Raises Unavailable."""
    answer = ask_once({"do": "memory", **request})
    return answer["peak_bytes"], answer["output_bytes"]


def precompile(request: dict[str, Any]) -> None:
    """Compiles in parallel what a peer's autotuner will try: alone, at its first call, it does so one after another.

    Every process runs the peer at a small size with its share of each kernel's configurations, untimed; the binaries
    land in Triton's cache on disk, where the peer then finds them. What it measures and chooses stays its own. One that
    fails or is late leaves its share to the peer, and is told.
    """
    count = max(1, min(COMPILERS, (os.cpu_count() or 1) - 2))
    began = time.monotonic()

    def share(index: int) -> bool:
        asked = {"do": "compile", **request, "share": [index, count]}
        try:
            ask_once(asked, COMPILE_SECONDS, OMP_NUM_THREADS="1", **{PRECOMPILED: "1"})
        except Unavailable:
            return False
        return True

    with ThreadPoolExecutor(count) as pool:
        failed = count - sum(pool.map(share, range(count)))
    took = time.monotonic() - began
    say(f"{request['contender']}: compiled by {count} processes in {took:.0f} s, {failed} failed")


class Worker:
    """A process that answers each line of JSON with one line of JSON; ``kernels``: whose prism_kernels it loads."""

    def __init__(self, name: str, kernels: Path, log: Path):
        self.name, self.log = name, log
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("w") as errors:
            self.process = subprocess.Popen(CHILD, env=environment(kernels), cwd=ROOT, stderr=errors, **pipes)

    def ask(self, **request: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # ended: what it said last is below
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        tail = self.log.read_text().strip().splitlines()[-3:]
        raise RuntimeError(f"the process of {self.name} ended: {' '.join(tail)}")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
