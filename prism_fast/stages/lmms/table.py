"""The figures of policies on benchmarks, beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_fast.files import replacing
from prism_fast.stages.lmms.benchmarks import BENCHMARKS, TABLE_1, Benchmark
from prism_fast.stages.lmms.launch import Found

SOURCE = "arXiv 2604.28123, Table 1"


def table(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): the paper's benchmarks in percent, other tasks' first figure as lmms-eval gives it, the share of
    responses without an answer; then the paper's rows, where one of its benchmarks was asked for."""
    asked = {task for each in found for task in each.tasks}
    columns = [benchmark for benchmark in BENCHMARKS if benchmark.task in asked]
    others = [task for task in dict.fromkeys(task for each in found for task in each.tasks) if task not in _names()]
    average = len(columns) == len(BENCHMARKS)
    heads = ["policy", *(c.name for c in columns), *(["average"] if average else []), *others, "without an answer"]
    rows = []
    for each in found:
        figures = [percent(column, each.tasks[column.task]) for column in columns]
        known = [figure for figure in figures if figure is not None]
        mean = [_shown(sum(known) / len(known) if len(known) == len(figures) else None)] if average else []
        rest = [first_figure(task, each.tasks[task]) for task in others]
        rows.append([each.policy, *map(_shown, figures), *mean, *rest, _without(each.tasks.values())])
    if columns:
        picked = [BENCHMARKS.index(column) for column in columns]
        for (size, method), figures in TABLE_1.items():
            mean = [f"{figures[-1]:.1f}"] if average else []
            paper = [f"{figures[i]:.1f}" for i in picked]
            rows.append([f"{SOURCE}: {size} {method}", *paper, *mean, *("" for _ in others), ""])
    return heads, rows


def write_table(path: Path, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    text = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def percent(benchmark: Benchmark, result: dict[str, Any]) -> float | None:
    """The mean of a benchmark's parts in percent; None where lmms-eval gave no number for one of them."""
    values = [_metric(result["results"].get(part, {}), benchmark.metric) for part in benchmark.parts]
    if any(value is None for value in values):
        return None
    return sum(value for value in values if value is not None) / len(values) * (1 if benchmark.percent else 100)


def first_figure(task: str, result: dict[str, Any]) -> str:
    """ "metric 0.61" of a task, or of the first of a group."""
    for part in (task, *result["results"]):
        for name, value in _figures(result["results"].get(part, {})):
            return f"{name} {value:.4g}"
    return "no number"


def _figures(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """lmms-eval names them "metric,filter", and says their errors as "metric_stderr,filter"."""
    for key, value in metrics.items():
        name, comma, _ = key.partition(",")
        if comma and not name.endswith(("_stderr", "_stderr_clt")) and isinstance(value, (int, float)):
            yield name, float(value)


def _metric(metrics: dict[str, Any], name: str) -> float | None:
    return dict(_figures(metrics)).get(name)


def _names() -> set[str]:
    return {benchmark.task for benchmark in BENCHMARKS}


def _without(results: Any) -> str:
    counts = [result["answers"] for result in results]
    total = sum(count["responses"] for count in counts)
    return f"{sum(count['without'] for count in counts) / total:.1%}" if total else ""


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.1f}"
