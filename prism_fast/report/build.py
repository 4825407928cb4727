"""report.html: one self-contained page on a run, for a person. Nothing in it is loaded from anywhere else.

What a run did not leave (a stage that was not trained, an evaluation that was not made) is not shown, and the page says
so. The inputs are listed in `report_data.load_run`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from prism_fast.files import replacing
from prism_fast.records import DataError
from prism_fast.report import draw as report_draw
from prism_fast.report import experts as report_experts
from prism_fast.report import plots as report_plots
from prism_fast.report.data import (
    JUDGED,
    LABEL,
    RUNNING,
    TRAINED,
    Run,
    entries,
    finite,
    flatten,
    load_run,
    stage_figures,
)
from prism_fast.report.page import Markup, absent, figure, join, page, section, table, tag
from prism_fast.report.samples import samples_table
from prism_fast.run.monitor import breakdown, tokens_per_second

DRIFT = {"caption_items": "Caption items", "reasoning_steps": "Reasoning steps"}

MAX_WARNINGS = 100


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
    sections = [
        ("overview", "Overview", _overview(run)),
        ("accuracy", "Accuracy", _accuracy(run)),
        ("rewards", "Reward and format", _rewards(run)),
        ("discriminator", "Discriminator", _discriminator(run)),
        ("drift", "Drift", _drift(run)),
        ("training", "Training", _training(run)),
        ("time", "Time and tokens", _time(run)),
        ("experts", "Experts", _experts(run)),
        ("warnings", "Warnings", _warnings(run)),
        ("samples", "Responses", _samples(run)),
        ("environment", "Environment", _environment(run)),
    ]
    if entries(run.summary, "compare"):
        sections.insert(2, ("compare", "Comparison", _compare(run)))
    return page("PRISM run report", _header(run), sections)


def _plot(
    plot: Callable[[Run], Figure | None], run: Run, alt: str, caption: object, needs: str, **look: bool
) -> Markup:
    source = report_draw.render(plot, run)
    if source is None:
        return absent(join([f"{alt[0].lower()}{alt[1:]}; it needs ", tag("code", needs)]))
    return figure(source, alt, caption, **look)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 0) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _header(run: Run) -> Markup:
    seed = run.summary.get("seed")
    lead = (
        "Supervised fine-tuning, discriminator warm-up, adversarial alignment, reinforcement learning: what each did."
    )
    tiles = [
        tile for tile in (_accuracy_tile(run), *(_drift_tile(run, kind) for kind in DRIFT), _time_tile(run)) if tile
    ]
    return join(
        [
            tag("h1", "PRISM run report"),
            tag("p", lead if seed is None else f"{lead} Seed {seed}.", class_="lead"),
            tag("div", join(tiles), class_="tiles") if tiles else "",
        ]
    )


def _tile(name: str, value: str, detail: str) -> Markup:
    parts = (("name", name), ("value", value), ("detail", detail))
    return tag("div", join(tag("div", text, class_=kind) for kind, text in parts), class_="tile")


def _accuracy_tile(run: Run) -> Markup | None:
    accuracy = {stage: stage_figures(run, stage).get("accuracy") for stage in ("sft", "align", "rlvr")}
    known = [(stage, value) for stage, value in accuracy.items() if value is not None]
    if not known:
        return None
    stage, last = known[-1]
    detail = f"after {LABEL[stage]}"
    if accuracy["sft"] is not None and stage != "sft":
        detail += f"; {100 * (last - accuracy['sft']):+.1f} points from SFT"
    return _tile("Held-out accuracy", f"{100 * last:.1f} %", detail)


def _drift_tile(run: Run, kind: str) -> Markup | None:
    drift = entries(run.summary, "drift")
    before, after = (finite(entries(drift, stage).get(kind)) for stage in ("sft", "align"))
    if before is None or after is None:
        return None
    return _tile(f"{DRIFT[kind]}: W₁ to the teacher", f"{before:.2f} → {after:.2f}", "SFT → aligned; smaller is nearer")


def _time_tile(run: Run) -> Markup | None:
    seconds = {stage: value for stage in TRAINED if (value := stage_figures(run, stage).get("seconds")) is not None}
    if not seconds:
        return None
    detail = ", ".join(f"{RUNNING[stage]} {value:,.0f} s" for stage, value in seconds.items())
    return _tile("Training time", f"{sum(seconds.values()):,.0f} s", detail)


def _overview(run: Run) -> Markup:
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
                _number(figures.get("seconds"), 1),
                _number(figures.get("tokens_per_second")),
            ]
        )
    head = ["Stage", "Held-out accuracy", "Format valid", *(f"{name}: W₁ to teacher" for name in DRIFT.values())]
    content: list[object] = []
    if rows:
        content.append(table([*head, "Seconds", "Tokens/s"], rows))
        content.append(
            tag("p", "W₁ is the Wasserstein distance between the counts per response of a stage and of the teacher on "
                "held-out prompts; an invalid response counts 0. A dash: not measured.", class_="soft")
        )  # fmt: skip
    else:
        content.append(absent("the main figures; they need summary.json or evaluations"))
    pairs = stage_figures(run, "warmup")
    sides = [f"{side} {_percent(value)}" for side in ("perception", "reasoning")
             if (value := pairs.get(f"pair_accuracy_{side}")) is not None]  # fmt: skip
    if sides:
        content.append(tag("p", f"Discriminator after warm-up, held-out pairs ranked right: {', '.join(sides)}."))
    if run.missing:
        content.append(
            absent(join(["what needs these files, which are not there: ", tag("code", ", ".join(run.missing))]))
        )
    return section("overview", "Stage by stage", *content)


def _accuracy(run: Run) -> Markup:
    return section(
        "accuracy",
        "Accuracy on held-out images",
        _plot(report_plots.accuracy_by_stage, run, "Held-out accuracy by stage and question type",
              "Black lines: 95 % Wilson interval, as if responses were independent. The teacher's line is the accuracy "
              "of its demonstrations.", "summary.json or evaluations/*.json"),
        _plot(report_plots.held_out_curves, run, "Held-out accuracy during training",
              "Evaluated every few steps; dotted: format validity.", "eval/accuracy in a metrics.jsonl"),
    )  # fmt: skip


def _compare(run: Run) -> Markup:
    entry = entries(run.summary, "compare")
    names = ("seeds", "prism", "sft_rlvr", "difference")
    lists = {name: entry[name] if isinstance(entry.get(name), list) else [] for name in names}
    rows: list[list[object]] = []
    for index in range(max(len(values) for values in lists.values())):
        seed, *rest = (lists[name][index] if index < len(lists[name]) else None for name in names)
        prism, plain, difference = (finite(value) for value in rest)
        rows.append([str(seed), _percent(prism), _percent(plain), _points(difference)])
    mean, spread = finite(entry.get("mean")), finite(entry.get("std"))
    rows.append(["mean of the difference", None, None, _points(mean)])
    rows.append(["standard deviation", None, None, None if spread is None else f"{100 * spread:.1f} points"])
    note = "Both end with the same number of policy updates; only PRISM spends some of them on alignment."
    plot = _plot(report_plots.compare, run, "Final accuracy with and without alignment", "One line per seed.",
                 "as many prism as sft_rlvr figures in summary.json", narrow=True)  # fmt: skip
    seeds = table(["Seed", "PRISM", "SFT then RLVR", "Difference"], rows)
    both = tag("div", join([seeds, plot]), class_="pair")
    return section("compare", "With and without alignment", tag("p", note), both)


def _points(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:+.1f} points"


def _rewards(run: Run) -> Markup:
    return section(
        "rewards",
        "Reward and format validity",
        _plot(report_plots.reward_and_format, run, "Reward and format validity of sampled responses",
              "On the training prompts, sampled at the training temperature. Thin: every step; thick: running mean.",
              "format_valid or reward in align/metrics.jsonl or rlvr/metrics.jsonl"),
    )  # fmt: skip


def _discriminator(run: Run) -> Markup:
    return section(
        "discriminator",
        "Discriminator: student against teacher",
        _plot(report_plots.scores, run, "Perception and reasoning scores and discriminator accuracies",
              "Scores before the step's update, unclamped. 50 % (dotted): the discriminator cannot tell student from "
              "teacher; near 100 % it saturates.", "score/... or discriminator_accuracy/... in align/metrics.jsonl"),
    )  # fmt: skip


def _drift(run: Run) -> Markup:
    return section(
        "drift",
        "Drift from the supervision",
        _plot(report_plots.drift, run, "Caption items and reasoning steps per response",
              "Counts per held-out response; the last bin also holds what lies beyond. Dashed: the teacher. W₁: "
              "distance between the two distributions, from summary.json.", "caption_items in evaluations/*.json"),
    )  # fmt: skip


def _training(run: Run) -> Markup:
    return section(
        "training",
        "Training",
        _plot(report_plots.losses, run, "Losses of every stage", "Thin: every step; thick: running mean.",
              "loss in a metrics.jsonl"),
        _plot(report_plots.lengths_and_entropy, run, "Response length, entropy, gradient norm, sampler gap",
              "Of the responses sampled for training; the gap of those with an advantage. Entropy: mean of -log p of "
              "the sampled tokens.", "response_length in align/metrics.jsonl or rlvr/metrics.jsonl"),
    )  # fmt: skip


def _time(run: Run) -> Markup:
    rows: list[list[object]] = []
    for stage, lines in run.metrics.items():
        seconds, tokens = breakdown(lines)
        for part in dict.fromkeys((*seconds, *tokens)):
            spent, count = seconds.get(part), tokens.get(part)
            share = spent / sum(seconds.values()) if spent is not None and sum(seconds.values()) > 0 else None
            rate = (
                tokens_per_second({"part": spent}, {"part": count}) if spent is not None and count is not None else None
            )
            rows.append([RUNNING[stage], part.replace("_", " "),
                         _number(spent, 1), _percent(share), _number(count), _number(rate)])  # fmt: skip
    parts = table(["Stage", "Part", "Seconds", "Share", "Tokens", "Tokens/s"], rows, text_columns=2)
    return section(
        "time",
        "Time and tokens",
        _plot(report_plots.time_and_tokens, run, "Time and tokens of every stage by part",
              "Sums over the steps of metrics.jsonl. A token counts once in every part that goes over it.",
              "seconds/<part> in a metrics.jsonl"),
        tag("details", join([tag("summary", "Every part in figures"), parts])) if rows else "",
    )  # fmt: skip


def _experts(run: Run) -> Markup:
    needs = "expert_load/... in warmup/metrics.jsonl or align/metrics.jsonl"
    if not run.experts:
        missing = absent(join(["expert load; it needs ", tag("code", needs)]))
        return section("experts", "Expert load by kind of token", missing)
    layers = sorted({key[0] for keys in run.experts.values() for key in keys})
    shown = report_experts.shown_layers(layers)
    chosen = f" Layers {', '.join(map(str, shown))} of {len(layers)}." if len(shown) < len(layers) else ""
    return section(
        "experts",
        "Expert load by kind of token",
        _plot(report_experts.expert_heat_map, run, "Expert load by layer and kind, first and last steps",
              f"Rows add up to 100 %. First and last: a tenth of the stage's steps.{chosen} In alignment the last "
              "layer is computed, and counted, at the last token of every part alone.", needs),
        _plot(report_experts.expert_split, run, "Perception against reasoning, student against teacher",
              "Half the sum over experts of the difference of their shares: 0 where both kinds go to the same experts "
              "alike, 100 % where none is shared. Mean and range over the layers; without alignment's last.", needs),
        _plot(report_experts.expert_curves, run, "Expert load over the steps",
              "Mean over the layers, without alignment's last. Dotted: an equal share.", needs),
    )  # fmt: skip


def _warnings(run: Run) -> Markup:
    rows = [
        [RUNNING[stage], str(line["step"]), str(line["warning"])]
        for stage, lines in run.metrics.items()
        for line in lines
        if "warning" in line
    ]
    if rows:
        more = len(rows) - MAX_WARNINGS
        rest = tag("p", f"And {more:,} more, in metrics.jsonl.") if more > 0 else ""
        content = join([table(["Stage", "Step", "Warning"], rows[:MAX_WARNINGS], text_columns=3), rest])
    elif run.metrics:
        content = tag("p", f"None was raised ({', '.join(RUNNING[stage] for stage in run.metrics)}).")
    else:
        content = absent("warnings; they stand in metrics.jsonl of the stages")
    return section("warnings", "Warnings", content)


def _samples(run: Run) -> Markup:
    return section("samples", "Sampled responses, stage by stage", samples_table(run))


def _environment(run: Run) -> Markup:
    rows = flatten(entries(run.summary, "environment"))
    if not rows:
        content = absent("the environment; it stands in summary.json")
    else:
        content = table(["", ""], [[name, tag("code", value)] for name, value in rows], text_columns=2)
    return section("environment", "Environment", content)
