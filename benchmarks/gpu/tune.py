"""Tunes block sizes on this GPU: python -m benchmarks.gpu.tune [--op linear_logprob] [--dry-run].

``make gpu PART=tune`` runs it, the one place that writes the tables that ``prism_kernels.tuned_options`` reads.
Times every candidate of every tunable launch side by side with the default, at production sizes, drops those whose
results differ or that do not compile, and writes what is faster to kernels/prism_kernels/<op>/tables/<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.catalog import load
from benchmarks.harness import machine, measure
from benchmarks.ops.moe.data import make_layer
from prism_kernels import tuned_options
from prism_kernels.dispatch import interpreting
from prism_kernels.moe import plan_routing

GAIN = 0.02  # a candidate must be this much faster than the default to be written
TOLERANCE = 1e-3  # relative: another order of summation is allowed, another result is not
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One tunable launch: its candidates, and a call at production size that goes through it.

    ``make(device, toy)`` -> the call; it returns the tensors that every candidate must reproduce.
    """

    op: str
    key: str
    candidates: list[dict[str, Any]]
    make: Callable[[torch.device, bool], Call]


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values)) for values in product(*choices.values())]


# The interpreter's bf16 products are wrong.
HEAD = {"T": 4096, "H": 128, "V": 151936, "dtype": "bf16"}
TOY_HEAD = {"T": 6, "H": 16, "V": 1000, "dtype": "fp32"}
EXPERTS = {"T": 16384, "H": 2048, "I": 6144, "E": 4, "k": 2, "skew": 0.5, "dtype": "bf16"}
TOY_EXPERTS = {**EXPERTS, "T": 24, "H": 32, "I": 48, "dtype": "fp16"}

NORM = {"T": 16384, "H": 2560, "Hq": 32, "Hkv": 8, "D": 128, "dtype": "bf16"}
TOY_NORM = {**NORM, "T": 6, "dtype": "fp32"}
INNER = {"T": 16384, "I": 9728, "dtype": "bf16"}
TOY_INNER = {"T": 3, "I": 3000, "dtype": "fp32"}


def cases() -> Iterator[Case]:
    blocks = grid(BLOCK=[1024, 2048, 4096, 8192, 16384], num_warps=[4, 8, 16])
    yield Case("linear_logprob", "statistics 4", blocks, _of("linear_logprob", "logprob_entropy", HEAD, TOY_HEAD))
    yield Case("linear_logprob", "gradient 4", blocks, _of("linear_logprob", "cross_entropy", HEAD, TOY_HEAD))
    # Of 608 KB a row: none, or 33, 66, 132 rows under way.
    passes = grid(MEGABYTES=[0, 21, 41, 81])
    yield Case("linear_logprob", "two_pass 4", passes, _of("linear_logprob", "cross_entropy", HEAD, TOY_HEAD))
    tiles = grid(BLOCK_M=[64, 128], BLOCK_N=[128, 256], BLOCK_R=[32, 64], num_warps=[4, 8], num_stages=[3, 4])
    yield Case("moe", "tile 2", tiles, _grouped)
    routes = grid(BLOCK_H=[64, 128, 256], num_warps=[2, 4, 8])
    yield Case("moe", "route 2 E16", routes, _of("moe", "route", EXPERTS, TOY_EXPERTS))
    columns = grid(BLOCK=[512, 1024, 2048], num_warps=[2, 4, 8])
    yield Case("moe", "columns 1024", columns, _of("moe", "experts", EXPERTS, {**TOY_EXPERTS, "H": 1024}))
    yield from _norms()
    pieces = grid(BLOCK=[1024, 2048, 4096], num_warps=[4, 8])
    for direction in ("forward", "backward"):
        yield Case("swiglu", direction, pieces, _of("swiglu", "packed", INNER, TOY_INNER))


def _norms() -> Iterator[Case]:
    """Of H 2048 < H <= 4096 and D 128. ``PROGRAMS`` are those that so many registers leave room for."""
    norm, rotate = _of("rms_norm", "residual", NORM, TOY_NORM), _of("rms_norm", "rotate", NORM, TOY_NORM)
    yield Case("rms_norm", "forward 4096", grid(num_warps=[4, 8, 16]), norm)
    yield Case("rms_norm", "rotate forward 64 x 32", grid(HEADS=[8, 16, 32], num_warps=[2, 4, 8]), rotate)
    for key, call, warps in (("backward 4096", norm, (8, 16)), ("rotate backward 64 x 8", rotate, (2, 4))):
        resident = [
            {"num_warps": count, "maxnreg": registers, "PROGRAMS": times * 2048 // registers // count}
            for count in warps
            for registers in (64, 96, 128)
            for times in (1, 2)
        ]
        yield Case("rms_norm", key, resident, call)


def _of(op: str, problem: str, shape: dict[str, Any], toy_shape: dict[str, Any]) -> Callable[..., Call]:
    """Ours of a benchmark's problem."""

    def make(device: torch.device, toy: bool) -> Call:
        request = {"problem": problem, "shape": toy_shape if toy else shape, "contender": "prism"}
        call = load(op).contender(request, device).prepare()
        return lambda: list(call().values())

    return make


def _grouped(device: torch.device, toy: bool) -> Call:
    """The grouped GEMMs by our kernels, whichever are the fastest here."""
    from prism_kernels.moe import triton_grouped_gemm

    layer = make_layer(TOY_EXPERTS if toy else EXPERTS, device)
    offset = plan_routing(layer.index, layer.weight, layer.down.shape[0]).expert_offset
    x = layer.hidden.detach().repeat(layer.index.shape[1], 1)
    up = layer.gate_up.detach().transpose(1, 2)
    out = torch.empty_like(layer.gate_up)

    def call() -> list[Tensor]:
        y = triton_grouped_gemm.rows(x, up, offset)
        return [y, triton_grouped_gemm.outer(y, x, offset, out)]

    return call


def tune(case: Case, device: torch.device, toy: bool) -> dict[str, Any] | None:
    """The entry to write, or None where nothing beats the default. Raises RuntimeError where the op reads no table."""
    call = case.make(device, toy)
    expected = [tensor.double() for tensor in call()]
    default = tuned_options.asked().get((case.op, case.key))
    if default is None:
        raise RuntimeError(
            f"{case.op} did not ask its table for {case.key!r}; keys asked: {sorted(tuned_options.asked())}"
        )
    candidates = [default, *(c for c in case.candidates if {**default, **c} != default)]
    calls: dict[str, Callable[[], object]] = {}
    for options in candidates[:2] if toy else candidates:
        name = json.dumps({k: v for k, v in options.items() if isinstance(v, (int, float, bool))})

        def run(options=options):
            with tuned_options.forced(case.op, case.key, options):
                return call()

        try:
            right = all(_close(a, b) for a, b in zip(run(), expected))
        except Exception as error:  # noqa: BLE001 - a candidate may not compile in many ways; it is reported and dropped
            print(f"  {name}: {measure.short(error)}")
            continue
        if right:
            calls[name] = run
        else:
            print(f"  {name}: another result")
    repeats = {"rounds": 1, "warmups": 0} if toy else {}
    samples, failed = measure.interleave(calls, measure.Timer(device), seconds=4.0, **repeats)
    for name, reason in failed.items():
        print(f"  {name}: {reason}")
    seconds = {name: measure.Summary.of(values).median for name, values in samples.items()}
    first = next(iter(calls))
    best = min(seconds, key=seconds.get)
    print(f"{case.op}, {case.key}: default {1e6 * seconds[first]:.0f} us, best {1e6 * seconds[best]:.0f} us {best}")
    if seconds[best] > (1 - GAIN) * seconds[first]:
        return None
    microseconds = {"us": round(1e6 * seconds[best], 1), "default_us": round(1e6 * seconds[first], 1)}
    return {"options": json.loads(best), **microseconds}


def _close(actual: Tensor, expected: Tensor) -> bool:
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return bool(error <= TOLERANCE)


def write(op: str, entries: dict[str, Any], device: torch.device) -> None:
    gpu = machine.device_name(device)
    path = tuned_options.table_path(op, gpu)
    old = json.loads(path.read_text())["entries"] if path.exists() else {}
    table = {
        "gpu": gpu,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": machine.commit(),
        "versions": {name: machine.version(name) for name in ("torch", "triton")},
        "entries": {**old, **entries},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="default: all that have tunable launches; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes through Triton's interpreter; writes nothing")
    given = parser.parse_args(arguments)
    if given.dry_run:
        if not interpreting():
            parser.error("--dry-run runs kernels on a CPU: set TRITON_INTERPRET=1 before Python starts")
    elif not torch.cuda.is_available():
        print("tune: needs an NVIDIA GPU (or --dry-run with TRITON_INTERPRET=1)", file=sys.stderr)
        return 2
    os.environ["PRISM_IMPL"] = "triton"
    device = torch.device("cpu" if given.dry_run else "cuda")
    status = 0
    for case in cases():
        if given.op and case.op not in given.op:
            continue
        try:
            entry = tune(case, device, given.dry_run)
        except Exception as error:  # noqa: BLE001 - one launch must not cost the others their tuning
            print(f"{case.op}, {case.key}: {measure.short(error)}", file=sys.stderr)
            status = 1
            continue
        if entry is not None and not given.dry_run:
            write(case.op, {case.key: entry}, device)
    return status


if __name__ == "__main__":
    sys.exit(main())
