"""A result as JSON: how it is made, written, checked and read by its exit status; RESULTS.md is made from these."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.measure import Summary

SCHEMA = 1
INTERRUPTED = 130
RESULTS = machine.ROOT / "benchmarks" / "results"
# What a row has from its seconds.
TIMES = ("median_s", "low_s", "high_s", "samples", "tflops", "gbps", "times_ours", "times_ours_low", "times_ours_high")
TIMES += ("times_limit", "tokens_per_s", "speedup", "step")


def new(op: str, device: torch.device, **more: Any) -> dict[str, Any]:
    """Without problems yet; ``more`` is added, or stands in place of what is here (commit, tests)."""
    return {
        "schema": SCHEMA,
        "op": op,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": machine.commit(),
        "environment": machine.environment(device),
        "tests": None,
        "limits": {},
        "problems": [],
        **more,
    }


def add_errors(row: dict[str, Any], errors: dict[str, float], metrics: dict[str, str], bounds: dict[str, float]) -> str:
    """Fills a row with {output: error}; what is not finite is None. Returns what is beyond its bound, or ""."""
    row["errors"] = {
        name: {"metric": metrics[name], "value": value if math.isfinite(value) else None}
        for name, value in errors.items()
    }
    bad = [name for name, value in errors.items() if not value <= bounds[name]]  # NaN is bad
    return ", ".join(f"{name} {errors[name]:.2e} > {bounds[name]:.0e}" for name in bad)


def add_times(
    row: dict[str, Any],
    values: list[float],
    *,
    flops: float | None = None,
    bytes: float | None = None,
    ours: list[float] | None = None,
) -> None:
    """Fills a row from its seconds, round by round. ``flops``, ``bytes``: of one call. ``ours``: seconds of ours in the
    same rounds; ratios are taken within a round, as what slows a whole round down cancels. A row may be filled anew
    after every round."""
    summary = Summary.of(values)
    row.update(median_s=summary.median, low_s=summary.low, high_s=summary.high, samples=summary.samples)
    if flops is not None:
        row["tflops"] = flops / summary.median / 1e12
    if bytes is not None:
        row["gbps"] = bytes / summary.median / 1e9
    if ours is not None:
        ratio = Summary.of([theirs / mine for theirs, mine in zip(values, ours)])
        row.update(times_ours=ratio.median, times_ours_low=ratio.low, times_ours_high=ratio.high)


def clear_times(rows: Sequence[dict[str, Any]], failed: dict[str, str]) -> None:
    """Rows of {name: reason} lose their times, and all lose what they were relative to others."""
    for row in rows:
        if row["name"] in failed:
            row.update(status="failed", reason=failed[row["name"]])
        for key in TIMES:
            row.pop(key, None)


def file_end(commit: str, name: str) -> str:
    return f"{commit.replace('+', '-dirty')}-{name}.json"


def result_path(op: str, device: torch.device) -> Path:
    """Where ``--save`` writes: results/<device>/<date>-<commit>-<op>.json."""
    stamp = time.strftime("%Y%m%d-%H%M", time.gmtime())
    return RESULTS / machine.slug(machine.device_name(device)) / f"{stamp}-{file_end(machine.commit(), op)}"


def save(document: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def print_json(document: dict[str, Any]) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps(document, separators=(",", ":")), flush=True)


def exit_status(document: dict[str, Any]) -> int:
    """1: refused; 130: interrupted, as Ctrl-C ends a command."""
    tests = document["tests"]
    refused = any(problem["status"] == "refused" for problem in document["problems"])
    if refused or (tests is not None and tests["status"] != "passed"):
        return 1
    return 0 if document.get("complete", True) else INTERRUPTED


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError where a document is not one of this schema."""
    _require(document, ("schema", "op", "date", "commit", "environment", "limits", "problems"), "")
    if document["schema"] != SCHEMA:
        raise ValueError(f"result: schema {document['schema']}, expected {SCHEMA}")
    for problem in document["problems"]:
        where = f"problem {problem.get('name')}: "
        _require(problem, ("name", "title", "shape", "flops", "bytes", "status", "rows"), where)
        for row in problem["rows"]:
            timed = "median_s" in row
            if not {"name", "role", "status"} <= set(row) or (timed and row["status"] != "ok"):
                raise ValueError(f"result: {where}bad row {row}")
            if timed and problem["status"] != "ok":
                raise ValueError(f"result: problem {problem['name']} is {problem['status']} but shows a speed")


def _require(values: dict[str, Any], keys: Sequence[str], where: str) -> None:
    missing = sorted(set(keys) - set(values))
    if missing:
        raise ValueError(f"result: {where}keys missing: {missing}")
