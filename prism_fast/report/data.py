"""What report.html is made of: the files that a run has left, all of them optional."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_fast.metric_names import EVAL, SIDES, expert_of
from prism_fast.records import DataError
from prism_fast.run.monitor import FILE_NAME, read_metrics
from prism_fast.run.record import FILE_NAME as RECORD

TRAINED = ("sft", "drift", "warmup", "align", "rlvr", "direct")  # stages that leave metrics
JUDGED = ("base", "sft", "drift", "align", "rlvr", "direct")  # stages that leave a policy to evaluate
DEMOS = ("drift", "direct")  # which only the demo has: SFT that makes its policy drift, and RLVR without alignment
LABEL = {
    "teacher": "Teacher",
    "base": "Base",
    "sft": "SFT",
    "warmup": "Warm-up",
    "drift": "Drifted",
    "align": "Aligned",
    "rlvr": "RLVR (final)",
    "direct": "RLVR alone",
}
# Of a comparison (prism_fast/demo/compare.py).
ARM = {
    "base": "base",
    "drifted": "after the drift",
    "direct_short": "(a) RLVR",
    "direct_long": "(a) RLVR, as many updates",
    "prism": "(c) PRISM",
    "prism_hard": "(c+) PRISM, hard negatives",
    "control": "(b) SFT on the teacher's texts",
}
RUNNING = {
    "sft": "SFT", "drift": "Drift", "warmup": "Warm-up", "align": "Alignment", "rlvr": "RLVR", "direct": "RLVR alone",
}  # while it trains  # fmt: skip


_FROM = {
    "sft": ("base",),
    "drift": ("sft", "base"),
    "align": ("drift", "sft", "base"),
    "rlvr": ("align", "drift", "sft", "base"),
    "direct": ("drift", "sft", "base"),
}

LARGEST = 1e100  # of a figure; sums and squares of larger ones overflow


@dataclass(frozen=True)
class Run:
    """Everything known of a run. What is not there is empty, and named in ``missing``."""

    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)  # by stage, sorted by step
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by teacher, base, sft, align, rlvr
    # by stage: the metric that holds the load of a (layer, kind, expert)
    experts: Mapping[str, Mapping[tuple[int, str, int], str]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by stage, of its run.json
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by name of the file, of probes/
    finished: frozenset[str] = frozenset()  # stages that have left final/
    missing: tuple[str, ...] = ()  # files, relative to the run's folder


def load_run(out: Path) -> Run:
    """Reads what is in ``out``: a folder of stages by their names, or one stage's own.

    Raises DataError, with file and place, for a file that is there and damaged.
    """
    missing: list[str] = []
    single = _object(out / RECORD).get("stage") if (out / RECORD).is_file() else None
    folders = {stage: "." if stage == single else stage for stage in TRAINED}

    def wanted(name: str) -> Path | None:
        path = out / name
        if not path.is_file():
            missing.extend([] if path.parent.name in DEMOS or path.stem in DEMOS else [name])
            return None
        return path

    summary_path = wanted("summary.json")
    summary = _object(summary_path) if summary_path else {}
    metrics = {
        stage: _sorted(read_metrics(path))
        for stage, folder in folders.items()
        if (path := wanted(f"{folder}/{FILE_NAME}")) is not None
    }
    evaluations = {
        name: _object(path) for name in ("teacher", *JUDGED) if (path := wanted(f"evaluations/{name}.json")) is not None
    }
    experts = {stage: keys for stage, lines in metrics.items() if (keys := expert_keys(lines))}
    records = {stage: _object(path) for stage in TRAINED if (path := out / folders[stage] / RECORD).is_file()}
    settings = {stage: entries(record, "config") for stage, record in records.items()}
    probes = {path.stem: _object(path) for path in sorted((out / "probes").glob("*.json"), key=_age)}
    finished = frozenset(stage for stage in TRAINED if (out / folders[stage] / "final").is_dir())
    return Run(summary, metrics, evaluations, experts, settings, probes, finished, tuple(missing))


def stage_figures(run: Run, stage: str) -> dict[str, float]:
    """The finite figures of one stage in summary.json; what was measured on held-out data also from its evaluation, and
    from the last one that its metrics.jsonl holds."""
    figures = finite_of(entries(entries(run.summary, "stages"), stage))
    for name in ("accuracy", "format_valid", *(f"pair_accuracy_{side}" for side in SIDES)):
        during = series(run.metrics.get(stage, ()), f"{EVAL}{name}")[1]
        known = [*numbers([run.evaluations.get(stage, {}).get(name)]), *during[-1:]]
        if known:
            figures.setdefault(name, known[0])
    return figures


def started_from(run: Run, stage: str) -> tuple[str | None, bool]:
    """The policy of ``run`` that a stage began with, and whether it is the one that should stand before it."""
    present = [name for name in _FROM[stage] if name in run.metrics or stage_figures(run, name)]
    expected = [name for name in _FROM[stage] if name not in DEMOS or name in present]
    return (present[0], present[0] == expected[0]) if present else (None, False)


def entries(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """``source[name]`` where it is an object, else an empty one."""
    value = source.get(name)
    return value if isinstance(value, Mapping) else {}


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is absent, not a number, not finite, or too large to draw."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value)


def finite_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an object."""
    return {name: number for name, value in line.items() if (number := finite(value)) is not None}


def numbers(values: Any) -> list[float]:
    """The finite numbers of a list, or an empty list where there is none."""
    found = values if isinstance(values, list) else []
    return [number for value in found if (number := finite(value)) is not None]


def series(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, where it was measured and finite."""
    points = [(finite(line.get("step")), finite(line.get(name))) for line in lines if name in line]
    kept = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def expert_keys(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str, int], str]:
    """Metric name of every (layer, kind, expert) of which a load was recorded."""
    found: dict[tuple[int, str, int], str] = {}
    seen: set[str] = set()
    for line in lines:
        if line.keys() <= seen:  # nearly always: a stage repeats its names
            continue
        for name in line:
            expert = expert_of(name)
            if expert is None:
                seen.add(name)
            elif finite(line[name]) is not None:
                seen.add(name)
                found[expert] = name
    return found


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            rows += flatten(entry, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry)))
    return rows


def visible(text: str) -> str:
    """``text`` with what cannot be printed (control and direction marks, lone surrogates) as replacement characters."""
    if text.isprintable():  # nearly always, and quick for a figure's megabyte
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else "\ufffd" for c in text)


def _sorted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step; where a step was done twice, its later figures."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        said = str(line["warning"]) if "warning" in line else None
        found[line["step"], said, any(name.startswith(EVAL) for name in line)] = line
    return sorted(found.values(), key=lambda line: line["step"])


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, path.name


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: does not hold readable JSON ({reason}); write it again or remove it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}; write it again or remove it")
    return value
