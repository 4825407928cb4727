"""Benchmarks of the kernels and of whole steps. The last line of the output is the result as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.catalog import CATALOG, load
from benchmarks.harness import document as documents
from benchmarks.harness.compare import Comparison
from benchmarks.harness.run import Options, run


class Parser(argparse.ArgumentParser):
    """Errors in one line: usage is what --help is for."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


def parser() -> Parser:
    """Of the first word."""
    width = max(map(len, CATALOG))
    names = "\n".join(f"  {op:<{width}}  {entry.title}" for op, entry in CATALOG.items())
    more = "python -m benchmarks OP --help: what OP measures, and its options\nmake gpu: all that needs a GPU"
    form = argparse.RawDescriptionHelpFormatter
    usage = "python -m benchmarks OP [options]"
    top = Parser(usage=usage, description=f"{__doc__}\n\n{names}\n\n{more}", formatter_class=form)
    top.add_argument("op", choices=tuple(CATALOG), metavar="OP", help="one of these")
    return top


def op_parser(op: str, bench) -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    top = Parser(prog=f"python -m benchmarks {op}", description=bench.description, formatter_class=form)
    bench.add_options(top)
    top.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    top.add_argument("--seconds", type=float, default=bench.seconds, help=f"timing a problem (default {bench.seconds})")
    top.add_argument("--rounds", type=int, help="instead of --seconds")
    busy = "time by the CPU seconds of this process alone: for a machine that others use (one thread)"
    top.add_argument("--busy", action="store_true", help=busy)
    top.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    top.add_argument("--json", type=Path, help="also write the result here, problem by problem")
    top.add_argument("--save", action="store_true", help="write the result where RESULTS.md is made from")
    top.add_argument("--plot", type=Path, help="PNG: time, memory and roofline over a sweep; of a step, the waterfall")
    top.add_argument("--dry-run", action="store_true", help="one round at a toy size; no tests, no memory")
    return top


def options(op: str, bench, words: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    top = op_parser(op, bench)
    given = top.parse_args(words)
    base, no_tests = getattr(given, "base", None), getattr(given, "no_tests", False)
    if given.device == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: there is no CUDA device; use --device cpu")
    if given.save and (no_tests or given.dry_run or base):
        why = "--base compares commits" if base else "--no-tests and --dry-run leave the op's tests out"
        top.error(f"--save: RESULTS.md is made from tested results, and {why}; write elsewhere with --json")
    if given.busy and (given.device == "cuda" or base or torch.get_num_threads() > 1):
        threads = f"{torch.get_num_threads()} threads on {given.device}{', --base' if base else ''}"
        top.error(f"--busy: expected one thread on a CPU, without --base, got {threads}; set OMP_NUM_THREADS=1")
    try:
        own = bench.options(given)
    except ValueError as error:
        top.error(str(error))
    device = torch.device(given.device)
    return Options(
        device=device,
        seconds=given.seconds,
        rounds=1 if given.dry_run else given.rounds,
        memory=not (given.no_memory or given.dry_run),
        tests="" if no_tests or given.dry_run else CATALOG[op].tests,
        json_path=given.json or (documents.result_path(op, device) if given.save else None),
        small=given.dry_run,
        busy=given.busy,
        about={"base": base} if base else {"clock": "process"} if given.busy else {},
        **own,
    ), given


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    op = parser().parse_args(words[:1]).op
    bench = load(op)
    chosen, given = options(op, bench, words[1:])
    if "base" in chosen.about:
        bench = Comparison(bench, given.base)
    document = run(bench, chosen)
    if document["tests"] is not None:
        print(f"\ntests: {document['tests']['status']}: {document['tests']['summary']}")
    status = documents.exit_status(document)
    if status == 1:
        print("refused: what is wrong, or disagrees, shows no speed", file=sys.stderr)
    documents.print_json(document)
    if given.plot is not None and any(problem["status"] == "ok" for problem in document["problems"]):
        from benchmarks.report.plots import plot

        plot(document, given.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
