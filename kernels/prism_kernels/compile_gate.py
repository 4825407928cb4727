"""Compile every Triton kernel in its production configurations for GPUs that need not be here, and read the binaries.

    python -m prism_kernels.compile_gate [--all | --sample 40] [--op linear_logprob,moe] [--targets 80,90] [--json F]

Fails on a spill to local memory, on more shared memory than the GPU has, on a missing ``wgmma`` where a kernel's own
GEMM should use it (sm_90), and on anything that does not compile. Says nothing about speed or races.

An op adds its kernels by a module ``compile_cases.py`` in its package with ``configurations() -> list[Configuration]``.
Needs triton, whose wheel holds ptxas and cuobjdump; the interpreter must be off (a process of its own).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import prism_kernels
from prism_kernels import tuned_options

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one block may take, CUDA C++ Programming Guide


@dataclass(frozen=True)
class Configuration:
    """One kernel as production launches it.

    >>> Configuration("swiglu, bf16", swiglu_kernel, {"x_ptr": "*bf16", "columns": "i32"}, {"BLOCK": 1024}, num_warps=8)
    """

    name: str  # unique within the op
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # run-time arguments: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32", ...
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers of a thread, where the launch bounds them
    divisible_by_16: tuple[str, ...] = ()  # integers that production lengths and strides make so; pointers always are
    wgmma: bool = False  # a matrix kernel: its sm_90 code must hold wgmma
    targets: tuple[int, ...] = TARGETS


@dataclass(frozen=True)
class Report:
    """What one compilation gave. ``failures`` is empty where it passed."""

    op: str
    name: str
    target: int
    seconds: float
    registers: int = 0
    local_bytes: int = 0  # stack and local memory of a thread: spills
    shared_bytes: int = 0
    failures: tuple[str, ...] = ()


def ops() -> list[str]:
    """Op packages that have a ``compile_cases`` module."""
    packages = (module.name for module in pkgutil.iter_modules(prism_kernels.__path__) if module.ispkg)
    return sorted(
        name for name in packages if importlib.util.find_spec(f"prism_kernels.{name}.compile_cases") is not None
    )


@lru_cache
def configurations(op: str) -> list[Configuration]:
    """The op's defaults, and what its tables of tuned options make of them for the GPUs they are for."""
    module = importlib.import_module(f"prism_kernels.{op}.compile_cases")
    with tuned_options.as_if(""):
        rows = module.configurations()
    for gpu in tuned_options.gpus(op):
        with tuned_options.as_if(gpu):
            tuned = [row for row in module.configurations() if row not in rows]
        rows += [replace(row, name=f"{row.name}, {gpu}") for row in tuned]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{op}/compile_cases.py: names must be unique, got {sorted(n for n in names if names.count(n) > 1)}"
        )
    return rows


def jobs(chosen_ops: Sequence[str], targets: Sequence[int], sample: int | None) -> list[tuple[str, int, int]]:
    """[(op, index of its configuration, target)]; ``sample``: about so many, always the same, 1 or more per op."""
    every = {
        op: [(op, i, target) for i, row in enumerate(configurations(op)) for target in row.targets if target in targets]
        for op in chosen_ops
    }
    total = sum(map(len, every.values()))
    chosen = []
    for rows in every.values():
        count = len(rows) if sample is None else min(len(rows), max(1, round(sample * len(rows) / total)))
        chosen += sorted(random.Random(0).sample(rows, count))
    return chosen


def compile_one(op: str, index: int, target: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = configurations(op)[index]
    began = time.perf_counter()

    def report(**found) -> Report:
        return Report(op, row.name, target, round(time.perf_counter() - began, 2), **found)

    names = row.kernel.arg_names
    unknown = set(row.signature) | set(row.constexprs)
    if unknown != set(names):
        return report(failures=(f"arguments differ from the kernel's: {sorted(unknown ^ set(names))}",))
    signature = {name: "constexpr" if name in row.constexprs else row.signature[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in row.divisible_by_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(row.kernel, signature, {(names.index(k),): v for k, v in row.constexprs.items()}, attributes)
    try:
        options: dict[str, Any] = {"num_warps": row.num_warps, "num_stages": row.num_stages}
        if row.maxnreg is not None:
            options["maxnreg"] = row.maxnreg
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except (triton.CompilationError, RuntimeError) as error:
        return report(failures=(f"does not compile: {' '.join(str(error).split())[-300:]}",))
    registers, local = resource_usage(compiled.asm["cubin"], compiled.metadata.name)
    shared, failures = compiled.metadata.shared, []
    if local:
        failures.append(f"spills {local} bytes a thread ({registers} registers)")
    if shared > SHARED_LIMIT[target]:
        failures.append(f"takes {shared} bytes of shared memory, sm_{target} has {SHARED_LIMIT[target]}")
    if row.wgmma and target == 90 and "wgmma" not in compiled.asm["ptx"]:
        failures.append("holds no wgmma")
    return report(registers=registers, local_bytes=local, shared_bytes=shared, failures=tuple(failures))


def resource_usage(cubin: bytes, function: str) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread, as cuobjdump reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = text.split(f"Function {function}:", 1)[1].splitlines()[1]
    found = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def run(todo: Sequence[tuple[str, int, int]], workers: int) -> Iterator[Report]:
    """The reports in order, each as it comes."""
    if workers <= 1 or not todo:
        yield from (compile_one(*job) for job in todo)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(compile_one, *zip(*todo), chunksize=1)


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m prism_kernels.compile_gate", description=about)
    parser.add_argument("--all", action="store_true", help="every configuration (default: a sample of 40)")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--op", default=None, help=f"comma-separated; default: {', '.join(ops())}")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    chosen = options.op.split(",") if options.op else ops()
    if unknown := set(chosen) - set(ops()):
        parser.error(f"--op: unknown {sorted(unknown)}; ops with compile_cases.py: {', '.join(ops())}")
    targets = [int(target) for target in options.targets.split(",")]
    todo = jobs(chosen, targets, None if options.all else options.sample)
    reports = []
    for report in run(todo, options.jobs):
        reports.append(report)
        verdict = "; ".join(report.failures) or "ok"
        figures = f"{report.registers:>4} reg {report.shared_bytes:>7} B shared {report.seconds:>6.2f} s"
        print(f"sm_{report.target:<4}{report.op:<16}{report.name:<48}{figures}  {verdict}", flush=True)
    failed = sum(bool(report.failures) for report in reports)
    print(f"compile gate: {len(reports)} compiled, {failed} failed")
    if options.json:
        options.json.write_text(json.dumps([vars(report) for report in reports], indent=1))
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
