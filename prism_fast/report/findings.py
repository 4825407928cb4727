"""What happened in every stage and what to do about it, in sentences, by the rules of run/alerts.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from prism_fast import metric_names as names
from prism_fast.records import StepStats
from prism_fast.report.data import RUNNING, TRAINED, Run, entries, finite, series, stage_figures
from prism_fast.run.alerts import CHANCE, Watch, collapsed, expert_shares, mean_shares, sentence

DRIFT = {"caption_items": "caption items", "reasoning_steps": "reasoning steps"}
BEFORE = {"sft": "base", "align": "sft", "rlvr": "align"}  # the policy that a stage started from
LAST = 20  # steps whose mean stands for the end of a stage
LAST_LOADS = 5  # steps: at the end of a stage
MARGIN = 0.1  # share by which a distance may grow before it is a drift


class Finding(NamedTuple):
    """``happened`` is one sentence; ``todo`` what the rules say, empty where nothing stands out."""

    stage: str
    happened: str
    todo: tuple[str, ...]


def findings(run: Run) -> list[Finding]:
    """One for every stage that has left figures."""
    return [
        Finding(RUNNING[stage], text, tuple(_todo(run, stage))) for stage in TRAINED if (text := _happened(run, stage))
    ]


def _happened(run: Run, stage: str) -> str:
    steps = max((int(line["step"]) for line in run.metrics.get(stage, ())), default=0)
    parts = []
    if stage == "warmup":
        ranked = [f"{side} {value:.1%}" for side in names.SIDES if (value := _pair_accuracy(run, side)) is not None]
        parts += [f"pairs ranked right: {', '.join(ranked)}"] if ranked else []
    before, after = (stage_figures(run, name) for name in (BEFORE.get(stage, ""), stage))
    for name, label in (("accuracy", "held-out accuracy"), ("format_valid", "valid format")):
        if stage != "warmup" and name in after:
            start = f"{before[name]:.1%} to " if name in before else ""
            parts.append(f"{label} {start}{after[name]:.1%}")
    if stage == "align":
        for kind, label in DRIFT.items():
            first, last = _distances(run, kind)
            if first is not None and last is not None:
                parts.append(f"distance of {label} to the teacher {first:.2f} to {last:.2f}")
    if not parts and not steps:
        return ""
    return f"{steps:,} steps{': ' if parts else ''}{'; '.join(parts)}." if steps else f"{'; '.join(parts)}."


def _todo(run: Run, stage: str) -> list[str]:
    found = [f"from step {step} on, {text}" for step, text in live(run, stage)]
    if stage == "warmup":
        for side in names.SIDES:
            value = _pair_accuracy(run, side)
            if value is not None and value < CHANCE:
                found.append(sentence("chance", side=side, value=value))
    before, after = (stage_figures(run, name).get("accuracy") for name in (BEFORE.get(stage, ""), stage))
    if before is not None and after is not None and after <= before:
        found.append(sentence("no_gain", before=before, after=after))
    if stage == "align":
        for kind, label in DRIFT.items():
            first, last = _distances(run, kind)
            if first is not None and last is not None and last > first * (1 + MARGIN) and last - first > MARGIN:
                found.append(sentence("drift", kind=label, before=first, after=last))
    if not any("experts collapse" in text for text in found):
        found += [sentence("few_experts", **about) for about in _few_experts(run, stage)]
    return found


def _few_experts(run: Run, stage: str) -> list[dict[str, Any]]:
    """What is said of every layer whose experts have collapsed, by the mean of the last steps with loads."""
    last = [shares for line in run.metrics.get(stage, ()) if (shares := expert_shares(figures_of(line)))][-LAST_LOADS:]
    found = []
    for layer in sorted(last[-1] if last else ()):
        steps = [shares[layer] for shares in last if layer in shares]
        about = collapsed({kind: mean_shares([step[kind] for step in steps if kind in step]) for kind in steps[-1]})
        if about is not None:
            found.append({"layer": layer, **about})
    return found


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl."""
    return {name: number for name, value in line.items() if (number := finite(value)) is not None}


def live(run: Run, stage: str) -> list[tuple[int, str]]:
    """(step, warning) of a :class:`Watch` that reads the stage's metrics again: as it warned, or would have."""
    watch = Watch()
    found = []
    for line in run.metrics.get(stage, ()):
        if "warning" not in line:
            step = int(line["step"])
            found += [(step, text) for text in watch.observe(StepStats(step, figures_of(line), {}, {}))]
    return found


def _pair_accuracy(run: Run, side: str) -> float | None:
    """On held-out pairs, else the mean of the last steps."""
    held_out = stage_figures(run, "warmup").get(f"pair_accuracy_{side}")
    if held_out is not None:
        return held_out
    values = series(run.metrics.get("warmup", ()), names.PAIR_ACCURACY[side])[1][-LAST:]
    return sum(values) / len(values) if values else None


def _distances(run: Run, kind: str) -> tuple[float | None, float | None]:
    drift = entries(run.summary, "drift")
    before, after = (finite(entries(drift, stage).get(kind)) for stage in ("sft", "align"))
    return before, after
