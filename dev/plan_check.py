"""The plan of a step's memory against the peak of real steps on a CPU: python -m dev.plan_check

A policy of 246 million random weights in fp32 takes two steps, of one and of two packs, through the trainer's own
gradient and updater: three sizes of packs, and one of them with activation checkpointing. Every case is a process of
its own; measured is its peak of resident memory (VmHWM) less what it held when everything was imported and had run once
at tiny sizes. Writes dev/reports/plan.json, and fails where a peak is not within 10 % of the plan.

Freed blocks go back to the system, as with run.tokens_per_pack = auto; ``--heap`` leaves that to the C library, whose
heap then keeps up to a third more (dev/LOG.md), and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "dev" / "reports" / "plan.json"
PROMPT, RESPONSE, GRID = 320, 448, (32, 32)  # tokens; of the prompt 256 are an image's
CASES = ((1024, False), (2048, False), (4096, False), (1024, True))  # tokens of a pack, activation checkpointing
WITHIN = 0.10


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far. ru_maxrss would begin with its parent's."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status: no {what}"
    return int(found[1]) << 10


def case(tokens: int, checkpointing: bool, heap: bool) -> dict[str, Any]:
    """One process's: the plan, and what it took."""
    import torch

    from benchmarks.steps.case import stock_model
    from benchmarks.steps.training import Lengths, made_up, shape_of
    from prism_fast.config import OptimizerConfig, RunConfig
    from prism_fast.models.policy import Policy
    from prism_fast.run.deterministic import set_up_torch
    from prism_fast.run.dimensions import Model, Pack, Text, Tree, Vision
    from prism_fast.run.memory import Setup, Trained, need
    from prism_fast.run.pack_size import give_freed_blocks_back
    from prism_fast.steps.policy_step import policy_gradient
    from prism_fast.steps.update import open_updater
    from prism_kernels import PolicyObjective

    set_up_torch(RunConfig(out=Path("unused"), threads=torch.get_num_threads()))
    if not heap:
        give_freed_blocks_back()
    text = Text(1024, 12, 3072, 16, 8, tied=True, vocab=65_536, head_dim=64)
    model = Model(text, Vision(384, 6, 1536, 1024, heads=6))
    lengths = Lengths(tokens, PROMPT, RESPONSE, RESPONSE // 2, GRID, sigma=0.0)
    tiny = Model(text._replace(hidden=64, layers=1, intermediate=64, vocab=512), Vision(64, 4, 64, 64, heads=1))

    def steps(model: Model, lengths: Lengths) -> None:
        shape = shape_of(model)
        policy = Policy(stock_model(shape, torch.float32, torch.device("cpu"), seed=0)).train()
        if checkpointing:
            policy.checkpoint_activations()
        updater, settings = open_updater(policy, OptimizerConfig(lr=1e-6), 2), {"temperature": 1.0}
        for packs in (1, 2):  # the moments come with the first update
            rollout, advantages = made_up(shape, replace(lengths, packs=packs))
            settings["tokens_per_pack"] = lengths.tokens_per_pack
            policy_gradient(updater, rollout, advantages, PolicyObjective.grpo(), **settings)
            updater.step()

    steps(tiny, Lengths(96, 26, 30, 15, (8, 8), sigma=0.0))
    gc.collect()
    imports = resident("VmRSS")
    steps(model, lengths)
    pack = Pack.of([Tree(PROMPT, lengths.responses(0), GRID[0] * GRID[1] // 4)])
    found = need([Trained(model, checkpointing)], Setup(device="cpu", size=4), pack)
    planned = {"states": found.states, "pass": found.peak, "update": found.update, "training": found.training}
    peak = resident("VmHWM") - imports
    return {
        "tokens": tokens, "checkpointing": checkpointing, "parameters": model.parameters,
        "planned": {name: round(value) for name, value in planned.items()},
        "measured": peak, "imports": imports, "ratio": round(peak / found.training, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(case(*json.loads(given.case), given.heap)))
        return
    rows = []
    for one in CASES:
        command = [sys.executable, "-m", "dev.plan_check", "--case", json.dumps(one)]
        done = subprocess.run(
            command + ["--heap"] * given.heap, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if not given.heap:
        made = {"command": "python -m dev.plan_check", "rows": rows}
        REPORT.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    far = [row for row in rows if abs(row["ratio"] - 1) > WITHIN]
    if far:
        sys.exit(f"{len(far)} of {len(rows)} cases are not within {WITHIN:.0%} of the plan")


if __name__ == "__main__":
    main()
