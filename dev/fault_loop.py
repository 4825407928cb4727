"""Plays every fault of tests/cluster/test_faults.py again and again: what happens once in twenty times shows here.

    nice python dev/fault_loop.py [--times 20] [--minutes 30] [--only WORDS] [--report dev/reports/faults.md]

Processes are real ones on this machine, two at a time. It goes round by round through the faults, and ends after so
many minutes: the next call goes on there, by the counts in runs/faults/counts.json (remove that to begin anew). The
first words of what went wrong are kept. Exit status 1 where a fault did not end as it should.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

FOLDER = ROOT / "runs" / "faults"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=20)
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--only", default="", help="faults with these words in their names")
    options.add_argument("--report", type=Path, default=ROOT / "dev" / "reports" / "faults.md")
    given = options.parse_args()
    from tests.cluster.test_faults import CHECKS
    from tests.tiny_run import prepare

    FOLDER.mkdir(parents=True, exist_ok=True)
    tiny, file = FOLDER / "tiny", FOLDER / "counts.json"
    if not (tiny / "discriminator").is_dir():
        shutil.rmtree(tiny, ignore_errors=True)
        tiny.mkdir()
        prepare(tiny)
    counts: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    names = [name for name in CHECKS if given.only in name]
    end = time.monotonic() + 60 * given.minutes
    for name in (name for played in range(given.times) for name in names if _played(counts, name) == played):
        if time.monotonic() > end:
            break
        play(name, CHECKS[name], tiny, counts.setdefault(name, {"right": 0, "wrong": [], "seconds": 0.0}))
        file.write_text(json.dumps(counts, indent=1))
        given.report.write_text(report(counts, list(CHECKS), given.times))
    return int(any(found["wrong"] for found in counts.values()))


def _played(counts: dict[str, Any], name: str) -> int:
    found = counts.get(name)
    return 0 if found is None else found["right"] + len(found["wrong"])


def play(name: str, check: Any, tiny: Path, found: dict[str, Any]) -> None:
    folder = FOLDER / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begun = time.monotonic()
    try:
        check(tiny, folder)
        found["right"] += 1
        said = "right"
    except Exception as error:  # noqa: BLE001  whatever it is, it is counted
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        found["wrong"].append(said)
    seconds = time.monotonic() - begun
    found["seconds"] += seconds
    print(f"{name}: {said}, {seconds:.0f} s", flush=True)


def report(counts: dict[str, Any], names: list[str], times: int) -> str:
    lines = [
        "# Faults, again and again",
        "",
        f"`python dev/fault_loop.py`, which goes on until each was played {times} times: in two processes on a CPU "
        "(gloo), beside other work; Python "
        f"{platform.python_version()}, torch {_torch()}. A fault is right where every process ended as "
        "tests/cluster/test_faults.py says, with the lines that it says, and a run that was started again had the bits "
        "of one that nothing happened to.",
        "",
        "| fault | right | of | seconds each |",
        "|---|---|---|---|",
    ]
    for name in names:
        found = counts.get(name, {"right": 0, "wrong": [], "seconds": 0.0})
        played = _played(counts, name)
        each = f"{found['seconds'] / played:.0f}" if played else "-"
        lines.append(f"| {name} | {found['right']} | {played} | {each} |")
    wrong = [f"- {name}: {said}" for name in names for said in counts.get(name, {"wrong": []})["wrong"]]
    return "\n".join([*lines, *(["", "What went wrong:", *wrong] if wrong else []), ""])


def _torch() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    sys.exit(main())
