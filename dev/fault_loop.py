"""Plays every fault of tests/cluster/test_faults.py again and again: what happens once in twenty times shows here.

    nice python dev/fault_loop.py [--times 20] [--minutes 30] [--only WORDS]
    python dev/fault_loop.py --merge COUNTS.json [--revision 1a2b3c4]

Processes are real ones on this machine, two at a time. It goes round by round through the faults, and ends after so
many minutes: the next call goes on there, by the counts in dev/reports/faults.json, which says how often each was
played at which revision ("1a2b3c4+": with changes that were not committed); remove it to begin anew. The first words
of what went wrong are kept, and dev/reports/faults.md is written from it. Exit status 1 where a fault did not end as it
should.

``--merge`` plays nothing: it adds the counts of another clone, each file once; ``--revision``: at which they were
played, where the file does not say.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

FOLDER = ROOT / "runs" / "faults"
REPORTS = ROOT / "dev" / "reports"
CODE = ("prism_fast", "kernels", "csrc", "tests")  # what a play depends on
# By fault: {"right": 3, "wrong": ["AssertionError: ..."], "seconds": 61.2, "revisions": {"1a2b3c4": 3, "5d6e7f8+": 1}}
Counts = dict[str, dict[str, Any]]


def main(words: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=20)
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--only", default="", help="faults with these words in their names")
    options.add_argument("--counts", type=Path, default=REPORTS / "faults.json")
    options.add_argument("--merge", type=Path)
    options.add_argument("--revision")
    given = options.parse_args(words)
    from tests.cluster.test_faults import CHECKS

    counts: Counts = json.loads(given.counts.read_text()) if given.counts.exists() else {}

    def keep() -> None:
        given.counts.write_text(json.dumps(counts, indent=1) + "\n")
        given.counts.with_suffix(".md").write_text(report(counts, list(CHECKS), given.times))

    if given.merge is not None:
        merge(counts, json.loads(given.merge.read_text()), given.revision)
        keep()
    else:
        names = [name for name in CHECKS if given.only in name]
        tiny, here, end = inputs(), revision(), time.monotonic() + 60 * given.minutes
        for name in (name for played in range(given.times) for name in names if plays(counts, name) <= played):
            if time.monotonic() > end:
                break
            play(name, CHECKS[name], tiny, counts, here)
            keep()
    return int(any(found["wrong"] for found in counts.values()))


def inputs() -> Path:
    """A tiny run's, made once."""
    from tests.tiny_run import prepare

    tiny = FOLDER / "tiny"
    if not (tiny / "discriminator").is_dir():
        shutil.rmtree(tiny, ignore_errors=True)
        tiny.mkdir(parents=True)
        prepare(tiny)
    return tiny


def revision() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=7", "HEAD") + ("+" if git("status", "--porcelain", "--", *CODE) else "")


def merge(counts: Counts, others: Counts, revision: str | None) -> None:
    """Adds what was played elsewhere."""
    for name, theirs in others.items():
        played = theirs["right"] + len(theirs["wrong"])
        if "revisions" not in theirs and revision is None:
            sys.exit("--merge: the file does not say at which revision it was played; add --revision")
        found = counts.setdefault(name, _none())
        for key in ("right", "wrong", "seconds"):
            found[key] += theirs[key]
        for at, times in theirs.get("revisions", {revision: played}).items():
            found["revisions"][at] = found["revisions"].get(at, 0) + times


def _none() -> dict[str, Any]:
    return {"right": 0, "wrong": [], "seconds": 0.0, "revisions": {}}


def plays(counts: Counts, name: str) -> int:
    found = counts.get(name, _none())
    return found["right"] + len(found["wrong"])


def play(name: str, check: Any, tiny: Path, counts: Counts, here: str) -> None:
    folder = FOLDER / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begun = time.monotonic()
    wrong: list[str] = []
    try:
        check(tiny, folder)
    except Exception as error:  # noqa: BLE001  whatever it is, it is counted
        wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
    seconds = time.monotonic() - begun
    one = {"right": int(not wrong), "wrong": wrong, "seconds": round(seconds, 1), "revisions": {here: 1}}
    merge(counts, {name: one}, None)
    print(f"{name}: {wrong[0] if wrong else 'right'}, {seconds:.0f} s", flush=True)


def report(counts: Counts, names: list[str], times: int) -> str:
    """The page; faults that are no longer played stand last."""
    lines = [
        "# Faults, again and again",
        "",
        f"`python dev/fault_loop.py`, which goes on until each was played {times} times: in two processes on a CPU "
        "(gloo), beside other work; Python "
        f"{platform.python_version()}, torch {_torch()}. A fault is right where every process ended as "
        "tests/cluster/test_faults.py says, with the lines that it says, and a run that was started again had the bits "
        "of one that nothing happened to. Revisions, with the number of plays at each; +: with changes.",
        "",
        "| fault | right | of | seconds each | at |",
        "|---|---|---|---|---|",
    ]
    rows = [*names, *(name for name in counts if name not in names)]
    for name in rows:
        found, played = counts.get(name, _none()), plays(counts, name)
        each = f"{found['seconds'] / played:.0f}" if played else "-"
        at = ", ".join(f"{revision}: {times}" for revision, times in found["revisions"].items())
        lines.append(f"| {name} | {found['right']} | {played} | {each} | {at} |")
    wrong = [f"- {name}: {said}" for name in rows for said in counts.get(name, _none())["wrong"]]
    return "\n".join([*lines, *(["", "What went wrong:", *wrong] if wrong else []), ""])


def _torch() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    sys.exit(main())
