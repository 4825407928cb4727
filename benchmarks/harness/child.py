"""python -m benchmarks.harness.child: answers each line of JSON on its input with one; what each "do" means is here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import prism_kernels
from benchmarks.harness import measure

Request = dict[str, Any]


def memory(bench: Any, request: Request) -> dict[str, int]:
    """A CPU's peak memory of one contender, or one way of a step."""
    peak, outputs = measure.rss_peak_bytes(bench.memory_call(request))
    return {"peak_bytes": peak, "output_bytes": outputs}


def compile_share(bench: Any, request: Request) -> dict[str, int]:
    """From now on every autotuner that is made tries one share of its configurations, once each and untimed."""
    from triton.runtime.autotuner import Autotuner

    whole, (share, count) = Autotuner.__init__, request["share"]

    def once(call, quantiles) -> list[float]:
        call()
        return [1.0] * len(quantiles)

    def init(self, *args, **kwargs) -> None:
        whole(self, *args, **kwargs)
        self.configs = self.configs[share::count] or self.configs[:1]
        self._do_bench = once

    Autotuner.__init__ = init
    bench.contender(request, torch.device("cuda")).prepare()()
    torch.cuda.synchronize()
    return {"share": share}


class Side:
    """One commit of a comparison: prepares what it is asked for, then times one call a request."""

    def problems(self, bench: Any, request: Request) -> dict[str, Any]:
        loaded, kernels = Path(prism_kernels.__file__).resolve(), Path(request["kernels"])
        if kernels.resolve() not in loaded.parents:
            raise RuntimeError(f"prism_kernels came from {loaded}, expected {kernels}: is an installed copy first?")
        found = bench.problems(request["shape"], torch.device(request["device"]))
        return {"names": [problem.name for problem in found]}

    def prepare(self, bench: Any, request: Request) -> dict[str, Any]:
        from benchmarks.harness.op import about, check_ours

        device = torch.device(request["device"])
        problem = bench.problem(request, device)
        ready = check_ours(problem)
        self.call = ready.call
        if self.call is not None:
            self.timer = measure.Timer(device)
            self.timer.once(self.call)
            self.repeats = self.timer.repeats(self.call)
        return {"row": ready.row, "problem": about(problem)}

    def time(self, bench: Any, request: Request) -> dict[str, float]:
        return {"seconds": self.timer.once(self.call, self.repeats)}


def main() -> None:
    side = Side()
    answers = {"memory": memory, "compile": compile_share}
    answers |= {"problems": side.problems, "prepare": side.prepare, "time": side.time}
    for line in sys.stdin:
        request = json.loads(line)
        bench = importlib.import_module(request["module"]).BENCH
        print(json.dumps(answers[request["do"]](bench, request)), flush=True)


if __name__ == "__main__":
    main()
