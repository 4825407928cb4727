"""How every plot of report.html is drawn: colours, panels, curves, axes.

Figures are drawn without pyplot, so no display and no global state is needed, and become SVG data URIs. Stages keep
their colour throughout (the Okabe-Ito set, which colour-blind readers can tell apart); perception and reasoning have
two of their own; a student is drawn solid, the teacher dashed.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from scipy.stats import binomtest

from prism_fast.report.data import Run, series, visible

COLOUR = {
    "teacher": "#333333",
    "base": "#8c8c8c",
    "sft": "#e69f00",
    "warmup": "#cc79a7",
    "align": "#0072b2",
    "rlvr": "#009e73",
    "drift": "#56b4e9",
    "direct": "#661100",
}
SIDE = {"perception": "#332288", "reasoning": "#d55e00"}
# Parts of a step and experts: Paul Tol's muted set, so that no part looks like a stage.
CYCLE = ("#88ccee", "#332288", "#ddcc77", "#117733", "#cc6677", "#882255", "#44aa99", "#999933", "#aa4499")
WIDTH = 10.5  # inches; about 1100 pixels on the page
MAX_POINTS = 400  # of a curve; more are averaged in bins
MAX_NAME = 24  # characters of a name from the data
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "prism",  # equal figures give equal files
}


def render(plot: Callable[[Run], Figure | None], run: Run) -> str | None:
    """The figure that ``plot`` draws, as an SVG data URI, or None where it has nothing to draw."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = plot(run)
        if figure is None:
            return None
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def panels(columns: int, height: float, *, rows: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of the page's width with ``rows`` x ``columns`` axes."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def curve(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, *, smooth: bool = True, **style: Any) -> bool:
    """Draws one metric over the steps, thin as measured and thick as a running mean; False where it is absent."""
    steps, values = (np.asarray(part, dtype=float) for part in series(lines, name))
    if not len(steps):
        return False
    if len(steps) > MAX_POINTS:
        edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
        counts = np.diff(np.append(edges, len(steps)))
        steps, values = np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts
    window = max(1, len(values) // 15)
    if not smooth or window == 1:
        axes.plot(steps, values, marker="o" if len(steps) < 25 else None, markersize=3.5, **style)
        return True
    faint = {**style, "label": None, "linewidth": 0.7, "alpha": 0.35}
    axes.plot(steps, values, **faint)
    sums = np.convolve(np.pad(values, window // 2, mode="edge"), np.ones(window), mode="valid")[: len(values)]
    axes.plot(steps, sums / window, **style)
    return True


def finish(axes: Axes, title: str, unit: str, *, share: bool = False, legend: bool = True, x: str = "step") -> None:
    """Title, labels and legend of one panel; a panel without data says so."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(unit)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#888888")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if x == "step":
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    if share:
        low, high = axes.dataLim.intervaly  # an accuracy of the user's own function may be any number
        axes.set_ylim(min(-0.02, 1.03 * low), max(1.03, 1.03 * high))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def label_of(text: str) -> str:
    """A name from the data as a label: printable, short, no mathematics between dollar signs."""
    shown = visible(text).replace("_", " ").replace("\n", " ")
    return (shown if len(shown) <= MAX_NAME else f"{shown[: MAX_NAME - 1]}…").replace("$", r"\$")


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` independent trials (Wilson 1927)."""
    interval = binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def decades(axes: Axes) -> None:
    """A logarithmic axis that spans whole decades, with labels at these alone."""
    low, high = axes.dataLim.minposy, axes.dataLim.y1  # a gap of exactly 0 has no place on it
    axes.set_yscale("log")
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9))
    axes.yaxis.set_minor_formatter(NullFormatter())
