"""``make gpu``: all that needs a GPU, in three stages of less than ten minutes: python -m benchmarks.gpu --part first.

Stages are first, checks and speed; which parts they have is in parts.py, how these run in run.py. ``--part moe`` takes
all of an op. Results go to benchmarks/results/<gpu>, RESULTS.md is made from them at the end, and runs/gpu holds them
as one archive, packed again after every part.

Uses this Python and its torch. What the machine lacks comes from a folder of wheels (wheels.py) and goes into
runs/gpu/site. ``--dry-run`` walks through every part on a CPU at toy sizes, as on a machine without those packages.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import site
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import wheels
from benchmarks.gpu.parts import STAGE_SECONDS, Part, by_stage, chosen, parts
from benchmarks.gpu.without import block

DRY_RUN_PATIENCE = 4  # times the budgets: a dry run looks for mistakes, and Triton's interpreter is slow
INTERRUPTED = 130
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    named = "stages (first, checks, speed), names or groups, comma-separated, bench-moe=300 for more seconds"
    parser.add_argument("--part", default="", help=f"{named}; default: the three stages")
    parser.add_argument("--dry-run", action="store_true", help="every part on a CPU at toy sizes")
    parser.add_argument("--results", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--archive", type=Path, default=OUT / "results.tar.gz", help="all results, after every part")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="what is missing is installed from here")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="of a stage, or of all parts named")
    parser.add_argument("--list", action="store_true", help="list the parts")
    given = parser.parse_args(arguments)
    names = [name for name in given.part.split(",") if name]
    every = parts(given.dry_run)
    if given.list:
        for part in every:
            stage = part.groups[0] if part.groups else "asked"
            print(f"{stage:<8} {part.name:<20} {part.seconds:>5.0f} s  {' '.join(part.command)}")
        return 0
    if importlib.util.find_spec("torch") is None:
        return _refused(f"{sys.executable} has no torch; name one that has: make gpu PYTHON=...")
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        return _refused("needs an NVIDIA GPU, and torch sees none (--dry-run runs toy sizes on a CPU)")
    try:
        chosen(every, names)
    except ValueError as error:
        return _refused(str(error))
    _prepare(given.wheels, given.dry_run)
    # Again: what has been installed, pytest-xdist say, has a part in the commands.
    todo = [part for part in chosen(parts(given.dry_run), names) if part.name != "build" or _must_build()]
    patience = DRY_RUN_PATIENCE if given.dry_run else 1
    todo = [replace(part, seconds=patience * part.seconds) for part in todo]
    return _run(todo, names, given, patience * given.seconds - (time.monotonic() - began))


def _run(todo: list[Part], names: list[str], given: argparse.Namespace, first_total: float) -> int:
    import torch

    from benchmarks.gpu.run import Archive, run_all
    from benchmarks.harness import machine
    from benchmarks.harness.document import RESULTS
    from benchmarks.report import results, tested

    if given.dry_run:
        folder = given.results or Path(tempfile.mkdtemp(prefix="prism-gpu-"))
    else:
        folder = given.results or RESULTS / machine.slug(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    archive = Archive(given.archive, folder)
    outcomes, total = [], first_total
    for stage in by_stage(todo, names):
        outcomes += run_all(stage, folder, machine.commit(), total, archive.pack)
        total = given.seconds * (DRY_RUN_PATIENCE if given.dry_run else 1)
    archive.pack()
    print(f"\nresults: {folder}, and as one file {archive.path}")
    for outcome in outcomes:
        head = f"  {outcome['name']:<20} {outcome['status']:<12} {outcome['seconds']:>6} s"
        print(f"{head}  {tested.summary(outcome)[:120]}")
    if not given.dry_run and given.results is None:
        results.write(RESULTS, results.PAGE)
        print(f"written: {results.PAGE}")
    if any(outcome["status"] == "interrupted" for outcome in outcomes):
        return INTERRUPTED
    return 0 if all(outcome["status"] in ("ok", "unavailable") for outcome in outcomes) else 1


def _prepare(folder: Path, dry_run: bool) -> None:
    """What is missing is installed, and found by this process and by those of all parts."""
    place = OUT / "site"
    if dry_run:
        place = Path(tempfile.mkdtemp(prefix="prism-site-"))
        lacking = [wheel for wheel in wheels.WHEELS if wheel.absent or wheel in wheels.missing()]
        lines = wheels.install(folder, place, lacking)
        block(wheels.blocked(), place)
    else:
        site.addsitedir(str(place))  # what an earlier call has installed; results name its versions
        lines = wheels.install(folder, place)
        importlib.invalidate_caches()
    for line in lines:
        print(line, flush=True)
    path = [str(place), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


def _must_build() -> bool:
    """Whether the extension is not there, or was built without its CUDA part where there is an nvcc."""
    sys.path.insert(0, str(ROOT / "kernels"))
    from prism_kernels.native import need_cuda, need_native

    build = next(part for part in parts(dry_run=False) if part.name == "build")
    return need_native() is not None or ("PRISM_BUILD_CUDA" in build.environment and need_cuda() is not None)


def _refused(why: str) -> int:
    print(f"make gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
