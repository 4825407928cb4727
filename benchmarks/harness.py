"""What a benchmark is, and how it runs: check against float64, then time all contenders side by side, then report.

A bench_<op>.py module defines ``problems(shape, device) -> list[Problem]``, the op's tests and its shapes. A contender
whose result is wrong shows its error and no speed; where one of ours is wrong, no speed of the problem is shown at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.measure import Call, Summary, Timer, Unavailable

SCHEMA = 1
ROLES = ("ours", "limit", "peer")
TESTS_CACHE = machine.ROOT / ".pytest_cache" / "benchmarks.json"


@dataclass(frozen=True)
class Tolerance:
    """How an output is compared with truth, and from which error on a contender counts as wrong.

    ``metric``: "relative" = norm of the difference over the norm of truth, "max" = largest absolute difference. The
    bounds of peers are loose: what they lose by rounding is shown as an error, not as a failure.
    """

    metric: str
    ours: float
    peer: float

    def error(self, actual: Tensor, truth: Tensor) -> float:
        if actual.shape != truth.shape:
            raise ValueError(f"output: expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
        difference = actual.detach().to(torch.float64) - truth
        if self.metric == "max":
            return float(difference.abs().max()) if difference.numel() else 0.0
        return float(difference.norm() / truth.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Contender:
    """One row. ``prepare()`` -> the call to time; it returns {output: tensor}, compared with truth where truth has it.

    Raises Unavailable with the reason where it cannot run. ``extra()``: further figures of its own. ``compiles``: the
    first call at a shape compiles, which no measurement should see.
    """

    name: str
    prepare: Callable[[], Callable[[], dict[str, Tensor]]]
    role: str = "peer"
    extra: Callable[[], dict[str, float]] | None = None
    compiles: bool = False


@dataclass
class Problem:
    """One workload at one shape.

    ``flops``, ``bytes``: what must be computed, and the fewest bytes that must move. ``limit``: (contender, multiple):
    "% of limit" is multiple * its median over ours.
    """

    name: str
    title: str
    shape: dict[str, Any]
    flops: float
    bytes: float
    contenders: Sequence[Contender]
    truth: Callable[[], dict[str, Tensor]]
    tolerances: dict[str, Tolerance]
    limit: tuple[str, float] | None = None


@dataclass(frozen=True)
class Options:
    device: torch.device
    shapes: Sequence[dict[str, Any]] = ()
    only: Sequence[str] = ()  # problems by name; empty: all
    peers: Sequence[str] | None = None  # parts of peers' names; None: all, empty: none
    seconds: float = 10.0  # timing of one problem
    rounds: int | None = None
    memory: bool = True
    run_tests: bool = False
    json_path: Path | None = None
    small: bool = False  # toy limits, for a dry run


@dataclass
class _Ready:
    contender: Contender
    row: dict[str, Any]
    call: Callable[[], dict[str, Tensor]] | None = None
    errors: dict[str, float] = field(default_factory=dict)


def run(op: str, module: ModuleType, options: Options) -> dict[str, Any]:
    """All problems of an op: the document that is printed and written. Refused ones carry no times."""
    document = {
        "schema": SCHEMA,
        "op": op,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "environment": machine.environment(options.device),
        "tests": run_tests(module.TESTS) if options.run_tests else None,
        "limits": {},
        "problems": [],
    }
    if exit_status(document):
        save(document, options.json_path)
        return document
    timer = Timer(options.device)
    dtypes = sorted({str(shape.get("dtype", "fp32")) for shape in options.shapes})
    for name in dtypes:
        document["limits"][name] = measure.limits(options.device, DTYPES[name], timer, small=options.small)
    for shape in options.shapes:
        for problem in module.problems(shape, options.device):
            if options.only and problem.name not in options.only:
                continue
            document["problems"].append(run_problem(op, problem, options, timer))
            save(document, options.json_path)  # as it comes: a later crash loses nothing
            print_problem(document["problems"][-1], document["limits"].get(str(shape.get("dtype", "fp32"))))
            del problem  # its tensors go before the next ones come
            measure.free(options.device)
    save(document, options.json_path)
    return document


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def run_problem(op: str, problem: Problem, options: Options, timer: Timer) -> dict[str, Any]:
    result = {
        "name": problem.name,
        "title": problem.title,
        "shape": problem.shape,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "limit": list(problem.limit) if problem.limit else None,
        "status": "ok",
    }
    chosen = [c for c in problem.contenders if _wanted(c, options.peers)]
    measure.say(f"{problem.name}: {len(chosen)} rows, each against float64 first")
    rows = [_prepare(c) for c in sorted(chosen, key=lambda c: ROLES.index(c.role))]
    _check(problem, rows)
    result["rows"] = [ready.row for ready in rows]
    wrong = [r for r in rows if r.contender.role == "ours" and r.row["status"] in ("wrong", "failed")]
    if wrong:
        result["status"] = "refused"
        result["reason"] = "; ".join(f"{r.contender.name}: {r.row['reason']}" for r in wrong)
        return result
    if not any(r.contender.role == "ours" and r.call for r in rows):
        result["status"], result["reason"] = "skipped", "; ".join(r.row.get("reason", "") for r in rows[:1])
        return result
    able = {ready.contender.name: ready for ready in rows if ready.call is not None}
    calls = {name: ready.call for name, ready in able.items()}
    samples, failed = measure.interleave(calls, timer, options.seconds, options.rounds)
    for name, reason in failed.items():
        able[name].row.update(status="failed", reason=reason)
    _add_times(problem, able, samples)
    for name, ready in able.items():
        if options.memory and name in samples and ready.contender.role != "limit":
            _add_memory(op, problem, ready, options)
        if name in samples and ready.contender.extra is not None:
            _add_extra(ready)
    return result


def _add_extra(ready: _Ready) -> None:
    """A figure that cannot be had costs neither the times nor the other rows."""
    try:
        ready.row["extra"] = ready.contender.extra()
    except Exception as error:  # noqa: BLE001 - a profiler, or a peer out of memory; the row says what
        ready.row["extra_reason"] = measure.short(error)


def check_ours(problem: Problem) -> _Ready:
    """The first of ours, prepared and checked; its ``call`` is None where it cannot run or is wrong."""
    ready = _prepare(next(c for c in problem.contenders if c.role == "ours"))
    _check(problem, [ready])
    return ready


def _wanted(contender: Contender, peers: Sequence[str] | None) -> bool:
    if contender.role != "peer" or peers is None:
        return True
    return any(part.lower() in contender.name.lower() for part in peers)


def _prepare(contender: Contender) -> _Ready:
    row: dict[str, Any] = {"name": contender.name, "role": contender.role, "status": "ok"}
    try:
        return _Ready(contender, row, contender.prepare())
    except Unavailable as error:
        row.update(status="unavailable", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a peer may raise anything; its row says what, the others go on
        row.update(status="failed", reason=measure.short(error))
    return _Ready(contender, row)


def _check(problem: Problem, rows: list[_Ready]) -> None:
    """Every contender once, against float64. A wrong one loses its call, and so its speed."""
    truth = problem.truth()
    measure.free(truth[next(iter(truth))].device)  # what float64 took besides
    for ready in rows:
        if ready.call is None or ready.contender.role == "limit":
            continue
        try:
            outputs = ready.call()
            compared = [name for name in problem.tolerances if name in truth and name in outputs]
            errors = {name: problem.tolerances[name].error(outputs[name], truth[name]) for name in compared}
        except Exception as error:  # noqa: BLE001 - as above
            ready.row.update(status="failed", reason=measure.short(error))
            ready.call = None
        if ready.call is None:  # not inside except, which keeps what the contender had allocated
            device = next(iter(truth.values())).device
            measure.free(device)
            measure.require_alive(device, ready.contender.name)
            continue
        ready.row["errors"] = {
            name: {"metric": problem.tolerances[name].metric, "value": error if math.isfinite(error) else None}
            for name, error in errors.items()
        }
        bound = {name: getattr(problem.tolerances[name], _bound(ready.contender)) for name in errors}
        bad = [name for name, e in errors.items() if not e <= bound[name]]  # NaN is bad
        if bad or not errors:
            shown = ", ".join(f"{name} {errors[name]:.2e} > {bound[name]:.0e}" for name in bad)
            ready.row.update(status="wrong", reason=f"differs from float64: {shown or 'no output to compare'}")
            ready.call = None


def _bound(contender: Contender) -> str:
    return "ours" if contender.role == "ours" else "peer"


def _add_times(problem: Problem, able: dict[str, _Ready], samples: dict[str, list[float]]) -> None:
    first = next((n for n, ready in able.items() if ready.contender.role == "ours" and n in samples), None)
    for name, values in samples.items():
        row, summary = able[name].row, Summary.of(values)
        row.update(median_s=summary.median, low_s=summary.low, high_s=summary.high, samples=summary.samples)
        if row["role"] != "limit":
            row["tflops"], row["gbps"] = (
                count / summary.median for count in (problem.flops / 1e12, problem.bytes / 1e9)
            )
        if first is not None and name != first:
            # Round by round, then the median: what slows a whole round down cancels.
            ratios = Summary.of([theirs / ours for theirs, ours in zip(values, samples[first])])
            row["times_ours"], row["times_ours_low"], row["times_ours_high"] = ratios.median, ratios.low, ratios.high
    if problem.limit and problem.limit[0] in samples:
        limit = problem.limit[1] * Summary.of(samples[problem.limit[0]]).median
        for name in samples:
            if able[name].contender.role != "limit":
                able[name].row["times_limit"] = able[name].row["median_s"] / limit


def _add_memory(op: str, problem: Problem, ready: _Ready, options: Options) -> None:
    try:
        if options.device.type == "cuda":
            peak, outputs = measure.cuda_peak_bytes(ready.call)
        else:
            request = {"op": op, "problem": problem.name, "shape": problem.shape, "contender": ready.contender.name}
            peak, outputs = child_memory(request)
    except (Unavailable, RuntimeError) as error:
        ready.row["memory_reason"] = str(error) if isinstance(error, Unavailable) else measure.short(error)
        return
    ready.row.update(peak_bytes=peak, output_bytes=outputs)


def child_memory(request: dict[str, Any]) -> tuple[int, int]:
    """In a process of its own (memory_child): resident memory that others freed would hide what this one takes.

    Raises Unavailable where that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory_child", json.dumps(request)]
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    child_environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment, timeout=600)
    except subprocess.TimeoutExpired:
        raise Unavailable("the measuring process took over 600 s") from None
    if done.returncode != 0:
        raise Unavailable(f"the measuring process failed: {done.stderr.strip().splitlines()[-1:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak_bytes"], answer["output_bytes"]


def run_tests(paths: Sequence[str], cache: Path = TESTS_CACHE) -> dict[str, Any]:
    """The op's own test files, by pytest: {"status": "passed" | "failed" | "not run", "summary"}.

    What has passed is remembered in ``cache`` and not run again until a kernel, a test or torch changes.
    """
    present = [path for path in paths if (machine.ROOT / path).exists()]
    if not present:
        return {"status": "not run", "summary": f"none of {', '.join(paths)} exists"}
    key, passed = _tests_key(present), {}
    if cache.exists():
        passed = json.loads(cache.read_text())
    if key in passed:
        return {"status": "passed", "summary": f"{passed[key]} (as before: nothing changed)"}
    measure.say(f"tests first: {' '.join(present)}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *present]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, env=environment)
    printed = (done.stdout + done.stderr).strip().splitlines()
    summary = printed[-1] if printed else "no output"
    if done.returncode == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({**passed, key: summary}))
    return {"status": "passed" if done.returncode == 0 else "failed", "summary": summary}


def _tests_key(paths: Sequence[str]) -> str:
    """What their outcome depends on: sources, these tests and what they share, versions, devices, switches."""
    chosen = sorted((name, value) for name, value in os.environ.items() if name.startswith(("PRISM_", "TRITON_")))
    packages = [machine.version(name) for name in ("torch", "triton", "numpy", "transformers")]
    digest = hashlib.sha256(f"{sys.version} {packages} {torch.cuda.is_available()} {chosen} {paths}".encode())
    shared = [path for path in (machine.ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    sources = [path for path in (machine.ROOT / "kernels").rglob("*") if path.suffix in (".py", ".so")]
    sources += [*(machine.ROOT / "prism_fast").rglob("*.py"), *shared]
    for path in sorted([*sources, *(machine.ROOT / path for path in paths)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def save(document: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def exit_status(document: dict[str, Any]) -> int:
    tests = document["tests"]
    refused = any(problem["status"] == "refused" for problem in document["problems"])
    return 1 if refused or (tests is not None and tests["status"] != "passed") else 0


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError where a document is not one of this schema: what RESULTS.md is made from."""
    missing = {"schema", "op", "date", "commit", "environment", "limits", "problems"} - set(document)
    if missing:
        raise ValueError(f"result: keys missing: {sorted(missing)}")
    if document["schema"] != SCHEMA:
        raise ValueError(f"result: schema {document['schema']}, expected {SCHEMA}")
    for problem in document["problems"]:
        missing = {"name", "title", "shape", "flops", "bytes", "status", "rows"} - set(problem)
        if missing:
            raise ValueError(f"result: problem {problem.get('name')}: keys missing: {sorted(missing)}")
        for row in problem["rows"]:
            timed = "median_s" in row
            if not {"name", "role", "status"} <= set(row) or (timed and row["status"] != "ok"):
                raise ValueError(f"result: problem {problem['name']}: bad row {row}")
            if timed and problem["status"] != "ok":
                raise ValueError(f"result: problem {problem['name']} is {problem['status']} but shows a speed")


def print_problem(result: dict[str, Any], limits: dict[str, float] | None) -> None:
    from benchmarks.table import problem_lines

    print("\n".join(problem_lines(result, limits)), flush=True)


def print_json(document: dict[str, Any]) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps(document, separators=(",", ":")), flush=True)


def replace(options: Options, **changes: Any) -> Options:
    return dataclasses.replace(options, **changes)


__all__ = ["Call", "Contender", "Options", "Problem", "Tolerance", "Unavailable", "run", "run_problem", "validate"]
