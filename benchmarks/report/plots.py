"""A result as a PNG: time and peak memory over T (or the first size that varies), roofline; of a step, the waterfall.

Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.harness import table

pyplot.switch_backend("Agg")
SIZES = ("T", "B", "V", "E", "skew", "trees")


def plot(document: dict[str, Any], path: Path) -> None:
    """Raises ValueError where nothing was timed."""
    problems = [problem for problem in document["problems"] if problem["status"] == "ok"]
    if not problems:
        raise ValueError("plot: the result holds no timed problem")
    draw = _waterfall if "sizes" in problems[0] else _sweep
    figure = draw(problems, document)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _sweep(problems: list[dict[str, Any]], document: dict[str, Any]):
    """Three panels a problem: time, memory, roofline."""
    named: dict[str, list[dict[str, Any]]] = {}
    for problem in problems:
        named.setdefault(problem["name"], []).append(problem)
    figure, axes = pyplot.subplots(len(named), 3, figsize=(16, 4.5 * len(named)), squeeze=False)
    for line, (name, results) in zip(axes, named.items()):
        size = _varying(results)
        _lines(line[0], results, size, "median_s", 1e3, "time, ms")
        _lines(line[1], results, size, "peak_bytes", 1e-9, "peak memory over inputs, GB")
        _roofline(line[2], results, document["limits"])
        line[0].set_title(results[0]["title"])
        line[1].set_title(f"{document['environment']['device']}, {document['commit']}")
        line[2].set_title(f"roofline: {name}")
    return figure


def _varying(results: list[dict[str, Any]]) -> str:
    present = [size for size in SIZES if size in results[0]["shape"]]
    return next((s for s in present if len({r["shape"][s] for r in results}) > 1), present[0])


def _lines(axis, results: list[dict], size: str, key: str, scale: float, label: str) -> None:
    band = key == "median_s"
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for result in results:
        others = {k: v for k, v in result["shape"].items() if k != size}
        if others != {k: v for k, v in results[0]["shape"].items() if k != size}:
            continue  # a sweep over something else
        for row in result["rows"]:
            if key in row:
                low, high = (row["low_s"], row["high_s"]) if band else (row[key], row[key])
                point = (result["shape"][size], row[key] * scale, low * scale, high * scale)
                series.setdefault(row["name"], []).append(point)
    for name, points in series.items():
        x, middle, low, high = zip(*sorted(points))
        axis.plot(x, middle, marker="o", label=name, linewidth=2.5 if name.startswith("prism") else 1.2)
        if band:
            axis.fill_between(x, low, high, alpha=0.15)
    positive = all(r["shape"][size] > 0 for r in results)
    axis.set(xlabel=size, ylabel=label, xscale="log" if positive else "linear", yscale="log")
    if series:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _roofline(axis, results: list[dict], limits: dict[str, dict[str, float]]) -> None:
    intensities, last = [], results[-1]
    for row in last["rows"]:
        if "tflops" in row:
            intensity = last["flops"] / last["bytes"]
            intensities.append(intensity)
            axis.plot([intensity], [row["tflops"]], "o", label=row["name"])
    limit = limits.get(str(last["shape"].get("dtype", "fp32")))
    if limit and intensities:
        ridge = limit["matmul_tflops"] * 1e3 / limit["copy_gbps"]
        x = sorted([min(intensities) / 10, ridge, max(intensities) * 10])
        roof = [min(limit["matmul_tflops"], value * limit["copy_gbps"] / 1e3) for value in x]
        axis.plot(x, roof, "k-", label="measured limits")
    axis.set(xlabel="FLOP per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.legend(fontsize=7)


def _waterfall(problems: list[dict[str, Any]], document: dict[str, Any]):
    """The ways of a whole step as bars; each names its speed-up over the first and over the one before."""
    most = max(len(problem["rows"]) for problem in problems)
    figure, axes = pyplot.subplots(len(problems), 1, figsize=(11, (1.6 + 0.55 * most) * len(problems)), squeeze=False)
    for axis, problem in zip(axes[:, 0], problems):
        rows = [row for row in problem["rows"] if "median_s" in row]
        names = [row["name"] for row in rows]
        times = [row["median_s"] for row in rows]
        spread = [[t - row["low_s"] for t, row in zip(times, rows)], [row["high_s"] - t for t, row in zip(times, rows)]]
        colors = ["tab:green" if row["role"] == "ours" else "tab:blue" for row in rows]
        axis.barh(names, times, xerr=spread, color=colors, error_kw={"linewidth": 1})
        for i, row in enumerate(rows):
            text = f" {table.seconds(row['median_s'])}, {row['flops'] / 1e12:.3g} TFLOP"
            if "speedup" in row:
                text += f": {row['speedup']:.1f}x in all"
            if "step" in row:
                text += f", {row['step']:.2f}x by this"
            axis.text(row["high_s"], i, text, va="center", fontsize=9)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1.6 * max(times)), xlabel="seconds a step")
        axis.set_title(f"{problem['title']}\n{document['environment']['device']}, {document['commit']}", fontsize=10)
    return figure
