"""Two commits side by side: the same benchmark script, each commit's kernels in a process of its own, rounds in turn.

The base is checked out by ``git worktree`` into a temporary folder. Compiled extensions are not built there: ops that
need one raise, and say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from benchmarks.harness import Options


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


class Worker:
    """One commit's process: it answers each line of JSON with one line of JSON."""

    def __init__(self, name: str, root: Path, log: Path):
        self.name = name
        paths = [str(root), str(root / "kernels")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "compare.py"), str(root)], env=environment, cwd=root, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        tail = self.log.read_text().strip().splitlines()[-3:]
        raise RuntimeError(f"the process of {self.name} ended: {' '.join(tail)}")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def compare(op: str, revision: str, options: Options) -> dict[str, Any]:
    """The document of harness.run with two rows a problem: this work tree ("ours") and the base ("peer").

    The tests are this work tree's; the base is held to float64 alone, like every row.
    """
    from benchmarks import harness, machine

    document = {
        "schema": harness.SCHEMA,
        "op": op,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "base": revision,
        "environment": machine.environment(options.device),
        "tests": harness.run_tests(importlib.import_module(f"benchmarks.bench_{op}").TESTS)
        if options.run_tests
        else None,
        "limits": {},
        "problems": [],
    }
    if harness.exit_status(document):
        harness.save(document, options.json_path)
        return document
    with checkout(revision, machine.ROOT) as tree, tempfile.TemporaryDirectory() as logs:
        workers = [
            Worker(name, root, Path(logs) / f"{index}.log")
            for index, (name, root) in enumerate((("this work tree", machine.ROOT), (f"base {revision}", tree)))
        ]
        try:
            for shape in options.shapes:
                names = workers[0].ask(do="problems", op=op, shape=shape, device=options.device.type)["names"]
                for name in names:
                    if not options.only or name in options.only:
                        document["problems"].append(_problem(workers, op, name, shape, options))
                        harness.print_problem(document["problems"][-1], None)
                        harness.save(document, options.json_path)
        finally:
            for worker in workers:
                worker.close()
    return document


def _problem(workers: list[Worker], op: str, name: str, shape: dict, options: Options) -> dict[str, Any]:
    from benchmarks.measure import Summary

    about = [w.ask(do="prepare", op=op, problem=name, shape=shape, device=options.device.type) for w in workers]
    rows = [
        {
            "name": worker.name,
            "role": role,
            "status": found["status"],
            "errors": found["errors"],
            **({"reason": found["reason"]} if found["reason"] else {}),
        }
        for worker, role, found in zip(workers, ("ours", "peer"), about)
    ]
    result = {**about[0]["problem"], "status": "ok", "limit": None, "rows": rows}
    bad = next((row for row in rows if row["status"] != "ok"), None)
    if bad is not None:
        return {**result, "status": "refused", "reason": f"{bad['name']}: {bad['reason']}"}
    estimate = sum(worker.ask(do="time")["seconds"] for worker in workers)
    count = options.rounds or max(5, min(100, int(options.seconds / max(estimate, 1e-9))))
    samples: list[list[float]] = [[], []]
    for index in range(count):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            samples[side].append(workers[side].ask(do="time")["seconds"])
    for row, values in zip(rows, samples):
        summary = Summary.of(values)
        row.update(median_s=summary.median, low_s=summary.low, high_s=summary.high, samples=summary.samples)
        row["tflops"], row["gbps"] = result["flops"] / summary.median / 1e12, result["bytes"] / summary.median / 1e9
    ratio = Summary.of([theirs / ours for ours, theirs in zip(*samples)])
    rows[1].update(times_ours=ratio.median, times_ours_low=ratio.low, times_ours_high=ratio.high)
    return result


def _alias() -> None:
    """``benchmarks`` means the folder of this file, whatever the work tree before it on the path holds."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


def _serve(root: Path) -> None:
    """The worker: prepares what it is asked for with the kernels of ``root``, then times one call a request."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    _alias()
    import torch

    import prism_kernels

    loaded = Path(prism_kernels.__file__).resolve()
    if root.resolve() not in loaded.parents:
        raise RuntimeError(
            f"prism_kernels came from {loaded}, expected {root}: is an installed copy first on the path?"
        )
    from benchmarks import harness, measure

    timer = call = repeats = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            answer: dict[str, Any] = {"seconds": timer.once(call, repeats)}
        else:
            device = torch.device(request["device"])
            module = importlib.import_module(f"benchmarks.bench_{request['op']}")
            problems = {problem.name: problem for problem in module.problems(request["shape"], device)}
            if request["do"] == "problems":
                answer = {"names": list(problems)}
            else:
                problem = problems[request["problem"]]
                ready = harness.check_ours(problem)
                row, call = ready.row, ready.call
                if call is not None:
                    timer = timer or measure.Timer(device)
                    timer.once(call)
                    repeats = timer.repeats(call)
                keys = ("name", "title", "shape", "flops", "bytes")
                answer = {
                    "status": row["status"],
                    "reason": row.get("reason", ""),
                    "errors": row.get("errors", {}),
                    "problem": {key: getattr(problem, key) for key in keys},
                }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
