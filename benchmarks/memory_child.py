"""A CPU's peak memory of one contender, in a process of its own: python -m benchmarks.memory_child '{"op": ...}'."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import torch

from benchmarks import measure
from benchmarks.harness import Contender


def find(module: ModuleType, request: dict, shape: dict) -> Contender:
    problem = next(p for p in module.problems(shape, torch.device("cpu")) if p.name == request["problem"])
    return next(c for c in problem.contenders if c.name == request["contender"])


def main() -> None:
    request = json.loads(sys.argv[1])
    module = importlib.import_module(f"benchmarks.bench_{request['op']}")
    if "way" in request:  # of a whole step
        from benchmarks import waterfall

        call = waterfall.memory_call(module.STEP, request)
    else:
        # Libraries load, threads start and caches fill at a toy size, so that only the problem's own memory is seen.
        small = {**request["shape"], **module.TINY}
        find(module, request, small).prepare()()
        contender = find(module, request, request["shape"])
        call = contender.prepare()
        if contender.compiles:
            call()
    peak, outputs = measure.rss_peak_bytes(call)
    print(json.dumps({"peak_bytes": peak, "output_bytes": outputs}))


if __name__ == "__main__":
    main()
