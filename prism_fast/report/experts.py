"""Plots of how the discriminator's experts share the tokens, by kind of token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prism_fast.report.data import RUNNING, Run, finite
from prism_fast.report.draw import CYCLE, WIDTH, curve, finish, label_of, panels

STAGES = ("warmup", "align")
MAX_LAYERS = 6  # rows of the heat map; of a deeper model, layers at equal distances are shown
MAX_LABELS = 100  # percentages of one panel; more cannot be read
SHARE = 0.1  # of a stage's steps: what "first" and "last" average over


def shown_layers(layers: Sequence[int]) -> list[int]:
    """At most MAX_LAYERS of ``layers``, the first and the last among them."""
    ordered = sorted(set(layers))
    places = np.linspace(0, len(ordered) - 1, min(MAX_LAYERS, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def expert_heat_map(run: Run) -> Figure | None:
    """Share of every kind's slots by expert and layer, in the first and the last steps of warm-up and alignment."""
    keys = run.experts
    stages = [stage for stage in STAGES if stage in keys]
    if not stages:
        return None
    every = [key for stage in stages for key in keys[stage]]
    layers, kinds = shown_layers([key[0] for key in every]), list(dict.fromkeys(key[1] for key in every))
    experts = max(key[2] for key in every) + 1
    rows = [(layer, kind) for layer in layers for kind in kinds]
    grids = {
        (stage, late): _grid(run.metrics[stage], keys[stage], rows, experts, late)
        for stage in stages
        for late in (False, True)
    }
    top = max(np.nanmax(grid, initial=0.0) for grid in grids.values())
    figure, axes = panels(len(grids), 1.0 + 0.2 * len(rows), sharey=True)
    for axis, ((stage, late), grid) in zip(axes[0], grids.items()):
        picture = axis.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=max(top, 1e-9), interpolation="nearest")
        axis.grid(False)
        axis.set_title(f"{RUNNING[stage]}, {'last' if late else 'first'} steps")
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, experts, math.ceil(experts / 8)))
        for boundary in range(1, len(layers)):
            axis.axhline(boundary * len(kinds) - 0.5, color="white", linewidth=3)
        if grid.size <= MAX_LABELS:
            for (row, column), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    colour = "white" if value > 0.6 * top else "#222222"
                    label = axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour)
                    label.set_in_layout(False)  # it lies inside, and measuring them all takes seconds
    axes[0, 0].set_yticks(range(len(rows)), [f"layer {layer}  {label_of(kind)}" for layer, kind in rows])
    bar = figure.colorbar(picture, ax=axes[0, -1], fraction=0.08, format=lambda value, _: f"{value:.0%}")
    bar.set_label("share of the kind's slots")
    bar.outline.set_visible(False)
    return figure


def expert_curves(run: Run) -> Figure | None:
    """Share of every kind's slots by expert over the steps, mean over the layers."""
    keys = {stage: _whole_layers(stage, found) for stage, found in run.experts.items()}
    stages = [stage for stage in STAGES if keys.get(stage)]
    if not stages:
        return None
    kinds = list(dict.fromkeys(kind for stage in stages for _, kind, _ in keys[stage]))
    experts = sorted({expert for stage in stages for _, _, expert in keys[stage]})
    top = 0.0
    figure, axes = panels(len(kinds), 0.5 + 1.75 * len(stages), rows=len(stages), sharey=True, sharex="row")
    for index, stage in enumerate(stages):
        for axis, kind in zip(axes[index], kinds):
            for expert in experts:
                names = [name for (_, k, e), name in keys[stage].items() if (k, e) == (kind, expert)]
                mean = _mean_over_layers(run.metrics[stage], names)
                curve(axis, mean, "share", color=CYCLE[expert % len(CYCLE)], label=f"expert {expert}")
            title = label_of(kind) if not index else ""
            finish(axis, title, f"{RUNNING[stage]}: share" if kind == kinds[0] else "", share=True, legend=False)
            axis.set_xlabel("step" if stage == stages[-1] else "")
            axis.title.set_fontsize(8.5)
            if axis.has_data():
                top = max(top, float(axis.dataLim.y1))
                axis.axhline(1 / len(experts), color="#888888", linestyle=":", linewidth=1)
                axis.xaxis.get_major_locator().set_params(nbins=3)
    axes[0, 0].set_ylim(0, max(1.1 * top, 1 / len(experts)))
    handles, labels = next(axis for axis in axes.flat if axis.has_data()).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), int(WIDTH)))
    return figure


def expert_split(run: Run) -> Figure | None:
    """How far apart experts keep perception from reasoning, and student from teacher: mean and range over the layers.

    Half the sum over experts of the difference of two kinds' shares: 0 where both go to the same experts alike, 1 where
    none is shared. Which expert takes which is another in every layer, so a mean over layers of one expert's share
    would hide it.
    """
    stages = [stage for stage in STAGES if stage in run.experts]
    keys = {stage: _whole_layers(stage, run.experts[stage]) for stage in stages}
    lines = {stage: _splits(run.metrics[stage], keys[stage]) if keys[stage] else [] for stage in stages}
    if not any(lines.values()):
        return None
    figure, axes = panels(len(stages), 2.8, sharey=True)
    for axis, stage in zip(axes[0], stages):
        for i, label in enumerate(SPLITS):
            values = [(line["step"], line[label]) for line in lines[stage] if label in line]
            if values:
                steps, layers = zip(*values)
                low, high = np.min(layers, axis=1), np.max(layers, axis=1)
                axis.fill_between(steps, low, high, color=CYCLE[i], alpha=0.12, linewidth=0)
                mean = [{"step": step, "mean": float(np.mean(shares))} for step, shares in values]
                curve(axis, mean, "mean", color=CYCLE[i], label=label)
        finish(axis, RUNNING[stage], "share of slots apart" if stage == stages[0] else "", share=True)
    return figure


def _whole_layers(stage: str, keys: Mapping[tuple[int, str, int], str]) -> Mapping[tuple[int, str, int], str]:
    """Without alignment's last layer, which is computed at read-out rows alone: another population of tokens."""
    last = max(layer for layer, _, _ in keys)
    if stage != "align" or last == 0:
        return keys
    return {key: name for key, name in keys.items() if key[0] != last}


SPLITS = {
    "perception | reasoning": (("student_caption", "teacher_caption"), ("student_reasoning", "teacher_reasoning")),
    "student | teacher": (("student_caption", "student_reasoning"), ("teacher_caption", "teacher_reasoning")),
}


def _splits(lines: Sequence[Mapping[str, Any]], keys: Mapping[tuple[int, str, int], str]) -> list[dict[str, Any]]:
    """[{"step", split: one value per layer}] of the steps that have all four kinds."""
    layers = sorted({layer for layer, _, _ in keys})
    experts = sorted({expert for _, _, expert in keys})
    found = []
    for line in lines:
        entry: dict[str, Any] = {"step": line["step"]}
        for label, sides in SPLITS.items():
            kinds = [kind for side in sides for kind in side]
            names = [[[keys.get((layer, k, e)) for e in experts] for k in kinds] for layer in layers]
            if all(name and finite(line.get(name)) is not None for layer in names for kind in layer for name in kind):
                shares = np.array([[[line[name] for name in kind] for kind in layer] for layer in names])
                one, other = shares[:, :2].mean(1), shares[:, 2:].mean(1)
                entry[label] = (np.abs(one - other).sum(1) / 2).tolist()
        if len(entry) > 1:
            found.append(entry)
    return found


def _grid(
    lines: Sequence[Mapping[str, Any]],
    keys: Mapping[tuple[int, str, int], str],
    rows: Sequence[tuple[int, str]],
    experts: int,
    late: bool,
) -> np.ndarray:
    """(rows, experts): means over the first or last tenth of the measured steps; NaN where nothing was measured."""
    measured = [line for line in lines if any(name in line for name in keys.values())]
    count = max(1, round(SHARE * len(measured)))
    part = measured[-count:] if late else measured[:count]
    grid = np.full((len(rows), experts), np.nan)
    for row, (layer, kind) in enumerate(rows):
        for expert in range(experts):
            name = keys.get((layer, kind, expert))
            values = [value for line in part if name and (value := finite(line.get(name))) is not None]
            if values:
                grid[row, expert] = np.mean(values)
    return grid


def _mean_over_layers(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, float]]:
    found = []
    for line in lines:
        values = [value for name in names if (value := finite(line.get(name))) is not None]
        if values:
            found.append({"step": line["step"], "share": sum(values) / len(values)})
    return found
