"""A whole training step, written in several ways on the same weights and data: each saves one thing more.

The first way is the reference's, the last ones are ours. All ways first run in fp32: where outputs or gradients differ
from the first's, no time is shown. Then all run in turn, round by round. bench_<step>.py describes a step; the result
is a document of harness.py's schema whose one problem per shape is named "step".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, machine, measure, table
from benchmarks.arguments import Parser, result_path
from benchmarks.harness import DTYPES, Tolerance
from benchmarks.step_case import Shape

Outcome = dict[str, Tensor]

EXPERTS = ("eager", "grouped_mm")  # transformers' own implementations
TOLERANCE = Tolerance("relative", ours=1e-5, peer=1e-5)  # of outputs, loss, all gradients and each parameter's
# A GPU's ways differ in kernels, whose fp32 sums run in other orders and whose exponentials are good to 2^-22; a
# router's gradient, a small difference of large terms, shows some ten times that. What is wrong is off by percents.
GPU_BOUND = 1e-4
GPU_WORST = 5  # times that for a single parameter
# Two router probabilities this close may change places by rounding: some ten times that of fp32. A CPU's bound is
# tighter and its model small, so that it can also keep away from what is nearly one (dev/LOG.md).
NEAR_TIE = {"cuda": 3e-6, "cpu": 2e-5}
SEEDS = 16
# What the agreement of a large model is checked on: every part of it, few of its layers and responses.
CHECKED_LAYERS, CHECKED_RESPONSES = 4, 3
# What a heading tells of a shape.
SIZES = ("dtype", "layers", "hidden", "experts", "inner", "vocab", "responses", "prompt", "caption", "reasoning")


@dataclass(frozen=True)
class Way:
    """``run(case)`` returns {output: tensor} and leaves gradients in the parameters."""

    name: str
    saves: str  # what it no longer computes, one line
    run: Callable[[Any], Outcome]


@dataclass(frozen=True)
class Step:
    """``build(shape, dtype=, device=, checkpointing=, seed=)`` -> a case with ``shape``, ``module``, ``rollout``; with
    experts also ``few(count)``.

    ``ways(checkpointing)`` and ``flops(case, checkpointing=)`` list the ways and their operations in the same order.
    ``margin(case)``: how near to a tie a router comes, for models that have one: near ties fall either way, and then
    two right ways differ.
    """

    op: str
    title: str
    shapes: dict[str, Shape]
    default: dict[str, tuple[str, ...]]  # by device
    build: Callable[..., Any]
    ways: Callable[[bool], tuple[Way, ...]]
    flops: Callable[..., list[float]]
    margin: Callable[[Any], float] | None = None


def run(case: Any, way: Way) -> Outcome:
    """The step, its gradients new."""
    for parameter in case.module.parameters():
        parameter.grad = None
    return way.run(case)


def gradients(case: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in case.module.named_parameters() if p.grad is not None}


def main(step: Step, arguments: Sequence[str] | None = None) -> int:
    top = parser(step)
    given = top.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: there is no CUDA device; use --device cpu")
    names = ("mini",) if given.dry_run else given.shape or step.default[device.type]
    dtype = DTYPES[given.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    given.rounds = 1 if given.dry_run else given.rounds
    given.memory = not (given.no_memory or given.dry_run)
    path = given.json or (result_path(step.op, device) if given.save else None)
    document = {
        "schema": harness.SCHEMA,
        "op": step.op,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "environment": machine.environment(device),
        "tests": None,
        "limits": {},
        "problems": [],
    }
    if not given.dry_run:
        limits = measure.limits(device, dtype, measure.Timer(device))
        document["limits"][str(dtype).removeprefix("torch.")] = limits
        measure.free(device)
    for name in names:
        for result in problem(step, name, dtype, device, given):  # as it comes: a later crash loses nothing
            document["problems"] = [*document["problems"][: names.index(name)], result]
            harness.save(document, path)
        print("\n".join(lines(result, document["limits"])), flush=True)
    status = harness.exit_status(document)
    if status:
        print("refused: ways that disagree, or ours not timed", file=sys.stderr)
    harness.print_json(document)
    if given.plot is not None and not status:
        from benchmarks.plots import waterfall

        waterfall(document, given.plot)
    return status


def parser(step: Step) -> Parser:
    top = Parser(prog=f"python -m benchmarks {step.op}", description=__doc__.split("\n")[0])
    names = sorted(step.shapes)
    shown = ", ".join(f"{'+'.join(found)} on {device}" for device, found in step.default.items())
    top.add_argument("--shape", action="append", choices=names, help=f"repeatable; default: {shown}")
    top.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--dtype", choices=("fp32", "bf16"), help="of the timed steps; default: bf16 on a GPU, else fp32")
    top.add_argument("--experts", choices=("fastest", *EXPERTS), default="fastest", help="of the stock modules")
    top.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="default: for --shape gpu")
    top.add_argument("--rounds", type=int, help="instead of --seconds")
    top.add_argument("--seconds", type=float, default=300.0, help="timing of all ways of a shape; at least 5 rounds")
    top.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    top.add_argument("--json", type=Path, help="also write the result here, shape by shape")
    top.add_argument("--save", action="store_true", help="write the result where RESULTS.md is made from")
    top.add_argument("--plot", type=Path, help="PNG: the waterfall")
    top.add_argument("--dry-run", action="store_true", help="one round at a toy size")
    return top


def problem(
    step: Step, name: str, dtype: torch.dtype, device: torch.device, given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Agreement in fp32, then times in ``dtype``, then memory: the result so far after each. A refused one carries no
    times."""
    shape = step.shapes[name]
    recompute = name == "gpu" if given.recompute is None else given.recompute
    checked = shape
    if shape.layers > CHECKED_LAYERS:
        checked = replace(shape, layers=CHECKED_LAYERS, responses=min(shape.responses, CHECKED_RESPONSES))
    case = without_near_ties(step, checked, device, recompute)
    ways = step.ways(recompute)
    rows = [{"name": way.name, "role": role(way), "status": "ok", "saves": way.saves} for way in ways]
    wrong = check(case, ways, rows)
    result = {
        "name": "step",
        "title": step.title,
        "shape": {"dtype": str(dtype).removeprefix("torch."), "recompute": recompute, **asdict(shape)},
        "sizes": [size for size in SIZES if size != "experts" or shape.experts],
        "checked": {"dtype": "float32", "layers": checked.layers, "responses": checked.responses},
        "status": "refused" if wrong else "ok",
        "flops": 0.0,
        "bytes": 0.0,
        "rows": rows,
    }
    if wrong:
        yield {**result, "reason": wrong}
        return
    yield result
    if checked is not shape or dtype != torch.float32:
        del case
        measure.free(device)
        case = step.build(shape, dtype=dtype, device=device, checkpointing=recompute)
    flops = step.flops(case, checkpointing=recompute)
    weights = sum(p.numel() * p.element_size() for p in case.module.parameters())
    # Weights and their gradients once: a step's fewest bytes.
    ours = next(i for i, row in enumerate(rows) if row["role"] == "ours")
    result.update(flops=flops[ours], reference_flops=flops[0], bytes=2.0 * weights)
    if shape.experts:
        result["experts"] = fastest_experts(case, ways[1]) if given.experts == "fastest" else given.experts
        case.model.set_experts_implementation(result["experts"])
    add_times(case, ways, ours, rows, flops, given)
    tokens = shape.prompt + sum(len(ids) for ids in case.rollout.response_ids)
    for row in rows:
        if "median_s" in row:
            row["tokens_per_s"] = tokens / row["median_s"]
    if "median_s" not in rows[ours]:
        kept = ("name", "role", "status", "reason", "saves", "errors")
        rows = [{key: row[key] for key in kept if key in row} for row in rows]
        reason = f"{rows[ours]['name']}: {rows[ours]['reason']}"
        yield {**result, "status": "refused", "reason": reason, "rows": rows}
        return
    yield result
    for way, row in zip(ways, rows):
        if given.memory and device.type == "cpu" and "median_s" in row:
            add_memory(step, name, way, row, result)
            yield result


def role(way: Way) -> str:
    return "ours" if way.name.startswith("ours") else "peer"


def without_near_ties(step: Step, shape: Shape, device: torch.device, recompute: bool) -> Any:
    """Model and data in fp32 of the first seed without a near tie of the router.

    Raises RuntimeError where none of the seeds is without one.
    """
    margin = 0.0
    for seed in range(SEEDS):
        case = step.build(shape, dtype=torch.float32, device=device, checkpointing=recompute, seed=seed)
        if step.margin is None:
            return case
        case.model.set_experts_implementation(EXPERTS[0])
        margin = step.margin(case)
        if margin > NEAR_TIE[device.type]:
            return case
    raise RuntimeError(f"router: near ties with every one of {SEEDS} seeds, the last one's margin is {margin:.1e}")


@contextmanager
def full_fp32() -> Iterator[None]:
    """cudnn's convolutions of fp32 are TF32 by default, good to 1e-3; the vision tower's first layer is one."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check(case: Any, ways: Sequence[Way], rows: list[dict[str, Any]]) -> str:
    """Every way against the first: adds each row's errors, and returns what is wrong, or ""."""
    wrong = []
    truth: Outcome = {}
    true_gradients: dict[str, Tensor] = {}
    for i, (way, row) in enumerate(zip(ways, rows)):
        measure.say(f"agreement {i + 1}/{len(ways)}: {way.name}")
        with full_fp32():
            outcome = {name: value.detach().cpu() for name, value in run(case, way).items()}
        mine = {name: value.clone() for name, value in gradients(case).items()}
        if i == 0:
            truth, true_gradients = {name: value.double() for name, value in outcome.items()}, mine
        errors = {name: TOLERANCE.error(outcome[name], truth[name]) for name in truth}
        errors["gradient"], errors["worst parameter"] = gradient_errors(mine, true_gradients)
        row["errors"] = {name: {"metric": TOLERANCE.metric, "value": value} for name, value in errors.items()}
        bounds = dict.fromkeys(errors, TOLERANCE.ours)
        if next(case.module.parameters()).is_cuda:
            bounds = dict.fromkeys(errors, GPU_BOUND) | {"worst parameter": GPU_WORST * GPU_BOUND}
        bad = [name for name, value in errors.items() if not value <= bounds[name]]  # NaN is bad
        if bad:
            row["status"] = "wrong"
            row["reason"] = ", ".join(f"{name} {errors[name]:.1e} > {bounds[name]:.0e}" for name in bad)
            wrong.append(f"{way.name}: {row['reason']}")
    return "; ".join(wrong)


def gradient_errors(mine: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, float]:
    """(of all parameters together, of the worst one, where a small one counts as much as a large one), relative.

    A missing gradient is a wrong one.
    """
    if mine.keys() != truth.keys():
        return float("inf"), float("inf")
    difference = {name: float((mine[name].double() - truth[name].double()).norm()) for name in truth}
    size = {name: float(truth[name].double().norm()) for name in truth}
    return math.hypot(*difference.values()) / math.hypot(*size.values()), max(
        difference[name] / max(size[name], 1e-300) for name in truth
    )


def fastest_experts(case: Any, way: Way) -> str:
    """Of transformers' implementations, by ``way`` with one response; the second of two runs counts."""
    seconds, reasons = {}, []
    timer, sample = measure.Timer(next(case.module.parameters()).device), case.few(1)
    for name in EXPERTS:
        case.model.set_experts_implementation(name)
        try:
            run(sample, way)
        except (NotImplementedError, RuntimeError, ImportError) as error:
            reasons.append(f"{name}: {measure.short(error)}")
            measure.say(f"experts {reasons[-1]}")
            continue
        seconds[name] = timer.once(lambda: run(sample, way))
    if not seconds:
        raise RuntimeError(f"experts: none of transformers' implementations runs here ({'; '.join(reasons)})")
    return min(seconds, key=seconds.get)


def add_times(
    case: Any, ways: Sequence[Way], ours: int, rows: list[dict[str, Any]], flops: list[float], given: argparse.Namespace
) -> None:
    # On a GPU memory comes with the times, as a step more of every way is half a minute of them.
    step = with_peak if given.memory and next(case.module.parameters()).is_cuda else lambda case, way, _: run(case, way)
    calls = {way.name: lambda way=way, row=row: step(case, way, row) for way, row in zip(ways, rows)}
    measure.say(f"timing {len(ways)} ways in turn")
    timer = measure.Timer(next(case.module.parameters()).device)
    samples, failed = measure.interleave(calls, timer, given.seconds, given.rounds, warmups=1)
    mine = samples.get(ways[ours].name)
    for i, (way, row, work) in enumerate(zip(ways, rows, flops)):
        row["flops"] = work
        if way.name in failed:
            row.update(status="failed", reason=failed[way.name])
            continue
        summary = measure.Summary.of(samples[way.name])
        row.update(median_s=summary.median, low_s=summary.low, high_s=summary.high, samples=summary.samples)
        row["tflops"] = work / summary.median / 1e12
        for key, base in (("speedup", rows[0]["name"]), ("step", rows[i - 1]["name"] if i else "")):
            if base in samples and base != way.name:
                rounds = [before / now for before, now in zip(samples[base], samples[way.name])]
                row[key] = measure.Summary.of(rounds).median
        if mine is not None and i != ours:
            ratios = measure.Summary.of([theirs / our for theirs, our in zip(samples[way.name], mine)])
            row["times_ours"], row["times_ours_low"], row["times_ours_high"] = ratios.median, ratios.low, ratios.high


def with_peak(case: Any, way: Way, row: dict[str, Any]) -> Outcome:
    """The step on a GPU, with the peak over weights and data in ``row``. It reads torch's counters and waits for
    nothing, so that it may be timed."""
    for parameter in case.module.parameters():
        parameter.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome = way.run(case)
    outputs = measure.tensors_of({**outcome, **gradients(case)})
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    row["output_bytes"] = sum(tensor.untyped_storage().nbytes() for tensor in outputs)
    return outcome


def add_memory(step: Step, name: str, way: Way, row: dict[str, Any], result: dict[str, Any]) -> None:
    """Peak over weights and data on a CPU, in a process of its own; the gradients are its outputs."""
    request = {"op": step.op, "shape": name, "way": way.name, "experts": result.get("experts")}
    request |= {key: result["shape"][key] for key in ("dtype", "recompute")}
    try:
        row["peak_bytes"], row["output_bytes"] = harness.child_memory(request)
    except measure.Unavailable as error:
        row["memory_reason"] = str(error)


def with_gradients(case: Any, way: Way) -> Outcome:
    outcome = run(case, way)
    return {**outcome, **gradients(case)}


def memory_call(step: Step, request: dict[str, Any]) -> Callable[[], Outcome]:
    """For memory_child: the call to measure; libraries are loaded and threads started by a toy step before."""
    options = {
        "dtype": getattr(torch, request["dtype"]),
        "device": torch.device("cpu"),
        "checkpointing": request["recompute"],
    }
    way = next(way for way in step.ways(request["recompute"]) if way.name == request["way"])
    small, case = (step.build(step.shapes[name], **options) for name in ("mini", request["shape"]))
    if request["experts"] is not None:
        for made in (small, case):
            made.model.set_experts_implementation(request["experts"])
    run(small, way)
    return lambda: with_gradients(case, way)


def lines(result: dict[str, Any], limits: dict[str, dict[str, float]]) -> list[str]:
    """One line a way: time, what all savings so far brought, what this one did, operations, memory, errors."""
    limit = limits.get(result["shape"]["dtype"])
    shape, checked = result["shape"], result["checked"]
    found = [f"\n{result['title']}: {table.shape(shape, result['sizes'])}"]
    if "reason" not in result:
        size = f"{checked['layers']} layers and {checked['responses']} responses"
        found.append(f"  all ways agree in fp32 on {size}; errors are against the first")
        recompute = "recomputed" if shape["recompute"] else "kept"
        stock = f"stock experts: {result['experts']}; " if "experts" in result else ""
        found.append(f"  {stock}activations: {recompute}")
    else:
        found.append(f"  {result['status']}: {result['reason']}")
    width = max(len(row["name"]) for row in result["rows"])
    for row in result["rows"]:
        cells = [f"  {row['name']:<{width}}"]
        if "median_s" in row:
            spread = (row["high_s"] - row["low_s"]) / row["median_s"]
            cells.append(f"{table.seconds(row['median_s']):>8} (IQR {spread:4.0%}, n {row['samples']})")
            cells.append(f"{row['speedup']:6.2f}x in all" if "speedup" in row else " " * 14)
            cells.append(f"{row['step']:5.2f}x by this" if "step" in row else " " * 14)
            share = f", {row['tflops'] / limit['matmul_tflops']:.0%} of matmul" if limit else ""
            cells.append(f"{row['flops'] / 1e12:7.3g} TFLOP at {row['tflops']:.3g} TFLOP/s{share}")
            cells.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if "peak_bytes" in row:
            cells.append(f"peak {table.size(row['peak_bytes'])} (gradients {table.size(row['output_bytes'])})")
        elif "memory_reason" in row:
            cells.append(f"memory not measured: {row['memory_reason']}")
        if row["status"] != "ok":
            cells.append(row["reason"])
        found.append("  ".join([*cells, f"error {table.error_text(row)}", row["saves"]]))
    return found
