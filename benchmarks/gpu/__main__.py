"""``make gpu``: all that needs a GPU, in parts, within a time limit: python -m benchmarks.gpu [--part linear,moe].

Results go to benchmarks/results/<gpu>, and RESULTS.md is made from them at the end. Which parts there are is in
parts.py, how they run in run.py. ``--part moe`` takes all of an op.

Uses this Python and its torch, and installs nothing. ``--dry-run`` walks through every part on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.parts import chosen, parts

TOTAL_SECONDS = 525  # nine minutes, less start and report
DRY_RUN_PATIENCE = 4  # times the budgets: a dry run looks for mistakes, and Triton's interpreter is slow
INTERRUPTED = 130


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
        return _refused(f"{sys.executable} has no torch; name one that has: make gpu PYTHON=...")
    import torch

    from benchmarks.gpu.run import run_all
    from benchmarks.harness import machine
    from benchmarks.harness.document import RESULTS
    from benchmarks.report import results, tested

    if not given.dry_run and not torch.cuda.is_available():
        return _refused("needs an NVIDIA GPU, and torch sees none (--dry-run runs toy sizes on a CPU)")
    try:
        todo = chosen(every, [name for name in given.part.split(",") if name])
    except ValueError as error:
        return _refused(str(error))
    if (machine.ROOT / "kernels" / "prism_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        todo = [part for part in todo if part.name != "build"]
    if given.dry_run:
        folder = given.results or Path(tempfile.mkdtemp(prefix="prism-gpu-"))
    else:
        folder = given.results or RESULTS / machine.slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    patience = DRY_RUN_PATIENCE if given.dry_run else 1
    todo = [replace(part, seconds=patience * part.seconds) for part in todo]
    outcomes = run_all(todo, folder, machine.commit(), patience * given.seconds)
    print(f"\nresults: {folder}")
    for outcome in outcomes:
        head = f"  {outcome['name']:<20} {outcome['status']:<12} {outcome['seconds']:>6} s"
        print(f"{head}  {tested.summary(outcome)[:120]}")
    if not given.dry_run and given.results is None:
        results.write(RESULTS, results.PAGE)
        print(f"written: {results.PAGE}")
    if any(outcome["status"] == "interrupted" for outcome in outcomes):
        return INTERRUPTED
    return 0 if all(outcome["status"] in ("ok", "unavailable") for outcome in outcomes) else 1


def _refused(why: str) -> int:
    print(f"make gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
