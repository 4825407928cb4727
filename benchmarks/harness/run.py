"""How any benchmark runs: its tests first, the machine's limits, then result after result into one document."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness import document as documents
from benchmarks.harness import machine, measure, processes, table

TESTS_CACHE = machine.ROOT / ".pytest_cache" / "benchmarks.json"


@dataclass(frozen=True)
class Options:
    device: torch.device
    shapes: Sequence[Any] = ()
    only: Sequence[str] = ()  # problems by name; empty: all
    peers: Sequence[str] | None = None  # parts of peers' names; None: all, empty: none
    seconds: float = 10.0  # timing of one problem
    rounds: int | None = None
    memory: bool = True
    busy: bool = False  # CPU seconds of the process, on a machine that others use
    tests: str = ""  # the folder of the op's tests; "": not run
    json_path: Path | None = None
    small: bool = False  # toy limits, for a dry run
    about: dict[str, Any] = field(default_factory=dict)  # more that the document holds
    # Of whole steps.
    dtype: torch.dtype = torch.float32
    experts: str = "fastest"
    recompute: bool | None = None


class Benchmark(Protocol):
    op: str

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        """{name: dtype} whose limits are measured."""

    def results(self, options: Options, keep: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
        """Problem after problem; ``keep(result)`` writes what there is of one that goes on."""


def run(bench: Benchmark, options: Options) -> dict[str, Any]:
    """All of a benchmark: the document, printed and written as it grows. What is refused carries no times.

    Interrupted: what was measured by then, of the problem that was running too, "complete" false.
    """
    tests = run_tests(options.tests) if options.tests else None
    document = documents.new(bench.op, options.device, tests=tests, **options.about, complete=False)

    def keep(result: dict[str, Any]) -> None:
        if not any(result is known for known in document["problems"]):
            document["problems"].append(result)
        documents.save(document, options.json_path)  # as it comes: a later crash loses nothing

    if documents.exit_status(document) != 1:
        for name, dtype in bench.dtypes(options).items():
            limits = measure.limits(dtype, measure.Timer(options.device, options.busy), small=options.small)
            document["limits"][name] = limits
        measure.free(options.device)
        try:
            for result in bench.results(options, keep):
                keep(result)
                print("\n".join(table.lines(result, document["limits"])), flush=True)
        except KeyboardInterrupt:
            measure.say("interrupted: what was measured by then is kept")
            return document
    document["complete"] = True  # else cut off: the problems that are there are whole, others are missing
    documents.save(document, options.json_path)
    return document


def run_tests(folder: str, cache: Path = TESTS_CACHE) -> dict[str, Any]:
    """The op's own tests, by pytest: {"status": "passed" | "failed" | "not run", "summary"}.

    What has passed is remembered in ``cache`` and not run again until a kernel, a test or torch changes.
    """
    if not (machine.ROOT / folder).exists():
        return {"status": "not run", "summary": f"{folder} does not exist"}
    key, passed = _tests_key(folder), json.loads(cache.read_text()) if cache.exists() else {}
    if key in passed:
        return {"status": "passed", "summary": f"{passed[key]} (as before: nothing changed)"}
    measure.say(f"tests first: {folder}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", folder]
    environment = processes.environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, env=environment)
    printed = (done.stdout + done.stderr).strip().splitlines()
    summary = printed[-1] if printed else "no output"
    if done.returncode == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({**passed, key: summary}))
    return {"status": "passed" if done.returncode == 0 else "failed", "summary": summary}


def _tests_key(folder: str) -> str:
    """What their outcome depends on: sources, these tests and what they share, versions, devices, switches."""
    chosen = sorted((name, value) for name, value in os.environ.items() if name.startswith(("PRISM_", "TRITON_")))
    packages = [machine.version(name) for name in ("torch", "triton", "numpy", "transformers")]
    digest = hashlib.sha256(f"{sys.version} {packages} {torch.cuda.is_available()} {chosen} {folder}".encode())
    shared = [path for path in (machine.ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    sources = [path for path in (machine.ROOT / "kernels").rglob("*") if path.suffix in (".py", ".so")]
    sources += [*(machine.ROOT / "prism_fast").rglob("*.py"), *(machine.ROOT / folder).rglob("*.py"), *shared]
    for path in sorted(set(sources)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
