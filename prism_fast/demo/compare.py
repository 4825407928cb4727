"""`prism-fast demo --compare`: does alignment pay, where the policy has drifted? Several seeds, all arms of each.

Every seed has a base of its own. Its arms (`arms.py`) are processes of one thread that run beside each other; what is
done is written, and an interrupted comparison goes on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from prism_fast.demo.arms import ARMS, HOW, START, SeedOfArms, folder_of, result_file
from prism_fast.demo.demo import claim, recipe_of
from prism_fast.files import write_json
from prism_fast.records import DataError
from prism_fast.report.build import build_report
from prism_fast.run.environment import environment

POLL = 0.2  # seconds between looks at the running pieces
# (with, without): what is compared, at as much RLVR and at as many policy updates in all.
DIFFERENCES = (
    ("prism", "direct_short"), ("prism_hard", "direct_short"), ("prism", "direct_long"), ("prism_hard", "direct_long"),
    ("prism_hard", "prism"), ("prism_hard", "control"),
)  # fmt: skip
READINGS = ("direct_short", "direct_long", "prism", "prism_hard", "control")


def compare(
    out: Path,
    *,
    seeds: Sequence[int],
    smoke: bool = False,
    resume: bool = False,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what ``out`` lacks and returns what it writes to ``out/summary.json``; ``out/report.html`` lies
    beside it."""
    console = console or Console()
    names = ["demo", *(["smoke"] if smoke else []), "compare", *(["compare_smoke"] if smoke else [])]
    recipe = recipe_of(names, overrides, preset)
    checked = SeedOfArms(out, seeds[0], recipe, console)
    with claim(out, {"seeds": list(seeds), "recipe": recipe}, resume):
        began = time.perf_counter()
        _run(out, seeds, console)
        found = _gathered(out, seeds) | {"teacher_errors": checked.compare.teacher_errors}
        summary = {"compare": found, "seconds": time.perf_counter() - began, "environment": environment()}
        write_json(out / "summary.json", summary, indent=1)
        report = build_report(out)
    _show(console, found)
    console.print(f"summary {out / 'summary.json'}   report {report}", soft_wrap=True)
    return summary


class _Piece(NamedTuple):
    seed: int
    name: str

    def ready(self, out: Path) -> bool:
        return self.name == START or result_file(out, self.seed, START).exists()


def _run(out: Path, seeds: Sequence[int], console: Console) -> None:
    """All pieces that have no result yet, as many beside each other as there are cores, but no more than arms."""
    waiting = [_Piece(seed, name) for seed in seeds for name in (START, *ARMS)]
    waiting = [piece for piece in waiting if not result_file(out, piece.seed, piece.name).exists()]
    running: dict[_Piece, subprocess.Popen] = {}
    at_once = min(len(ARMS), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    before = signal.signal(signal.SIGTERM, _leave) if threading.current_thread() is threading.main_thread() else None
    try:
        while waiting or running:
            for piece in [piece for piece in waiting if piece.ready(out)][: at_once - len(running)]:
                waiting.remove(piece)
                running[piece] = _started(out, piece)
                console.print(f"seed {piece.seed} {piece.name}: begun, {_log(out, piece)}", soft_wrap=True)
            time.sleep(POLL)
            for piece in [piece for piece, process in running.items() if process.poll() is not None]:
                status = running.pop(piece).returncode
                if status:
                    raise DataError(f"seed {piece.seed}, {piece.name}: {_why(out, piece, status)}; go on by --resume")
                console.print(f"seed {piece.seed} {piece.name}: done")
    finally:
        for process in running.values():
            process.terminate()  # a stage saves and ends
        for process in running.values():
            process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _leave(signum: int, frame: object) -> None:
    """Ends this process as an exception does, so that the pieces end too."""
    sys.exit(128 + signum)


def _started(out: Path, piece: _Piece) -> subprocess.Popen:
    log = _log(out, piece)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prism_fast.demo.arms", str(out), str(piece.seed), piece.name]
    with open(log, "a", encoding="utf-8") as written:
        return subprocess.Popen(command, stdout=written, stderr=written, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _log(out: Path, piece: _Piece) -> Path:
    return folder_of(out, piece.seed) / f"{piece.name}.log"


def _why(out: Path, piece: _Piece, status: int) -> str:
    lines = _log(out, piece).read_text(encoding="utf-8").strip().splitlines()
    said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return f"ended with exit status {status} ({said}); see {_log(out, piece)}"


def _gathered(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Every figure by seed, and what the seeds say together."""
    results: list[dict[str, Any]] = []
    for seed in seeds:
        results.append({})
        for piece in (START, *ARMS):
            results[-1] |= json.loads(result_file(out, seed, piece).read_bytes())
    kept = ("sampled", "greedy", "sampled_valid", "tokens", "seconds")
    arms = {
        name: {
            **{key: [each[name][key] for each in results] for key in kept if key in results[0][name]},
            **{key: results[0][name][key] for key in ("policy_updates", "teacher_texts") if key in results[0][name]},
        }
        for name in ("base", "drifted", *READINGS)
    }
    held_out, sampled = results[0]["base"]["held_out"], [p for name in READINGS for p in arms[name]["sampled"]]
    return {
        "seeds": list(seeds),
        "held_out": held_out,
        "sampling_error": statistics.mean(math.sqrt(p * (1 - p) / held_out) for p in sampled),
        "arms": arms,
        "differences": [
            {"of": one, "to": other, "how": how, **paired([b - a for a, b in zip(arms[other][how], arms[one][how])])}
            for one, other in DIFFERENCES
            for how in HOW
        ],
        "probes": {arm: [each[arm]["probes"] for each in results] for arm in ("prism", "prism_hard")},
    }


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Their mean with its 95 % interval by Student's t, which one seed alone does not have.

    >>> paired([0.1, 0.2, 0.3])
    {'each': [0.1, 0.2, 0.3], 'mean': 0.2, 'low': -0.048..., 'high': 0.448...}
    """
    mean, count = statistics.mean(differences), len(differences)
    found: dict[str, Any] = {"each": list(differences), "mean": mean}
    if count > 1:
        half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
        found |= {"low": mean - half, "high": mean + half}
    return found


def _show(console: Console, found: Mapping[str, Any]) -> None:
    table = Table("arm", "sampled", "greedy", "policy updates", "teacher texts", box=SIMPLE_HEAD, show_edge=False)
    for name, arm in found["arms"].items():
        means = (f"{statistics.mean(arm[how]):.1%}" for how in HOW)
        table.add_row(name, *means, *(str(arm.get(key, "")) for key in ("policy_updates", "teacher_texts")))
    console.print(table)
    for each in found["differences"]:
        interval = f" (95 %: {each['low']:+.1%} to {each['high']:+.1%})" if "low" in each else ""
        console.print(f"{each['of']} - {each['to']}, {each['how']}: {each['mean']:+.1%}{interval}", highlight=False)
    console.print(f"sampling error of one figure {found['sampling_error']:.1%}, {found['held_out']} held-out scenes")
