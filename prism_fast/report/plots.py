"""The plots of report.html: one function per figure, None where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prism_fast import metric_names as names
from prism_fast.report.data import (
    ARM,
    JUDGED,
    LABEL,
    RUNNING,
    TRAINED,
    Run,
    entries,
    finite,
    numbers,
    series,
    stage_figures,
    started_from,
)
from prism_fast.report.draw import COLOUR, CYCLE, SIDE, curve, decades, finish, label_of, panels, wilson
from prism_fast.run.monitor import breakdown

MAX_LABELS = 70  # characters that fit below one panel in a line


def accuracy_by_stage(run: Run) -> Figure | None:
    """Held-out accuracy of every stage's policy, in all and by question type."""
    accuracy = {stage: stage_figures(run, stage).get("accuracy") for stage in JUDGED}
    known = [stage for stage in JUDGED if accuracy[stage] is not None]
    if not known:
        return None
    by_type = {stage: _types(run, stage) for stage in known}
    types = list(dict.fromkeys(name for stage in known for name in by_type[stage]))
    figure, axes = panels(2, 3.3, width_ratios=(1, max(1.0, min(2.2, 0.55 * len(types)))))
    left, right = axes[0]
    for place, stage in enumerate(known):
        count = sum(int(finite(entry.get("count")) or 0) for entry in by_type[stage].values())
        _bar(left, place, 0.68, accuracy[stage], count, COLOUR[stage], label=None, value=True)
    teacher = finite(run.evaluations.get("teacher", {}).get("accuracy"))
    if teacher is not None:
        left.axhline(teacher, color=COLOUR["teacher"], linestyle="--", linewidth=1.2, label="teacher")
    finish(left, "All questions", "accuracy", share=True, x="")
    left.set_xticks(range(len(known)), [LABEL[stage].replace(" (final)", "") for stage in known])
    width = 0.8 / len(known)
    for offset, stage in enumerate(known):
        label = LABEL[stage]
        for place, name in enumerate(types):
            entry = by_type[stage].get(name, {})
            value, count = finite(entry.get("accuracy")), int(finite(entry.get("count")) or 0)
            where = place + (offset - (len(known) - 1) / 2) * width
            _bar(right, where, width * 0.92, value, count, COLOUR[stage], label=label)
            label = label if value is None else None  # once in the legend
    finish(right, "By question type", "accuracy", share=True, legend=False, x="")
    if types:
        labels = [label_of(kind) for kind in types]
        slanted = {"rotation": 25, "ha": "right"} if len("".join(labels)) > MAX_LABELS else {}
        right.set_xticks(range(len(types)), labels, **slanted)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="lower left", bbox_to_anchor=(0.3, 1.0), ncols=len(known), borderaxespad=0.2)
    for panel in (left, right):
        panel.set_ylim(0, 1.12)
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    return figure


def _types(run: Run, stage: str) -> dict[str, Mapping[str, Any]]:
    kinds = entries(run.evaluations.get(stage, {}), "by_type")
    return {kind: entries(kinds, kind) for kind in kinds}


def _bar(
    axes: Axes, where: float, width: float, share: float | None, count: int, colour: str, *,
    label: str | None, value: bool = False,
) -> None:  # fmt: skip
    if share is None:
        return
    axes.bar(where, share, width, color=colour, label=label)
    top = share
    if 0 < count < 2**31 and 0 <= share <= 1:
        low, top = wilson(share, count)
        axes.vlines(where, low, top, color="#222222", linewidth=1)
    if value:
        axes.text(where, top + 0.02, f"{share:.1%}", ha="center", va="bottom", fontweight="bold")


def held_out_curves(run: Run) -> Figure | None:
    """Held-out accuracy and format validity while a stage trains."""
    stages = [s for s in JUDGED if series(run.metrics.get(s, ()), names.EVAL_ACCURACY)[0]]
    if not stages:
        return None
    figure, axes = panels(len(stages), 2.7, sharey=True)
    for axis, stage in zip(axes[0], stages):
        before = stage_figures(run, started_from(run, stage)[0] or "")
        held_out = ((names.EVAL_ACCURACY, "accuracy"), (names.EVAL_FORMAT_VALID, "format_valid"))
        first = {metric: before[name] for metric, name in held_out if name in before}
        sampled = {"color": COLOUR[stage], "alpha": 0.4, "linewidth": 1.0}
        if stage not in ("sft", "drift"):  # which sample no responses
            curve(axis, run.metrics[stage], names.ACCURACY, label="accuracy, in training", **sampled)
            curve(axis, run.metrics[stage], names.FORMAT_VALID, linestyle=":", **sampled)
        lines = [{"step": 0, **first}, *run.metrics[stage]]
        look = {"smooth": False, "color": COLOUR[stage]}
        curve(axis, lines, names.EVAL_ACCURACY, label="accuracy", **look)
        curve(axis, lines, names.EVAL_FORMAT_VALID, linestyle=":", label="format valid", **look)
        finish(
            axis, f"During {RUNNING[stage]}", "share of held-out responses" if axis is axes[0, 0] else "", share=True
        )
    return figure


def reward_and_format(run: Run) -> Figure | None:
    """Reward, accuracy and format validity of the sampled responses."""
    align, rlvr, direct = (run.metrics.get(stage, ()) for stage in ("align", "rlvr", "direct"))
    figure, axes = panels(2, 2.8)
    curve(axes[0, 0], align, names.FORMAT_VALID, color=COLOUR["align"], label="format valid")
    finish(axes[0, 0], "Alignment", "share of responses", share=True)
    if low := min(series(align, names.FORMAT_VALID)[1], default=0.0):
        axes[0, 0].set_ylim(math.floor(10 * low - 0.5) / 10, 1.01)
    for name, label, style in (
        (names.REWARD, "reward", "-"),
        (names.ACCURACY, "accuracy", "--"),
        (names.FORMAT_VALID, "format valid", ":"),
    ):
        curve(axes[0, 1], rlvr, name, color=COLOUR["rlvr"], linestyle=style, label=label)
    curve(axes[0, 1], direct, names.REWARD, color=COLOUR["direct"], label="reward, RLVR alone")
    finish(axes[0, 1], "RLVR", "reward, share of responses", share=True)
    low = min(series(rlvr, names.REWARD)[1], default=0.0)
    if low < -0.02:  # the overlong penalty can make a reward negative
        axes[0, 1].set_ylim(low - 0.05, 1.03)
    return _if_any(figure, axes)


def scores(run: Run) -> Figure | None:
    """The discriminator's scores of student and teacher, and how often it tells them apart."""
    align, warmup = run.metrics.get("align", ()), run.metrics.get("warmup", ())
    figure, axes = panels(4, 2.9)
    for axis, (side, colour) in zip(axes[0], SIDE.items()):
        curve(axis, align, names.STUDENT_SCORE[side], color=colour, label="student")
        curve(axis, align, names.TEACHER_SCORE[side], color=colour, linestyle="--", label="teacher")
        finish(axis, f"{side.capitalize()} score", "mean score (logit)")
    for axis, lines, told_apart, title in (
        (axes[0, 2], warmup, names.PAIR_ACCURACY, "Warm-up"),
        (axes[0, 3], align, names.DISCRIMINATOR_ACCURACY, "Alignment"),
    ):
        for side, colour in SIDE.items():
            curve(axis, lines, told_apart[side], color=colour, label=side)
            curve(axis, lines, names.EQUAL_PARTS[side], color=colour, linestyle=":", label=f"{side}: equal parts")
        finish(axis, f"{title}: told apart", "pairs ranked right", share=True)
        if axis.has_data():
            axis.axhline(0.5, color="#888888", linestyle=":", linewidth=1)
    return _if_any(figure, axes)


def losses(run: Run) -> Figure | None:
    """The losses of every stage."""
    shown = {
        **dict.fromkeys(("sft", "drift"), ((names.LOSS, "cross-entropy", "-"),)),
        "warmup": tuple((names.PAIR_LOSS[side], f"{side} pairs", colour) for side, colour in SIDE.items()),
        "align": ((names.LOSS, "policy", "-"), (names.DISCRIMINATOR_LOSS, "discriminator", "--")),
        **dict.fromkeys(("rlvr", "direct"), ((names.LOSS, "policy", "-"),)),
    }
    stages = [s for s in TRAINED if any(series(run.metrics.get(s, ()), name)[0] for name, _, _ in shown[s])]
    if not stages:
        return None
    figure, axes = panels(len(stages), 2.7)
    for axis, stage in zip(axes[0], stages):
        for name, label, look in shown[stage]:
            style = {"color": look} if look.startswith("#") else {"color": COLOUR[stage], "linestyle": look}
            curve(axis, run.metrics[stage], name, label=label, **style)
        unit = {"sft": "nats a token", "drift": "nats a token", "warmup": "nats a pair"}.get(stage, "loss")
        finish(axis, RUNNING[stage], unit)
    return figure


def lengths_and_entropy(run: Run) -> Figure | None:
    """Response length, entropy, gradient norm and the gap between sampler and trainer, RLVR after alignment."""
    figure, axes = panels(4, 2.7)
    end = max((line["step"] for line in run.metrics.get("align", ())), default=0)  # of alignment, on the axis of both
    for stage in ("align", "rlvr"):
        lines, label = run.metrics.get(stage, ()), {"align": "alignment", "rlvr": "RLVR"}[stage]
        if stage == "rlvr":
            lines = [{**line, "step": line["step"] + end} for line in lines]
        curve(axes[0, 0], lines, names.RESPONSE_LENGTH, color=COLOUR[stage], label=label)
        curve(axes[0, 1], lines, names.ENTROPY, color=COLOUR[stage], label=label)
        norm = names.GRAD_NORM if series(lines, names.GRAD_NORM)[0] else names.POLICY_GRAD_NORM
        curve(axes[0, 2], lines, norm, color=COLOUR[stage], label=label)
        for gap, name, style in ((names.SAMPLER_GAP_MEAN, "mean", "-"), (names.SAMPLER_GAP_MAX, "max", ":")):
            steps, values = series(lines, gap)
            if any(value > 0 for value in values):
                axes[0, 3].plot(steps, values, style, color=COLOUR[stage], label=f"{label}, {name}")
    for axis in axes[0]:
        if end and run.metrics.get("rlvr") and axis.has_data():
            axis.axvline(end, color="#888888", linestyle=":", linewidth=1)
    finish(axes[0, 0], "Response length", "tokens")
    finish(axes[0, 1], "Entropy", "nats a token")
    finish(axes[0, 2], "Policy gradient norm", "before clipping")
    finish(axes[0, 3], "Sampler against trainer", "|difference of log-prob|, nats", legend=False)
    if axes[0, 3].has_data():
        decades(axes[0, 3])
        axes[0, 3].legend(loc="best", fontsize=7.5)
    return _if_any(figure, axes)


def drift(run: Run) -> Figure | None:
    """Caption items and reasoning steps per held-out response, as distributions, each beside the teacher's."""
    kinds = {"caption_items": "caption items", "reasoning_steps": "reasoning steps"}
    known = [n for n in ("teacher", *JUDGED) if any(numbers(run.evaluations.get(n, {}).get(k)) for k in kinds)]
    if not known:
        return None
    figure, axes = panels(len(known), 4.6, rows=2, sharey="row", sharex="row")
    for index, (kind, label) in enumerate(kinds.items()):
        counts = {name: numbers(run.evaluations.get(name, {}).get(kind)) for name in known}
        edges = _edges([value for values in counts.values() for value in values])
        for axis, name in zip(axes[index], known):
            _histogram(axis, counts[name], edges, color=COLOUR[name], alpha=0.85)
            if name != "teacher":
                _histogram(axis, counts.get("teacher", []), edges, outline=True)
            unit = "share of responses" if name == known[0] else ""
            finish(axis, LABEL[name] if not index else "", unit, legend=False, x=label)
            if axis.has_data():
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.set_title(axis.get_title("left"), pad=17 if not index else 8)  # room for the line below it
            axis.text(0, 1.03, _location(counts[name], run, name, kind), transform=axis.transAxes, fontsize=8)
    return figure


def _location(counts: Sequence[float], run: Run, name: str, kind: str) -> str:
    distance = finite(entries(entries(run.summary, "drift"), name).get(kind))
    parts = [f"mean {np.mean(counts):.1f}"] if counts else []
    return ", ".join(parts if distance is None else [*parts, f"$W_1$ {distance:.2f}"])


def _edges(values: Sequence[float]) -> np.ndarray:
    """Bins of whole numbers from 0, at most about 30, that reach the 99.5th percentile."""
    top = int(np.ceil(np.quantile(values, 0.995))) if len(values) else 1
    width = max(1, math.ceil((top + 1) / 30))
    return np.arange(0, top + width + 1, width) - 0.5


def _histogram(axes: Axes, values: Sequence[float], edges: np.ndarray, *, outline: bool = False, **style: Any) -> None:
    if not values:
        return
    heights = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)  # the last bin holds the rest
    if outline:
        axes.stairs(heights, edges, color=COLOUR["teacher"], linewidth=1.3, linestyle="--")
    else:
        axes.stairs(heights, edges, fill=True, **style)


def time_and_tokens(run: Run) -> Figure | None:
    """Seconds and tokens of every stage by part."""
    totals = {stage: breakdown(run.metrics[stage]) for stage in TRAINED if stage in run.metrics}
    stages = [stage for stage, (seconds, tokens) in totals.items() if seconds or tokens]
    if not stages:
        return None
    named = dict.fromkeys(part for stage in stages for sums in totals[stage] for part in sums)
    parts = sorted(named, key=lambda part: names.PARTS.index(part) if part in names.PARTS else len(names.PARTS))
    figure, axes = panels(2, 1.3 + 0.42 * len(stages), sharey=True)
    for axis, which, title, unit in ((axes[0, 0], 0, "Time", "seconds"), (axes[0, 1], 1, "Tokens", "tokens")):
        start = np.zeros(len(stages))
        for index, part in enumerate(parts):
            values = np.array([totals[stage][which].get(part, 0) for stage in stages], dtype=float)
            axis.barh(range(len(stages)), values, left=start, height=0.62, color=CYCLE[index % len(CYCLE)],
                      label=label_of(part), edgecolor="white", linewidth=0.6)  # fmt: skip
            start += values
        for place, total in enumerate(start):
            axis.text(total, place, f" {total:,.0f}", va="center", ha="left")
        finish(axis, title, "", legend=False, x=unit)
        axis.set_xlim(0, max(float(start.max()), 1e-9) * 1.16)
        axis.grid(True, axis="x")
        axis.grid(False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0, 0].set_yticks(range(len(stages)), [RUNNING[stage] for stage in stages])
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9))
    return figure


def compare(run: Run) -> Figure | None:
    """Held-out accuracy of every arm of a comparison, a dot for each seed and a bar at their mean."""
    arms = entries(entries(run.summary, "compare"), "arms")
    shown = {name: numbers(entries(arms, name).get("sampled")) for name in arms}
    shown = {name: values for name, values in shown.items() if values}
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 3.2))
    axis = figure.subplots()
    for place, values in enumerate(shown.values()):
        axis.scatter([place] * len(values), values, color=COLOUR["rlvr"], zorder=3)
        axis.hlines(float(np.mean(values)), place - 0.3, place + 0.3, color="#222222", linewidth=1.4)
    finish(axis, "Held-out accuracy, sampled", "accuracy", x="")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    labels = [label_of(ARM.get(name, name)) for name in shown]
    axis.set_xticks(range(len(shown)), labels, rotation=20, ha="right")
    return figure


def _if_any(figure: Figure, axes: np.ndarray) -> Figure | None:
    return figure if any(axis.has_data() for axis in axes.flat) else None
