"""Two commits side by side: the same benchmark script, each commit's kernels in a process of its own, rounds in turn.

The base is checked out by ``git worktree`` into a temporary folder. Compiled extensions are not built there: ops that
need one raise, and say so.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import ROOT
from benchmarks.harness.measure import Samples, Timer, interleave
from benchmarks.harness.op import Op, fill_times
from benchmarks.harness.processes import Worker
from benchmarks.harness.run import Options


@contextmanager
def checkout(revision: str, root: Path) -> Iterator[Path]:
    """A temporary work tree of ``revision``. Raises ValueError for a revision that git does not know."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=root, capture_output=True, text=True
    )
    if found.returncode != 0:
        raise ValueError(f"--base: git knows no commit {revision!r} here")
    folder = Path(tempfile.mkdtemp(prefix="prism-base-"))
    tree = folder / "tree"
    try:
        command = ["git", "worktree", "add", "--detach", str(tree), found.stdout.strip()]
        subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


class _Clock(Timer):
    """A call's own answer, seconds: each side times itself."""

    def __init__(self) -> None:
        self.device, self.flush = torch.device("cpu"), None

    def once(self, call: Callable[[], float], repeats: int = 1) -> float:
        return call()

    def repeats(self, call: Callable[[], float]) -> int:
        return 1


class Comparison:
    """A benchmark (harness.run) with two rows a problem: this work tree ("ours") and the base ("peer").

    The tests that run first are this work tree's; the base is held to float64 alone, like every row.
    """

    def __init__(self, bench: Op, revision: str):
        self.op, self.module, self.revision = bench.op, bench.problems.__module__, revision

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        return {}

    def results(self, options: Options, keep: Callable[[dict], None]) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            tree = stack.enter_context(checkout(self.revision, ROOT))
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            roots = {"this work tree": ROOT, f"base {self.revision}": tree}
            sides = []
            for index, (name, root) in enumerate(roots.items()):
                sides.append(Worker(name, root / "kernels", logs / f"{index}.log"))
                stack.callback(sides[-1].close)
            for shape in options.shapes:
                about = {"module": self.module, "shape": shape, "device": options.device.type}
                names = [
                    side.ask(do="problems", kernels=str(root / "kernels"), **about)["names"]
                    for side, root in zip(sides, roots.values())
                ]
                for name in names[0]:
                    if not options.only or name in options.only:
                        yield compare({**about, "problem": name}, sides, options, keep)


def compare(
    about: dict[str, Any], sides: list[Worker], options: Options, keep: Callable[[dict], None] = lambda result: None
) -> dict[str, Any]:
    found = [side.ask(do="prepare", **about) for side in sides]
    rows = [
        {**answer["row"], "name": side.name, "role": role} for side, role, answer in zip(sides, ("ours", "peer"), found)
    ]
    result = {**found[0]["problem"], "limit": None, "rows": rows}
    calls = {side.name: lambda side=side: side.ask(do="time", **about)["seconds"] for side in sides}
    if all(row["status"] == "ok" for row in rows):

        def tell(samples: Samples, failed: dict[str, str]) -> None:
            fill_times(result, {} if failed else samples, failed)
            if not failed:
                keep(result)

        tell(*interleave(calls, _Clock(), options.seconds, options.rounds, warmups=0, keep=tell))
    bad = "; ".join(f"{row['name']}: {row['reason']}" for row in rows if row["status"] != "ok")
    return {**result, "status": "refused", "reason": bad} if bad else result
