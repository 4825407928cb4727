"""One whole discriminator step (score + update) of the alignment stage, against the reference's way: a waterfall.

The reference's way (docs/method.md, section 7) in its best faithful form: stock transformers modules, the faster of its
experts implementations, response by response: 2N forwards for the scores, 4N with a gradient for the update. Ours: one
packed tree that scores and updates. Between the two every saving on its own, in the order of discriminator_ways.WAYS.

All ways first run in fp32 on the same weights and data. Where scores, loss or gradients differ, no time is shown. Data
without near ties of the router are looked for first: a token whose k-th and next expert are equal up to rounding goes
either way, and then two right ways differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import discriminator_ways, harness, machine, measure, table
from benchmarks.arguments import Parser, result_path
from benchmarks.discriminator_case import GPU, SHAPES, Case, Shape, build
from benchmarks.discriminator_flops import flops_of_ways
from benchmarks.discriminator_ways import Outcome, Way
from benchmarks.harness import DTYPES, Tolerance

GPU_PART = ("discriminator", 150)  # its name in `make gpu`, and its seconds
GPU_ARGUMENTS = ["--rounds", "3"]

EXPERTS = ("eager", "grouped_mm")  # transformers' own implementations
TOLERANCE = Tolerance("relative", ours=1e-5, peer=1e-5)
# Two router probabilities this close may change places by rounding: a few hundred times that of fp32.
NEAR_TIE = 3e-6
SEEDS = 16
# What the agreement of a large shape is checked on: every part of the model, few of its layers and responses.
CHECKED_LAYERS, CHECKED_RESPONSES = 4, 3


def run(case: Case, way: Way) -> Outcome:
    """The step, its gradients new."""
    for parameter in case.discriminator.parameters():
        parameter.grad = None
    return way.run(case)


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    given = top.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: there is no CUDA device; use --device cpu")
    name = "mini" if given.dry_run else given.shape or ("gpu" if device.type == "cuda" else "tiny")
    dtype = given.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rounds = 1 if given.dry_run else given.rounds
    path = given.json or (result_path("discriminator", device) if given.save else None)
    document = {
        "schema": harness.SCHEMA,
        "op": "discriminator",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "environment": machine.environment(device),
        "tests": None,
        "limits": {},
        "problems": [],
    }
    recompute = SHAPES[name] == GPU if given.recompute is None else given.recompute
    problem = step(SHAPES[name], DTYPES[dtype], device, given.experts, recompute, rounds, given.seconds)
    document["problems"].append(problem)
    harness.save(document, path)
    print("\n".join(waterfall_lines(problem)), flush=True)
    if problem["status"] != "ok":
        print("refused: ways that disagree show no time", file=sys.stderr)
    elif given.plot is not None:
        from benchmarks.plots import waterfall

        waterfall(document, given.plot)
    harness.print_json(document)
    return harness.exit_status(document)


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks discriminator", description=__doc__.split("\n")[0])
    top.add_argument("--shape", choices=sorted(SHAPES), help="default: gpu on a GPU, tiny on a CPU")
    top.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--dtype", choices=("fp32", "bf16"), help="of the timed steps; default: bf16 on a GPU, else fp32")
    top.add_argument("--experts", choices=("fastest", *EXPERTS), default="fastest", help="of the stock modules")
    top.add_argument("--recompute", action="store_true", default=None, help="activation checkpointing in every way")
    top.add_argument("--no-recompute", dest="recompute", action="store_false", help="default, but for --shape gpu")
    top.add_argument("--rounds", type=int, help="instead of --seconds")
    top.add_argument("--seconds", type=float, default=300.0, help="timing of all ways together; at least 5 rounds")
    top.add_argument("--json", type=Path, help="also write the result here")
    top.add_argument("--save", action="store_true", help="write the result where RESULTS.md is made from")
    top.add_argument("--plot", type=Path, help="PNG: the waterfall")
    top.add_argument("--dry-run", action="store_true", help="one round at a toy size")
    return top


def step(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    experts: str,
    recompute: bool,
    rounds: int | None,
    seconds: float,
) -> dict[str, Any]:
    """The problem's result: agreement in fp32, then times in ``dtype``. Refused results carry no times."""
    checked = shape
    if shape.layers > CHECKED_LAYERS:
        checked = replace(shape, layers=CHECKED_LAYERS, responses=min(shape.responses, CHECKED_RESPONSES))
    case = without_near_ties(checked, device, recompute)
    ways = discriminator_ways.ways(recompute)
    case.model.set_experts_implementation(EXPERTS[0])
    rows = [{"name": way.name, "role": role(way), "status": "ok", "saves": way.saves} for way in ways]
    wrong = check(case, ways, rows)
    result = {
        "name": "step",
        "title": "discriminator score + update, one prompt",
        "shape": {"dtype": str(dtype).removeprefix("torch."), "recompute": recompute, **asdict(shape)},
        "checked": {"dtype": "float32", "layers": checked.layers, "responses": checked.responses},
        "status": "refused" if wrong else "ok",
        "rows": rows,
    }
    if wrong:
        return {**result, "reason": wrong, "flops": 0.0, "bytes": 0.0}
    if checked is not shape or dtype != torch.float32:
        del case
        measure.free(device)
        case = build(shape, dtype=dtype, device=device, checkpointing=recompute)
    flops = flops_of_ways(case, checkpointing=recompute)
    weights = sum(p.numel() * p.element_size() for p in case.discriminator.parameters())
    # Weights and their gradients once: a step's fewest bytes.
    result.update(flops=flops[len(discriminator_ways.WAYS) - 1], reference_flops=flops[0], bytes=2.0 * weights)
    result["experts"] = fastest_experts(case) if experts == "fastest" else experts
    case.model.set_experts_implementation(result["experts"])
    add_times(case, ways, rows, flops, rounds, seconds)
    return result


def role(way: Way) -> str:
    return "ours" if way.name.startswith("ours") else "peer"


def without_near_ties(shape: Shape, device: torch.device, recompute: bool) -> Case:
    """Model and data in fp32 of the first seed without a near tie of the router.

    Raises RuntimeError where none of the seeds is without one.
    """
    margin = 0.0
    for seed in range(SEEDS):
        case = build(shape, dtype=torch.float32, device=device, checkpointing=recompute, seed=seed)
        case.model.set_experts_implementation(EXPERTS[0])
        margin = smallest_margin(case)
        if margin > NEAR_TIE:
            return case
    raise RuntimeError(
        f"every one of {SEEDS} seeds has a near tie of the router: the last one's margin is {margin:.1e}"
    )


def smallest_margin(case: Case) -> float:
    """Smallest difference between the k-th and the next router probability, over all tokens and layers."""
    if case.shape.top_k == case.shape.experts:
        return float("inf")
    margins: list[Tensor] = []

    def see(gate: torch.nn.Module, _: tuple, output: tuple[Tensor, ...]) -> None:
        top = output[0].detach().float().softmax(-1).topk(case.shape.top_k + 1).values
        margins.append((top[:, -2] - top[:, -1]).min())

    hooks = [layer.mlp.gate.register_forward_hook(see) for layer in case.model.model.language_model.layers]
    discriminator_ways.prompt_once(case)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(margins).min())


def check(case: Case, ways: Sequence[Way], rows: list[dict[str, Any]]) -> str:
    """Every way against the first: adds each row's errors, and returns what is wrong, or ""."""
    wrong = []
    first = truth = None
    for i, (way, row) in enumerate(zip(ways, rows)):
        print(f"agreement {i + 1}/{len(ways)}: {way.name}", file=sys.stderr, flush=True)
        outcome = run(case, way)
        gradients = {name: gradient.clone() for name, gradient in case.gradients().items()}
        if truth is None:
            first, truth = outcome, gradients
        errors = {
            "student": TOLERANCE.error(outcome.student, first.student.double()),
            "teacher": TOLERANCE.error(outcome.teacher, first.teacher.double()),
            "loss": TOLERANCE.error(torch.tensor(outcome.loss), torch.tensor(first.loss, dtype=torch.float64)),
            "gradient": gradient_error(gradients, truth),
        }
        row["errors"] = {name: {"metric": TOLERANCE.metric, "value": value} for name, value in errors.items()}
        bad = [name for name, value in errors.items() if not value <= TOLERANCE.ours]  # NaN is bad
        if bad:
            row["status"] = "wrong"
            row["reason"] = ", ".join(f"{name} {errors[name]:.1e} > {TOLERANCE.ours:.0e}" for name in bad)
            wrong.append(f"{way.name}: {row['reason']}")
    return "; ".join(wrong)


def gradient_error(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The worst parameter's: a small one counts as much as a large one. A missing gradient is a wrong one."""
    if gradients.keys() != truth.keys():
        return float("inf")
    return max(TOLERANCE.error(gradients[name], truth[name].double()) for name in truth)


def fastest_experts(case: Case) -> str:
    """Of transformers' implementations, by one response with its gradient; the second of two runs counts."""
    seconds = {}
    timer = measure.Timer(case.discriminator.head.device)
    sample = few_responses(case, 1)
    for name in EXPERTS:
        case.model.set_experts_implementation(name)
        try:
            run(sample, discriminator_ways.WAYS[1])
        except (NotImplementedError, RuntimeError, ImportError) as error:
            print(f"experts {name}: cannot run here ({measure.short(error)})", file=sys.stderr)
            continue
        seconds[name] = timer.once(lambda: run(sample, discriminator_ways.WAYS[1]))
    return min(seconds, key=seconds.get)


def few_responses(case: Case, count: int) -> Case:
    return replace(case, parts=case.parts[:count], shape=replace(case.shape, responses=count))


def add_times(
    case: Case, ways: Sequence[Way], rows: list[dict[str, Any]], flops: list[float], rounds: int | None, seconds: float
) -> None:
    device = case.discriminator.head.device
    by_name = {row["name"]: row for row in rows}
    calls: dict[str, Callable[[], Outcome]] = {way.name: lambda way=way: run(case, way) for way in ways}
    print(f"timing {len(ways)} ways in turn", file=sys.stderr, flush=True)
    samples, failed = measure.interleave(calls, measure.Timer(device), seconds, rounds, warmups=1)
    for name, reason in failed.items():
        by_name[name].update(status="failed", reason=reason)
    ours = samples.get(discriminator_ways.WAYS[-1].name)
    for way, work in zip(ways, flops):
        row = by_name[way.name]
        row["flops"] = work
        if way.name not in samples:
            continue
        summary = measure.Summary.of(samples[way.name])
        row.update(median_s=summary.median, low_s=summary.low, high_s=summary.high, samples=summary.samples)
        row["tflops"] = work / summary.median / 1e12
        if ours is not None and way is not discriminator_ways.WAYS[-1]:
            ratios = measure.Summary.of([theirs / mine for theirs, mine in zip(samples[way.name], ours)])
            row["times_ours"], row["times_ours_low"], row["times_ours_high"] = ratios.median, ratios.low, ratios.high
        if device.type == "cuda":
            row["peak_bytes"], row["output_bytes"] = measure.cuda_peak_bytes(calls[way.name])


def waterfall_lines(problem: dict[str, Any]) -> list[str]:
    """One line a way: time, what all savings so far brought, what this one did, operations, errors."""
    shape, checked = problem["shape"], problem["checked"]
    sizes = ("dtype", "layers", "hidden", "experts", "inner", "responses", "prompt", "caption", "reasoning")
    lines = [f"\n{problem['title']}: {table.shape({key: shape[key] for key in sizes})}"]
    if problem["status"] == "ok":
        size = f"{checked['layers']} layers and {checked['responses']} responses"
        lines.append(f"  all ways agree in fp32 on {size}; errors are against the first")
        recompute = "recomputed" if shape["recompute"] else "kept"
        lines.append(f"  stock experts: {problem['experts']}; activations: {recompute}")
    else:
        lines.append(f"  {problem['status']}, no time is shown: {problem['reason']}")
    width = max(len(row["name"]) for row in problem["rows"])
    timed = [row["median_s"] for row in problem["rows"] if "median_s" in row]
    before = None
    for row in problem["rows"]:
        cells = [f"  {row['name']:<{width}}"]
        if "median_s" in row:
            spread = (row["high_s"] - row["low_s"]) / row["median_s"]
            alone = f"{before / row['median_s']:5.2f}x by this" if before else " " * 14
            cells.append(f"{table.seconds(row['median_s']):>8} (IQR {spread:4.0%}, n {row['samples']})")
            cells.append(f"{timed[0] / row['median_s']:6.2f}x in all, {alone}")
            cells.append(f"{row['flops'] / 1e12:7.3g} TFLOP at {row['tflops']:.3g} TFLOP/s")
            before = row["median_s"]
        if "peak_bytes" in row:
            cells.append(f"peak {table.size(row['peak_bytes'])}")
        if row["status"] != "ok":
            cells.append(row["reason"])
        lines.append("  ".join([*cells, f"error {table.error_text(row)}", row["saves"]]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
