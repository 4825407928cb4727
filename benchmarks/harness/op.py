"""What an op's benchmark is, and how it runs: check against float64, then time all contenders side by side.

A contender whose result is wrong shows its error and no speed; where one of ours is wrong, no speed of the problem is
shown at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure, processes
from benchmarks.harness.document import add_errors, add_times, clear_times
from benchmarks.harness.measure import DTYPES, Timer, Unavailable
from benchmarks.harness.run import Options

ROLES = ("ours", "limit", "peer")
Shape = dict[str, Any]
Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]


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
    first call at a shape compiles, which no measurement should see. ``compared(outputs)``: what truth is compared with,
    where a contender's form is another; it is not timed.
    """

    name: str
    prepare: Callable[[], Call]
    role: str = "peer"
    extra: Callable[[], dict[str, float]] | None = None
    compiles: bool = False
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs


@dataclass
class Problem:
    """One workload at one shape.

    ``flops``, ``bytes``: what must be computed, and the fewest bytes that must move. ``limit``: (contender, multiple):
    "over limit" is our median over multiple times its median. ``figures``: of work on the host, those of
    ``Contender.extra`` that its table shows; operations and bytes are then not counted, nor is memory measured.
    ``sizes``: those of the shape that its heading names (all).
    """

    name: str
    title: str
    shape: Shape
    flops: float
    bytes: float
    contenders: Sequence[Contender]
    truth: Callable[[], Outputs]
    tolerances: dict[str, Tolerance]
    limit: tuple[str, float] | None = None
    figures: tuple[str, ...] | None = None
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """A benchmark made of problems. ``shapes``: "published", "cpu" and "tiny" at least; ``tiny``: what makes any shape
    a small one; ``sweep(shape)``: the shapes of a plot."""

    op: str
    description: str
    problems: Callable[[Shape, torch.device], list[Problem]]
    names: tuple[str, ...]  # of the problems
    shapes: dict[str, list[Shape]]
    tiny: Shape
    sweep: Callable[[Shape], list[Shape]]

    seconds = 10.0  # timing of one problem

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        sizes = ",".join(f"{key}={value}" for key, value in self.shapes["published"][0].items())
        names = f"{', '.join(self.shapes)}, or some of {sizes}; repeatable (default: published on a GPU, else cpu)"
        parser.add_argument("--shape", action="append", default=[], help=names)
        parser.add_argument("--problem", action="append", default=[], choices=self.names, help="only this; repeatable")
        parser.add_argument("--peers", help="parts of names, comma-separated; '' for none (default: all)")
        parser.add_argument("--no-tests", action="store_true", help="do not run the op's tests first")
        parser.add_argument("--base", metavar="REV", help="compare with this commit, side by side")

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        """What these options mean. Raises ValueError for a shape that is none."""
        default = self.shapes["tiny" if given.dry_run else "published" if given.device == "cuda" else "cpu"]
        chosen = [shape for text in given.shape for shape in self._shapes(text, default[0])] or list(default)
        if given.plot is not None and not given.shape:
            chosen = self.sweep(chosen[0])
        peers = None if given.peers is None else [part for part in given.peers.split(",") if part]
        return {"shapes": chosen, "only": given.problem, "peers": peers}

    def _shapes(self, text: str, default: Shape) -> list[Shape]:
        """Of a name, or of key=value,... over ``default``."""
        if text in self.shapes:
            return self.shapes[text]
        values = dict(default)
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or key not in values:
                names = ", ".join(self.shapes)
                raise ValueError(f"--shape: got {part!r}, expected one of {names}, or key=value of {', '.join(values)}")
            try:
                values[key] = type(values[key])(value)
            except ValueError:
                raise ValueError(f"--shape: {key}: got {value!r}, expected {type(values[key]).__name__}") from None
        return [values]

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        """Those whose limits are measured."""
        return {name: DTYPES[name] for name in sorted({str(s.get("dtype", "fp32")) for s in options.shapes})}

    def results(self, options: Options, keep: Callable[[dict], None]) -> Iterator[dict[str, Any]]:
        timer = Timer(options.device, options.busy)
        for shape in options.shapes:
            for problem in self.problems(shape, options.device):
                if not options.only or problem.name in options.only:
                    yield run_problem(self.problems.__module__, problem, options, timer, keep)
                    del problem  # its tensors go before the next ones come
                    measure.free(options.device)

    def problem(self, request: dict[str, Any], device: torch.device) -> Problem:
        return next(p for p in self.problems(request["shape"], device) if p.name == request["problem"])

    def contender(self, request: dict[str, Any], device: torch.device) -> Contender:
        return next(c for c in self.problem(request, device).contenders if c.name == request["contender"])

    def memory_call(self, request: dict[str, Any]) -> Call:
        """The call whose memory is measured. Libraries load, threads start and caches fill at a toy size before, so
        that only the problem's own memory is seen."""
        small = {**request, "shape": {**request["shape"], **self.tiny}}
        self.contender(small, torch.device("cpu")).prepare()()
        contender = self.contender(request, torch.device("cpu"))
        call = contender.prepare()
        if contender.compiles:
            call()
        return call


@dataclass
class Ready:
    """A contender with its row, and its call where it can run and is right."""

    contender: Contender
    row: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None


def about(problem: Problem) -> dict[str, Any]:
    """The head of a problem's result."""
    head = {key: getattr(problem, key) for key in ("name", "title", "shape", "flops", "bytes")}
    head |= {} if problem.figures is None else {"figures": list(problem.figures)}
    head |= {"sizes": list(problem.sizes)} if problem.sizes else {}
    return {**head, "limit": list(problem.limit) if problem.limit else None, "status": "ok"}


def run_problem(
    module: str, problem: Problem, options: Options, timer: Timer, keep: Callable[[dict], None] = lambda result: None
) -> dict[str, Any]:
    """``keep`` has the result after every round."""
    result = about(problem)
    chosen = [c for c in problem.contenders if _wanted(c, options.peers)]
    measure.say(f"{problem.name}: {len(chosen)} rows, each against float64 first")
    rows = [_prepare(c) for c in sorted(chosen, key=lambda c: ROLES.index(c.role))]
    _check(problem, rows)
    result["rows"] = [ready.row for ready in rows]
    ours = [ready for ready in rows if ready.contender.role == "ours"]
    wrong = [ready.row for ready in ours if ready.row["status"] in ("wrong", "failed")]
    if wrong:
        return {**result, "status": "refused", "reason": "; ".join(f"{r['name']}: {r['reason']}" for r in wrong)}
    if not any(ready.call for ready in ours):
        return {**result, "status": "skipped", "reason": "; ".join(r.row.get("reason", "") for r in rows[:1])}
    able = {ready.contender.name: ready for ready in rows if ready.call is not None}
    calls = {name: ready.call for name, ready in able.items()}

    def tell(samples: measure.Samples, failed: dict[str, str]) -> None:
        fill_times(result, samples, failed)
        keep(result)

    samples, failed = measure.interleave(calls, timer, options.seconds, options.rounds, keep=tell)
    fill_times(result, samples, failed)
    for name in samples:
        if options.memory and able[name].contender.role != "limit" and problem.figures is None:
            _add_memory(module, problem, able[name], options.device)
        if able[name].contender.extra is not None:
            _add_extra(able[name])
    return result


def fill_times(result: dict[str, Any], samples: measure.Samples, failed: dict[str, str]) -> None:
    """Every timed row of a result: its time, what that is in operations and bytes, over ours and over the limit."""
    clear_times(result["rows"], failed)
    rows = {row["name"]: row for row in result["rows"] if row["name"] in samples}
    first = next((name for name, row in rows.items() if row["role"] == "ours"), None)
    for name, row in rows.items():
        told = row["role"] == "limit" or "figures" in result
        work = {} if told else {"flops": result["flops"], "bytes": result["bytes"]}
        add_times(row, samples[name], ours=samples[first] if first not in (None, name) else None, **work)
    limit, multiple = result["limit"] or (None, 1)
    if limit in rows:
        for row in rows.values():
            if row["role"] != "limit":
                row["times_limit"] = row["median_s"] / (multiple * rows[limit]["median_s"])


def check_ours(problem: Problem) -> Ready:
    """The first of ours, prepared and checked; its ``call`` is None where it cannot run or is wrong."""
    ready = _prepare(next(c for c in problem.contenders if c.role == "ours"))
    _check(problem, [ready])
    return ready


def _wanted(contender: Contender, peers: Sequence[str] | None) -> bool:
    if contender.role != "peer" or peers is None:
        return True
    return any(part.lower() in contender.name.lower() for part in peers)


def _prepare(contender: Contender) -> Ready:
    row: dict[str, Any] = {"name": contender.name, "role": contender.role, "status": "ok"}
    try:
        return Ready(contender, row, contender.prepare())
    except Unavailable as error:
        row.update(status="unavailable", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a peer may raise anything; its row says what, the others go on
        row.update(status="failed", reason=measure.short(error))
    return Ready(contender, row)


def _check(problem: Problem, rows: list[Ready]) -> None:
    """Every contender once, against float64. A wrong one loses its call, and so its speed."""
    truth = problem.truth()
    device = next(iter(truth.values())).device
    measure.free(device)  # what float64 took besides
    for ready in rows:
        if ready.call is None or ready.contender.role == "limit":
            continue
        try:
            outputs = ready.contender.compared(ready.call())
            compared = [name for name in problem.tolerances if name in truth and name in outputs]
            errors = {name: problem.tolerances[name].error(outputs[name], truth[name]) for name in compared}
        except Exception as error:  # noqa: BLE001 - as above
            ready.row.update(status="failed", reason=measure.short(error))
            ready.call = None
        if ready.call is None:  # not inside except, which keeps what the contender had allocated
            measure.free(device)
            measure.require_alive(device, ready.contender.name)
            continue
        metrics = {name: problem.tolerances[name].metric for name in errors}
        bounds = {name: getattr(problem.tolerances[name], ready.contender.role) for name in errors}
        bad = add_errors(ready.row, errors, metrics, bounds)
        if bad or not errors:
            ready.row.update(status="wrong", reason=f"differs from float64: {bad or 'no output to compare'}")
            ready.call = None


def _add_memory(module: str, problem: Problem, ready: Ready, device: torch.device) -> None:
    request = {"module": module, "problem": problem.name, "shape": problem.shape, "contender": ready.contender.name}
    try:
        on_gpu = device.type == "cuda"
        peak, outputs = measure.cuda_peak_bytes(ready.call) if on_gpu else processes.peak_memory(request)
    except (Unavailable, RuntimeError) as error:
        ready.row["memory_reason"] = str(error) if isinstance(error, Unavailable) else measure.short(error)
        return
    ready.row.update(peak_bytes=peak, output_bytes=outputs)


def _add_extra(ready: Ready) -> None:
    """A figure that cannot be had costs neither the times nor the other rows."""
    try:
        ready.row["extra"] = ready.contender.extra()
    except Exception as error:  # noqa: BLE001 - a profiler, or a peer out of memory; the row says what
        ready.row["extra_reason"] = measure.short(error)
