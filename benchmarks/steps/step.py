"""A whole training step, written in several ways on the same weights and data: each saves one thing more.

The first way is the reference's, the last ones are ours. All ways first run in fp32: where outputs or gradients differ
from the first's, no time is shown. Then all run in turn, round by round. The result has one problem a shape, "step".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import measure, processes
from benchmarks.harness.document import add_errors, add_times, clear_times
from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Outputs, Tolerance
from benchmarks.harness.run import Options
from benchmarks.steps.case import Case, Shape

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
SIZES += ("sigma", "spread")


@dataclass(frozen=True)
class Way:
    """``run(case)`` returns {output: tensor} and leaves gradients in the parameters."""

    name: str
    saves: str  # what it no longer computes, one line
    run: Callable[[Any], Outputs]

    @property
    def role(self) -> str:
        return "ours" if self.name.startswith("ours") else "peer"


@dataclass(frozen=True)
class Step:
    """``build(shape, dtype=, device=, checkpointing=, seed=)`` -> a case; with experts one that has ``few(count)``.

    ``ways(checkpointing)`` and ``flops(case, checkpointing=)`` list the ways and their operations in the same order.
    ``margin(case)``: how near to a tie a router comes, for models that have one: near ties fall either way, and then
    two right ways differ.
    """

    op: str
    title: str
    description: str
    module: str  # where it is
    shapes: dict[str, Shape]
    default: dict[str, tuple[str, ...]]  # by device
    build: Callable[..., Any]
    ways: Callable[[bool], tuple[Way, ...]]
    flops: Callable[..., list[float]]
    margin: Callable[[Any], float] | None = None

    seconds = 300.0  # timing of all ways of a shape; at least 5 rounds

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        shown = ", ".join(f"{'+'.join(found)} on {device}" for device, found in self.default.items())
        parser.add_argument(
            "--shape", action="append", choices=sorted(self.shapes), help=f"repeatable; default: {shown}"
        )
        parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the timed steps; default: bf16 on a GPU")
        parser.add_argument("--experts", choices=("fastest", *EXPERTS), default="fastest", help="of the stock modules")
        parser.add_argument(
            "--recompute", action=argparse.BooleanOptionalAction, help="default: for --shape gpu, gpu-even"
        )

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        names = given.shape or (("mini",) if given.dry_run else self.default[given.device])
        dtype = DTYPES[given.dtype or ("bf16" if given.device == "cuda" else "fp32")]
        return {"shapes": names, "dtype": dtype, "experts": given.experts, "recompute": given.recompute}

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        """What limits are measured in."""
        return {str(options.dtype).removeprefix("torch."): options.dtype}

    def results(self, options: Options, keep: Callable[[dict], None]) -> Iterator[dict[str, Any]]:
        for name in options.shapes:
            yield problem(self, name, options, keep)

    def memory_call(self, request: dict[str, Any]) -> Callable[[], Outputs]:
        """The call whose memory is measured; libraries load and threads start by a toy step before."""
        options = {"dtype": getattr(torch, request["dtype"]), "checkpointing": request["recompute"]}
        way = next(way for way in self.ways(request["recompute"]) if way.name == request["way"])
        options["seed"] = request["seed"]
        shapes = (self.shapes[name] for name in ("mini", request["shape"]))
        small, case = (self.build(shape, device=torch.device("cpu"), **options) for shape in shapes)
        if request["experts"] is not None:
            for made in (small, case):
                made.model.set_experts_implementation(request["experts"])
        run(small, way)
        return lambda: {**run(case, way), **gradients(case)}


def run(case: Case, way: Way) -> Outputs:
    """The step, its gradients new."""
    for parameter in case.module.parameters():
        parameter.grad = None
    return way.run(case)


def gradients(case: Case) -> dict[str, Tensor]:
    return {name: p.grad for name, p in case.module.named_parameters() if p.grad is not None}


def problem(step: Step, name: str, options: Options, keep: Callable[[dict], None]) -> dict[str, Any]:
    """Agreement in fp32, then times in the dtype, then memory; ``keep`` has the result so far after each. A refused
    one carries no times."""
    shape, device, dtype = step.shapes[name], options.device, options.dtype
    recompute = name.startswith("gpu") if options.recompute is None else options.recompute
    checked = shape
    if shape.layers > CHECKED_LAYERS:
        checked = replace(shape, layers=CHECKED_LAYERS, responses=min(shape.responses, CHECKED_RESPONSES))
    case, seed = without_near_ties(step, checked, device, recompute)
    ways = step.ways(recompute)
    rows = [{"name": way.name, "role": way.role, "status": "ok", "saves": way.saves} for way in ways]
    result = {
        "name": "step",
        "title": step.title,
        "shape": {"dtype": str(dtype).removeprefix("torch."), "recompute": recompute, **asdict(shape)},
        "seed": seed,
        "sizes": [size for size in SIZES if size != "experts" or shape.experts],
        "checked": {"dtype": "float32", "layers": checked.layers, "responses": checked.responses},
        "status": "ok",
        "flops": 0.0,
        "bytes": 0.0,
        "rows": rows,
    }
    wrong = check(case, ways, rows)
    if wrong:
        result.update(status="refused", reason=wrong)
        return result
    keep(result)
    if checked is not shape or dtype != torch.float32:
        del case
        measure.free(device)
        case = step.build(shape, dtype=dtype, device=device, checkpointing=recompute, seed=seed)
    flops = step.flops(case, checkpointing=recompute)
    weights = sum(p.numel() * p.element_size() for p in case.module.parameters())
    ours = next(i for i, row in enumerate(rows) if row["role"] == "ours")
    # Weights and their gradients once: a step's fewest bytes.
    lengths = [len(ids) for ids in case.rollout.response_ids]
    result.update(flops=flops[ours], reference_flops=flops[0], bytes=2.0 * weights, lengths=lengths)
    if shape.experts:
        fastest = options.experts == "fastest"
        result["experts"] = fastest_experts(case, ways[1], options.busy) if fastest else options.experts
        case.model.set_experts_implementation(result["experts"])
    add_results(case, ways, rows, flops, options, lambda: keep(result))
    if "median_s" not in rows[ours]:
        kept = ("name", "role", "status", "reason", "saves", "errors")
        result["rows"] = [{key: row[key] for key in kept if key in row} for row in rows]
        result.update(status="refused", reason=f"{rows[ours]['name']}: {rows[ours]['reason']}")
        return result
    keep(result)
    for way, row in zip(ways, rows):
        if options.memory and device.type == "cpu" and "median_s" in row:
            add_memory(step, name, way, row, result)
            keep(result)
    return result


def without_near_ties(step: Step, shape: Shape, device: torch.device, recompute: bool) -> tuple[Case, int]:
    """Model and data in fp32 of the first seed without a near tie of the router, and that seed.

    Raises RuntimeError where none of the seeds is without one.
    """
    margin = 0.0
    for seed in range(SEEDS):
        case = step.build(shape, dtype=torch.float32, device=device, checkpointing=recompute, seed=seed)
        if step.margin is None:
            return case, seed
        case.model.set_experts_implementation(EXPERTS[0])
        margin = step.margin(case)
        if margin > NEAR_TIE[device.type]:
            return case, seed
    raise RuntimeError(f"router: near ties with every one of {SEEDS} seeds, the last one's margin is {margin:.1e}")


@contextmanager
def full_fp32() -> Iterator[None]:
    """cudnn's convolutions of fp32 are TF32 by default, good to 1e-3; the vision tower's first layer is one."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check(case: Case, ways: Sequence[Way], rows: list[dict[str, Any]]) -> str:
    """Every way against the first: adds each row's errors, and returns what is wrong, or ""."""
    wrong = []
    truth: Outputs = {}
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
        bounds = dict.fromkeys(errors, TOLERANCE.ours)
        if case.device.type == "cuda":
            bounds = dict.fromkeys(errors, GPU_BOUND) | {"worst parameter": GPU_WORST * GPU_BOUND}
        bad = add_errors(row, errors, dict.fromkeys(errors, TOLERANCE.metric), bounds)
        if bad:
            row.update(status="wrong", reason=bad)
            wrong.append(f"{way.name}: {bad}")
    return "; ".join(wrong)


def gradient_errors(mine: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, float]:
    """(of all parameters together, of the worst one, where a small one counts as much as a large one), relative.

    A missing gradient is a wrong one.
    """
    if mine.keys() != truth.keys():
        return float("inf"), float("inf")
    difference = {name: float((mine[name].double() - truth[name].double()).norm()) for name in truth}
    size = {name: float(truth[name].double().norm()) for name in truth}
    worst = max(difference[name] / max(size[name], 1e-300) for name in truth)
    return math.hypot(*difference.values()) / math.hypot(*size.values()), worst


def fastest_experts(case: Any, way: Way, busy: bool) -> str:
    """Of transformers' implementations, by ``way`` with one response; the second of two runs counts."""
    seconds, reasons = {}, []
    timer, sample = measure.Timer(case.device, busy), case.few(1)
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


def add_results(
    case: Case,
    ways: Sequence[Way],
    rows: list[dict[str, Any]],
    flops: list[float],
    options: Options,
    keep: Callable[[], None],
) -> None:
    """Every row's time, or why it has none; on a GPU also its memory, as a step more of every way is half a minute.

    ``keep()`` is called after every round, the rows filled."""
    step = with_peak if options.memory and case.device.type == "cuda" else lambda case, way, _: run(case, way)
    calls = {way.name: lambda way=way, row=row: step(case, way, row) for way, row in zip(ways, rows)}
    tokens = case.shape.prompt + sum(len(ids) for ids in case.rollout.response_ids)

    def tell(samples: measure.Samples, failed: dict[str, str]) -> None:
        fill_rows(rows, flops, tokens, samples, failed)
        keep()

    measure.say(f"timing {len(ways)} ways in turn")
    timer = measure.Timer(case.device, options.busy)
    samples, failed = measure.interleave(calls, timer, options.seconds, options.rounds, warmups=1, keep=tell)
    fill_rows(rows, flops, tokens, samples, failed)


def fill_rows(
    rows: list[dict[str, Any]], flops: list[float], tokens: int, samples: measure.Samples, failed: dict[str, str]
) -> None:
    """The times of all ways, in their order, and how much faster each is than the first and the one before."""
    clear_times(rows, failed)
    ours = next(row["name"] for row in rows if row["role"] == "ours")
    for i, (row, work) in enumerate(zip(rows, flops)):
        name, row["flops"] = row["name"], work
        if name not in samples:
            continue
        add_times(row, samples[name], flops=work, ours=samples.get(ours) if name != ours else None)
        row["tokens_per_s"] = tokens / row["median_s"]
        for key, base in (("speedup", rows[0]["name"]), ("step", rows[max(i - 1, 0)]["name"])):
            if base in samples and base != name:
                ratios = [before / now for before, now in zip(samples[base], samples[name])]
                row[key] = measure.Summary.of(ratios).median


def with_peak(case: Case, way: Way, row: dict[str, Any]) -> Outputs:
    """The step on a GPU, with the peak over weights and data in ``row``. It reads torch's counters and waits for
    nothing, so that it may be timed."""
    for parameter in case.module.parameters():
        parameter.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome = way.run(case)
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    row["output_bytes"] = measure.nbytes({**outcome, **gradients(case)})
    return outcome


def add_memory(step: Step, name: str, way: Way, row: dict[str, Any], result: dict[str, Any]) -> None:
    """Peak over weights and data on a CPU, in a process of its own; the gradients are its outputs."""
    request = {"module": step.module, "shape": name, "way": way.name, "experts": result.get("experts")}
    request |= {"seed": result["seed"]} | {key: result["shape"][key] for key in ("dtype", "recompute")}
    try:
        row["peak_bytes"], row["output_bytes"] = processes.peak_memory(request)
    except measure.Unavailable as error:
        row["memory_reason"] = str(error)
