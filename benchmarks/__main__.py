"""python -m benchmarks OP [options]: one op's benchmark. The last line of the output is the result as JSON."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import harness
from benchmarks.arguments import Parser, result_path

HERE = Path(__file__).resolve().parent


def ops() -> list[str]:
    """Ops that have a bench_<op>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def load(op: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.bench_{op}")


def shapes(module: ModuleType, given: Sequence[str], device: str) -> list[dict[str, Any]]:
    """``--shape``: a name of the module's SHAPES, or key=value,... over its first shape for this device."""
    default = module.SHAPES["published" if device == "cuda" else "cpu"]
    if not given:
        return list(default)
    chosen: list[dict[str, Any]] = []
    for text in given:
        if text in module.SHAPES:
            chosen += module.SHAPES[text]
            continue
        values = dict(default[0])
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or key not in values:
                names = ", ".join(module.SHAPES)
                raise ValueError(f"--shape: got {part!r}, expected one of {names}, or key=value of {', '.join(values)}")
            try:
                values[key] = type(values[key])(value)
            except ValueError:
                raise ValueError(f"--shape: {key}: got {value!r}, expected {type(values[key]).__name__}") from None
        chosen.append(values)
    return chosen


def parser() -> Parser:
    top = Parser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("op", choices=ops())
    top.add_argument("--shape", action="append", default=[], help="published, cpu, tiny, or T=8192,V=32768; repeatable")
    top.add_argument("--problem", action="append", default=[], help="only this problem; repeatable")
    top.add_argument("--peers", default=None, help="parts of names, comma-separated; '' for none (default: all)")
    top.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--seconds", type=float, default=10.0, help="timing of one problem (default 10)")
    top.add_argument("--rounds", type=int, default=None, help="instead of --seconds")
    top.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    top.add_argument("--no-tests", action="store_true", help="do not run the op's tests first")
    top.add_argument("--json", type=Path, default=None, help="also write the result here, problem by problem")
    top.add_argument("--save", action="store_true", help="write the result where RESULTS.md is made from")
    top.add_argument("--plot", type=Path, default=None, help="PNG: time and memory over a sweep, and the roofline")
    top.add_argument("--base", default=None, metavar="REV", help="compare with this commit, side by side")
    top.add_argument("--dry-run", action="store_true", help="toy machine limits, one round")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ops() and not hasattr(load(words[0]), "problems"):
        return load(words[0]).main(words[1:])  # a benchmark that is not made of problems: whole steps
    given = top.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: there is no CUDA device; use --device cpu")
    if given.save and (given.no_tests or given.dry_run or given.base):
        why = "--base compares commits" if given.base else "--no-tests and --dry-run leave the op's tests out"
        top.error(f"--save: RESULTS.md is made from tested results, and {why}; write elsewhere with --json")
    module = load(given.op)
    try:
        chosen = shapes(module, given.shape, given.device)
        if given.plot is not None and not given.shape:
            chosen = module.sweep(chosen[0])
    except ValueError as error:
        top.error(str(error))
    options = harness.Options(
        device=torch.device(given.device),
        shapes=chosen,
        only=given.problem,
        peers=None if given.peers is None else [part for part in given.peers.split(",") if part],
        seconds=given.seconds,
        rounds=1 if given.dry_run else given.rounds,
        memory=not given.no_memory,
        run_tests=not (given.no_tests or given.dry_run),
        json_path=given.json or (result_path(given.op, torch.device(given.device)) if given.save else None),
        small=given.dry_run,
    )
    if given.base is not None:
        from benchmarks.compare import compare

        document = compare(given.op, given.base, options)
    else:
        document = harness.run(given.op, module, options)
    if document["tests"] is not None:
        print(f"\ntests: {document['tests']['status']}: {document['tests']['summary']}")
    status = harness.exit_status(document)
    if status:
        print("refused: what is wrong shows no speed", file=sys.stderr)
    harness.print_json(document)
    if given.plot is not None and any(problem["status"] == "ok" for problem in document["problems"]):
        from benchmarks.plots import plot

        plot(document, given.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
