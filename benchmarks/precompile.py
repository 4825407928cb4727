"""Compiles in parallel what a peer's autotuner will try: alone, at its first call, it does so one after another.

Every process runs the peer at a small size with its share of each kernel's configurations, untimed; the binaries land
in Triton's cache on disk, where the peer then finds them. What it measures and chooses stays its own.

    python -m benchmarks.precompile '{"op": "moe", "problem": "experts", "shape": {...}, "contender": "...", "share": [0, 8]}'
"""  # noqa: E501

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import machine

PRECOMPILED = "PRISM_PRECOMPILED"  # set in the processes themselves
PROCESSES = 12
PATIENCE = 150.0  # seconds


def precompile(request: dict[str, Any]) -> None:
    """Runs the shares and waits for them. One that fails or is late leaves its part to the peer, and is told."""
    count = max(1, min(PROCESSES, (os.cpu_count() or 1) - 2))
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment[PRECOMPILED] = "1"
    began = time.monotonic()
    workers = []
    for share in range(count):
        text = json.dumps({**request, "share": [share, count]})
        command = [sys.executable, "-m", "benchmarks.precompile", text]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    failed = 0
    try:
        for worker in workers:
            worker.wait(timeout=max(0.1, began + PATIENCE - time.monotonic()))
            failed += worker.returncode != 0
    except subprocess.TimeoutExpired:
        failed = sum(worker.poll() != 0 for worker in workers)
    finally:
        for worker in workers:
            worker.kill()  # no more than a signal to one that has ended
            worker.wait()
    took = time.monotonic() - began
    print(f"{request['contender']}: compiled by {count} processes in {took:.0f} s, {failed} failed", file=sys.stderr)


def take_share(share: int, count: int) -> None:
    """From now on every autotuner that is made tries one share of its configurations, once each and untimed."""
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.__init__

    def once(call, quantiles) -> list[float]:
        call()
        return [1.0] * len(quantiles)

    def init(self, *args, **kwargs) -> None:
        whole(self, *args, **kwargs)
        self.configs = self.configs[share::count] or self.configs[:1]
        self._do_bench = once

    Autotuner.__init__ = init


def main() -> None:
    request = json.loads(sys.argv[1])
    take_share(*request["share"])
    module = importlib.import_module(f"benchmarks.bench_{request['op']}")
    problems = module.problems(request["shape"], torch.device("cuda"))
    problem = next(problem for problem in problems if problem.name == request["problem"])
    next(found for found in problem.contenders if found.name == request["contender"]).prepare()()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
