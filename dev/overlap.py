"""What `rollout.overlap` gains on this machine: the demo's alignment and RLVR, with and without, turn about.

    prism-fast demo --out DEMO --smoke && python -m dev.overlap DEMO [STEPS] [ROUNDS] [THREADS]

A line for every run: seconds of a step but the first two, those that it waited for responses, and CPU seconds of the
run: of all threads, of the trainer's own, and of those that sampled beside it. On a machine that others use, read the
CPU seconds: two threads get more turns than one. What an idle second core can gain is what leaves the trainer's thread.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prism_fast import metric_names as names
from prism_fast.config import CONFIGS, RECIPES, load_config, merge, read_yaml
from prism_fast.run.monitor import read_metrics
from prism_fast.stages.align import align
from prism_fast.stages.rlvr import rlvr
from prism_fast.steps.ahead import Ahead

STAGES = {"align": align, "rlvr": rlvr}
beside: list[float] = []  # CPU seconds of every batch that was drawn beside a step


def count_cpu_seconds() -> None:
    """Of the threads that sample."""
    real = Ahead._beside

    def counted(self: Any, *given: Any) -> None:
        began = time.thread_time()
        real(self, *given)
        beside.append(time.thread_time() - began)

    Ahead._beside = counted


def run(demo: Path, stage: str, overlap: int, steps: int, threads: int) -> str:
    recipe = read_yaml(RECIPES / "demo.yaml")
    with tempfile.TemporaryDirectory() as out:
        own = {"out": out, "threads": threads, "save_every": 0, "eval_every": 0}
        tree = merge(recipe[stage], {"run": {**recipe["run"], **own}, "steps": steps, "rollout": {"overlap": overlap}})
        tree |= {"policy": {"path": demo / "sft/final/policy"}, "data": {"files": [demo / f"data/{stage}.parquet"]}}
        if stage == "align":
            tree["discriminator"] = {"path": demo / "warmup/final/discriminator"}
        config: Any = load_config(CONFIGS[stage], None, base=tree)
        beside.clear()
        before = time.process_time(), time.thread_time()
        with contextlib.redirect_stdout(io.StringIO()):
            STAGES[stage](config)
        whole, mine = time.process_time() - before[0], time.thread_time() - before[1]
        lines = [line for line in read_metrics(Path(out) / "metrics.jsonl") if names.TOKENS_PER_SECOND in line][2:]
    wall = sum(value for line in lines for name, value in line.items() if name.startswith(names.SECONDS)) / len(lines)
    waited = sum(line[names.seconds("rollout")] for line in lines) / len(lines)
    return (
        f"{stage:5} threads {threads} overlap {overlap}: step {wall:.2f} s, waits {waited:.2f} s; CPU {whole:.1f} s, "
        f"trainer's {mine:.1f} s, beside it {sum(beside):.1f} s; load {os.getloadavg()[0]:.1f}"
    )


def main(demo: str, steps: str = "12", rounds: str = "3", threads: str = "1") -> None:
    count_cpu_seconds()
    for stage in STAGES:
        for number in range(int(rounds)):
            for overlap in (number % 2, 1 - number % 2):
                print(run(Path(demo), stage, overlap, int(steps), int(threads)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
