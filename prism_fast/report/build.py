"""report.html: one self-contained page on a run, for a person. Nothing in it is loaded from anywhere else.

`page.html.j2` holds the page's words and structure, `report.css` its look, which is inlined; this file computes what
stands in it. What a run did not leave (a stage that was not trained, an evaluation that was not made) is not shown, and
the page says so. The inputs are listed in `data.load_run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prism_fast.files import replacing
from prism_fast.metric_names import SIDES
from prism_fast.records import DataError
from prism_fast.report import experts, plots
from prism_fast.report.data import (
    ARM,
    JUDGED,
    LABEL,
    RUNNING,
    TRAINED,
    Run,
    entries,
    finite,
    finite_of,
    flatten,
    load_run,
    numbers,
    stage_figures,
    started_from,
    visible,
)
from prism_fast.report.draw import render
from prism_fast.report.findings import findings
from prism_fast.report.samples import samples_of
from prism_fast.run.monitor import breakdown, tokens_per_second

HERE = Path(__file__).parent
DRIFT = {"caption_items": "Caption items", "reasoning_steps": "Reasoning steps"}
MAX_WARNINGS = 100
PLOTS = (
    plots.accuracy_by_stage,
    plots.held_out_curves,
    plots.compare,
    plots.reward_and_format,
    plots.scores,
    plots.drift,
    plots.losses,
    plots.lengths_and_entropy,
    plots.time_and_tokens,
    experts.expert_heat_map,
    experts.expert_split,
    experts.expert_curves,
)


def build_report(out: Path) -> Path:
    """Writes ``out/report.html`` from what is in ``out`` and returns its path.

    Raises DataError where ``out`` is no folder, or a file in it is there but damaged; an older report then stays.
    """
    out = Path(out)
    if not out.is_dir():
        raise DataError(f"{out}: no such folder; name the folder that a run has written")
    text = report_html(load_run(out))
    path = out / "report.html"
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def report_html(run: Run) -> str:
    """The page as text."""
    layers = sorted({key[0] for keys in run.experts.values() for key in keys})
    return _environment().get_template("page.html.j2").render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        figures={plot.__name__: render(plot, run) for plot in PLOTS},
        seed=run.summary.get("seed"),
        tiles=_tiles(run),
        stages=_stage_rows(run),
        findings=findings(run),
        pair_accuracy=_pair_accuracy(run),
        missing=run.missing,
        compare=_compare_rows(run),
        differences=_difference_rows(run),
        probes=_probe_rows(run),
        compared=_compared(run),
        parts=_part_rows(run),
        layers=layers,
        shown_layers=experts.shown_layers(layers) if layers else [],
        trained=[RUNNING[stage] for stage in run.metrics],
        warnings=_warning_rows(run),
        max_warnings=MAX_WARNINGS,
        samples=samples_of(run),
        environment=flatten(entries(run.summary, "environment")),
    )  # fmt: skip


def _environment() -> Environment:
    """Templates that escape every value and make it visible; one that is missing or None is an error, not a blank."""
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_written,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _written(value: object) -> object:
    """What a template writes for ``value``: control characters and lone surrogates as visible marks."""
    if value is None:
        raise ValueError("the page writes a value that is None; say in the template what stands in its place")
    return value if isinstance(value, Markup) else visible(str(value))


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 0) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _points(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:+.1f} points"


class Tile(NamedTuple):
    """A figure at the head of the page."""

    name: str
    value: str
    detail: str


def _tiles(run: Run) -> list[Tile]:
    found = [_accuracy_tile(run), *(_drift_tile(run, kind) for kind in DRIFT), _time_tile(run)]
    return [tile for tile in found if tile is not None]


def _accuracy_tile(run: Run) -> Tile | None:
    accuracy = {stage: stage_figures(run, stage).get("accuracy") for stage in ("sft", "drift", "align", "rlvr")}
    known = [(stage, value) for stage, value in accuracy.items() if value is not None]
    if not known:
        return None
    stage, last = known[-1]
    detail, start = f"after {LABEL[stage]}", "sft" if accuracy["drift"] is None else "drift"
    before, alone = accuracy[start], stage_figures(run, "direct").get("accuracy")
    if before is not None and stage != start:
        detail += f"; {_points(last - before)} from {LABEL[start]}"
    if alone is not None and stage == "rlvr":
        detail += f"; as much RLVR alone {100 * alone:.1f} %"
    return Tile("Held-out accuracy", f"{100 * last:.1f} %", detail)


def _drift_tile(run: Run, kind: str) -> Tile | None:
    drift = entries(run.summary, "drift")
    start = started_from(run, "align")[0] or "sft"
    before, after = (finite(entries(drift, stage).get(kind)) for stage in (start, "align"))
    if before is None or after is None:
        return None
    detail = f"{LABEL[start]} → aligned; smaller is nearer"
    return Tile(f"{DRIFT[kind]}: W₁ to the teacher", f"{before:.2f} → {after:.2f}", detail)


def _time_tile(run: Run) -> Tile | None:
    seconds = {stage: value for stage in TRAINED if (value := _seconds(run, stage)) is not None}
    if not seconds:
        return None
    detail = ", ".join(f"{RUNNING[stage]} {value:,.0f} s" for stage, value in seconds.items())
    return Tile("Training time", f"{sum(seconds.values()):,.0f} s", detail)


def _seconds(run: Run, stage: str) -> float | None:
    """What a stage's time is everywhere on the page: that of its steps' parts, without evaluations and checkpoints; the
    summary's where no step was recorded."""
    parts, _ = breakdown(run.metrics.get(stage, ()))
    return sum(parts.values()) if parts else stage_figures(run, stage).get("seconds")


def _rate(run: Run, stage: str) -> float | None:
    """Tokens a second of that time."""
    seconds, tokens = breakdown(run.metrics.get(stage, ()))
    if seconds and sum(tokens.values()):
        return tokens_per_second(seconds, tokens)
    return stage_figures(run, stage).get("tokens_per_second")


def _stage_rows(run: Run) -> list[list[str | None]]:
    drift = entries(run.summary, "drift")
    rows = []
    for stage in ("base", *TRAINED, "teacher"):
        figures, known = stage_figures(run, stage), stage in (*JUDGED, "teacher")
        distances = [finite(entries(drift, stage).get(kind)) for kind in DRIFT]
        if not figures and not any(value is not None for value in distances):
            continue
        rows.append(
            [
                LABEL[stage] + (" (reference)" if stage == "teacher" else ""),
                _percent(figures.get("accuracy")) if known else None,
                _percent(figures.get("format_valid")) if known else None,
                *(_number(value, 2) for value in distances),
                _number(_seconds(run, stage), 1),
                _number(_rate(run, stage)),
            ]
        )
    return rows


def _pair_accuracy(run: Run) -> list[str]:
    figures = stage_figures(run, "warmup")
    found = {side: figures.get(f"pair_accuracy_{side}") for side in ("perception", "reasoning")}
    return [f"{side} {_percent(value)}" for side, value in found.items() if value is not None]


def _compare_rows(run: Run) -> list[list[str | None]]:
    """One for every arm that the summary's comparison holds: means over seeds, and each seed's sampled figure."""
    arms = entries(entries(run.summary, "compare"), "arms")
    rows: list[list[str | None]] = []
    for name in arms:
        arm = entries(arms, name)
        sampled, greedy, tokens, seconds = (numbers(arm.get(key)) for key in ("sampled", "greedy", "tokens", "seconds"))
        each = ", ".join(f"{100 * value:.1f}" for value in sampled)
        counts = (finite(arm.get(key)) for key in ("policy_updates", "teacher_texts"))
        spent = (_number(fmean(values)) if values else None for values in (tokens, seconds))
        means = (_percent(fmean(values)) if values else None for values in (sampled, greedy))
        rows.append([ARM.get(name, name), each or None, *means, *map(_number, counts), *spent])
    return rows


def _compared(run: Run) -> list[str]:
    """What a reader of a comparison has to know."""
    known = finite_of(entries(run.summary, "compare"))
    facts = {
        "held_out": lambda value: f"Held out: {value:,.0f} scenes.",
        "sampling_error": lambda value: f"One sampled figure has a standard error of {100 * value:.1f} points.",
        "teacher_errors": lambda value: f"{100 * value:.0f} % of the teacher's texts are wrong." if value else "",
    }
    return [said for name, say in facts.items() if name in known and (said := say(known[name]))]


def _difference_rows(run: Run) -> list[list[str | None]]:
    """Paired differences over seeds, with their 95 % interval where there are several."""
    found = entries(run.summary, "compare").get("differences")
    rows: list[list[str | None]] = []
    for each in found if isinstance(found, list) else ():
        of, to = (ARM.get(str(each.get(side)), str(each.get(side))) for side in ("of", "to"))
        low, high = finite(each.get("low")), finite(each.get("high"))
        interval = None if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
        seeds = ", ".join(f"{100 * value:+.1f}" for value in numbers(each.get("each")))
        rows.append([f"{of} less {to}", str(each.get("how")), seeds, _points(finite(each.get("mean"))), interval])
    return rows


def _probe_rows(run: Run) -> list[list[str | None]]:
    """Median over seeds of how often, of equal form, the right part scores higher."""
    probes = entries(entries(run.summary, "compare"), "probes")
    rows: list[list[str | None]] = []
    for arm in probes:
        seeds = [each for each in probes[arm] if isinstance(each, Mapping)] if isinstance(probes[arm], list) else []
        for when in dict.fromkeys(name for each in seeds for name in each):
            sides = []
            for side in SIDES:
                figures = [finite(entries(entries(each, when), side).get("auc_form")) for each in seeds]
                known = [value for value in figures if value is not None]
                sides.append(_number(median(known), 2) if known else None)
            rows.append([ARM.get(arm, arm), f"{when} alignment", *sides])
    return rows


def _part_rows(run: Run) -> list[list[str | None]]:
    rows: list[list[str | None]] = []
    for stage, lines in run.metrics.items():
        seconds, tokens = breakdown(lines)
        whole = sum(seconds.values())
        for part in dict.fromkeys((*seconds, *tokens)):
            spent, count = seconds.get(part), tokens.get(part)
            share = spent / whole if spent is not None and whole > 0 else None
            rate = (
                tokens_per_second({"part": spent}, {"part": count}) if spent is not None and count is not None else None
            )
            figures = (_number(spent, 1), _percent(share), _number(count), _number(rate))
            rows.append([RUNNING[stage], part.replace("_", " "), *figures])
    return rows


def _warning_rows(run: Run) -> list[list[Any]]:
    return [
        [RUNNING[stage], line["step"], str(line["warning"])]
        for stage, lines in run.metrics.items()
        for line in lines
        if "warning" in line
    ]
