"""What happened in every stage and what to do about it, in sentences, by the rules of run/alerts.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from prism_fast import metric_names as names
from prism_fast.records import DataError, StepStats
from prism_fast.report.data import (
    LABEL,
    RUNNING,
    TRAINED,
    Run,
    entries,
    finite,
    finite_of,
    series,
    stage_figures,
    started_from,
)
from prism_fast.run.alerts import (
    CHANCE,
    FOLLOWS,
    Alert,
    Watch,
    collapsed,
    expert_shares,
    halved_packs,
    layers_figures,
    mean_shares,
    merged,
    sentence,
    style_alone,
)

DRIFT = {"caption_items": "caption items", "reasoning_steps": "reasoning steps"}
LAST = 20  # steps whose mean stands for the beginning or the end of a stage
LAST_LOADS = 5  # steps: at the end of a stage
MARGIN = 0.1  # share by which a distance may grow before it is a drift
PERFECT = 0.99  # accuracy from which there is nothing left to gain
FALL = 0.05  # accuracy below the best evaluation: more than chance where hundreds are asked
CUT = 0.9  # of the longest response that is allowed
SOME = 0.01  # share of parts that are the teacher's, from which it is said
IDLE = 0.5  # of the steps, without an update
UNEVEN = 1.5  # the busiest process over the mean
COURSES = {
    **dict.fromkeys(("sft", "drift", "warmup"), (names.LOSS, "loss")),
    **dict.fromkeys(("rlvr", "direct"), (names.REWARD, "reward")),
}
NORMS = (names.GRAD_NORM, names.POLICY_GRAD_NORM, names.DISCRIMINATOR_GRAD_NORM)
BESIDE = ("step", "time")
COVERED = {"invalid": "format"}  # not said where the live rule has spoken
About = Iterator[tuple[str, dict[str, Any]]]  # rules, and what their sentences name
RANKED = (("what is right", "rank_right"), ("form", "rank_form"), ("length", "rank_length"))
RANKS = {names.RANKS["cpu_seconds"]: "computing time", names.RANKS["sampled_tokens"]: "sampled tokens"}


class Finding(NamedTuple):
    """``happened`` is one sentence; ``todo`` what the rules say, empty where nothing stands out."""

    stage: str
    happened: str
    todo: tuple[str, ...]


class Spell(NamedTuple):
    """Steps at which a live rule held. ``over``: the step at which it had cleared, None where it held to the end."""

    alert: Alert
    first: int
    over: int | None


def findings(run: Run) -> list[Finding]:
    """One for every stage that has left figures, or a metrics.jsonl without any."""
    found = [
        Finding(RUNNING[stage], text, tuple(_todo(run, stage))) for stage in TRAINED if (text := _happened(run, stage))
    ]
    return found + [Finding(f"Probe {name}", *_probed(figures)) for name, figures in run.probes.items()]


def _probed(probe: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What a discriminator knows of content, and whether its scores follow style alone."""
    said, todo = [], []
    for side in names.SIDES:
        figures = finite_of(entries(probe, side))
        known = [f"rank correlation with {what} {figures[name]:+.2f}" for what, name in RANKED if name in figures]
        if "auc_form" in figures:
            same = f"of equal form, the right one scores higher in {figures['auc_form']:.1%} of the pairs"
            near = figures.get("auc_form_length")
            known.insert(0, same + ("" if near is None else f", and of equal length too in {near:.1%}"))
        said += [f"{side}: {', '.join(known)}"] if known else []
        alert = style_alone(side, figures)
        todo += [] if alert is None else [alert]
    return f"{'; '.join(said) or 'Nothing could be compared'}.", tuple(todo)


def _happened(run: Run, stage: str) -> str:
    parts = "; ".join([*_results(run, stage), *_course(run, stage)])
    count = ""
    if steps := _steps(run, stage):
        total = finite(_setting(run, stage, "steps"))
        of = f" of {total:,.0f}" if total is not None and _is_cut_off(run, stage) else ""
        count = f"{steps[-1][0]:,}{of} step{'' if steps[-1][0] == 1 and not of else 's'}"
    if not parts and not count:
        return "It left no figures." if stage in run.metrics else ""
    return f"{': '.join(filter(None, (count, parts)))}."


def _results(run: Run, stage: str) -> Iterator[str]:
    """What was measured on held-out data."""
    if stage == "warmup":
        ranked = [f"{side} {value:.1%}" for side in names.SIDES if (value := _pair_accuracy(run, side)) is not None]
        yield from [f"pairs ranked right: {', '.join(ranked)}"] if ranked else []
        return
    after = stage_figures(run, stage)
    for name, label in (("accuracy", "held-out accuracy"), ("format_valid", "valid format")):
        if name in after:
            before, where = _before(run, stage, name)
            start = "" if before is None else f"{_amount(before)}{where} to "
            yield f"{label} {start}{_amount(after[name])}"
    for kind, label in DRIFT.items() if stage == "align" else ():
        first, last = _distances(run, kind)
        if first is not None and last is not None:
            yield f"distance of {label} to the teacher {first:.2f} to {last:.2f}"


def _course(run: Run, stage: str) -> Iterator[str]:
    """From where to where a stage's own measure went, and what its loss cannot fall below."""
    if ends := _ends(run, stage):
        yield f"{COURSES[stage][1]} {ends[0]:.3g} to {ends[1]:.3g}"
    found = {side: series(run.metrics.get(stage, ()), names.EQUAL_PARTS[side])[1][-LAST:] for side in names.SIDES}
    equal = {side: _mean(values) for side, values in found.items() if values}
    if any(share >= SOME for share in equal.values()):
        shares = ", ".join(f"{side} {share:.1%}" for side, share in equal.items())
        floors = ", ".join(f"{side} {share * math.log(2):.2f}" for side, share in equal.items())
        yield f"parts that are the teacher's own: {shares}, so pair losses are at least {floors}"


def _todo(run: Run, stage: str) -> list[str]:
    if not _steps(run, stage) and not stage_figures(run, stage):
        found = [sentence("empty")] if stage in run.metrics else []
        return found + [sentence(rule, **about) for rule, about in _of_drift(run, stage)]
    spells, warned = live(run, stage)
    said = {spell.alert.rule for spell in spells}
    rules = (_of_end, _of_discriminator, _of_style, _of_policy, _of_drift, _of_machine)
    found = [_dated(spell) for spell in spells]
    found += [
        sentence(rule, **about) for find in rules for rule, about in find(run, stage) if COVERED.get(rule) not in said
    ]
    found += _of_experts(run, stage, spells)
    others = sum("warning" in line and str(line["warning"]) not in warned for line in run.metrics.get(stage, ()))
    if others:
        found.append(sentence("others", count=f"{others:,} other warning{'' if others == 1 else 's'}"))
    return found


def _of_end(run: Run, stage: str) -> About:
    """An end before its time, and updates that were skipped."""
    steps = _steps(run, stage)
    skipped = [_is_skipped(line) for _, line in steps]
    in_a_row = len(list(takewhile(bool, reversed(skipped))))
    limit = finite(_setting(run, stage, "run", "max_skipped_updates"))
    if _is_cut_off(run, stage) and limit and in_a_row >= limit:
        yield "stopped", {"count": in_a_row}
        return
    if _is_cut_off(run, stage):
        yield "unfinished", {}
    if any(skipped):
        at = max(step for (step, _), broken in zip(steps, skipped) if broken)
        yield "skipped", {"count": sum(skipped), "steps": len(skipped), "step": at}
    norms = [any(name in line for name in NORMS) for _, line in steps if names.LEARNING_RATE in line]
    idle = norms.count(False) - sum(skipped)
    if idle > IDLE * len(norms):
        yield "idle", {"count": idle, "steps": len(norms)}


def _of_discriminator(run: Run, stage: str) -> About:
    for side in names.SIDES:
        value = _pair_accuracy(run, side)
        if stage != "warmup":
            values = series(run.metrics.get(stage, ()), names.DISCRIMINATOR_ACCURACY[side])[1]
            if len(values) < LAST:
                continue
            first, last = _mean(values[:LAST]), _mean(values[-LAST:])
            # About half at the end is what alignment is for; at its beginning it is not, nor is less.
            if last < 1 - CHANCE:
                yield "outrun", {"side": side, "value": last}
                continue
            value = first
        if value is not None and value < CHANCE:
            yield "chance" if value >= 1 - CHANCE else "reversed", {"side": side, "value": value}


def _of_style(run: Run, stage: str) -> About:
    """Scores of the last steps that go with form or length, and not with right answers."""
    for side in names.SIDES if stage == "align" else ():
        kinds = (names.CONTENT[side], names.STYLE[side])
        content, style = (series(run.metrics.get(stage, ()), name)[1][-LAST:] for name in kinds)
        if min(len(content), len(style)) == LAST and _mean(content) < CHANCE and _mean(style) > FOLLOWS:
            yield "style", {"side": side, "what": "form or length", "rank": _mean(style), "equal": "form",
                            "value": _mean(content)}  # fmt: skip


def _of_experts(run: Run, stage: str, spells: list[Spell]) -> list[str]:
    """What is said of the layers whose experts have collapsed, by the mean of the last steps with loads."""
    said = {spell.alert.condition for spell in spells if spell.over is None}
    last = [shares for line in run.metrics.get(stage, ()) if (shares := expert_shares(finite_of(line)))][-LAST_LOADS:]
    found = []
    for layer in sorted(last[-1] if last and "experts" not in said else ()):
        steps = [shares[layer] for shares in last if layer in shares]
        about = collapsed({kind: mean_shares([step[kind] for step in steps if kind in step]) for kind in steps[-1]})
        if about is not None:
            found.append({"layer": layer, **about})
    return [sentence("few_experts", **layers_figures(found))] if found else []


def _of_policy(run: Run, stage: str) -> About:
    ends, long = _ends(run, stage), len(_steps(run, stage)) >= LAST
    if ends and long and COURSES[stage][0] == names.LOSS and ends[1] > ends[0]:
        yield "loss", {"before": ends[0], "after": ends[1]}
    if stage == "warmup":
        return
    lines, figures = run.metrics.get(stage, ()), stage_figures(run, stage)
    sampled = {name: series(lines, name)[1][-LAST:] for name in (names.FORMAT_VALID, names.RESPONSE_LENGTH)}
    valid = figures.get("format_valid", _mean(sampled[names.FORMAT_VALID]) if sampled[names.FORMAT_VALID] else 1.0)
    if valid < _watch(run, stage).format_floor:
        yield "invalid", {"value": valid}
    limit = finite(_setting(run, stage, "rollout", "max_response_tokens"))
    if limit and sampled[names.RESPONSE_LENGTH] and (length := _mean(sampled[names.RESPONSE_LENGTH])) > CUT * limit:
        yield "cut", {"value": length, "limit": round(limit)}
    if stage == "drift":  # which is there to lose accuracy
        return
    after, (before, _) = figures.get("accuracy"), _before(run, stage, "accuracy")
    steps, held_out = series(lines, names.EVAL_ACCURACY)
    if held_out and max(held_out) - held_out[-1] > FALL * max(1.0, abs(max(held_out))):
        best = held_out.index(max(held_out))
        ends_at = {"best": _amount(held_out[best]), "after": _amount(held_out[-1])}
        yield "past_best", {"step": round(steps[best]), **ends_at}
    elif after is not None and before is not None and after <= before and not PERFECT <= after <= 1:
        yield "no_gain", {"before": _amount(before), "after": _amount(after)}
    elif after is None and ends and long and COURSES[stage][0] == names.REWARD and ends[1] <= ends[0]:
        yield "no_reward", {"before": ends[0], "after": ends[1]}
    if after is None and not _is_cut_off(run, stage):
        yield "unmeasured", {}


def _of_drift(run: Run, stage: str) -> About:
    for kind, label in DRIFT.items() if stage == "align" else ():
        first, last = _distances(run, kind)
        if first is not None and last is not None and last > first * (1 + MARGIN) and last - first > MARGIN:
            yield "drift", {"kind": label, "before": first, "after": last}


def _of_machine(run: Run, stage: str) -> About:
    lines = run.metrics.get(stage, ())
    late = sum(sum(series(lines, name)[1]) for name in (names.JUDGE_LATE, names.EVAL_JUDGE_LATE))
    if late > 0:
        yield "judge_late", {"count": f"{late:,.0f}"}
    if halved := halved_packs(finite_of(line) for line in lines):
        yield "halved", {"count": halved}
    ranks = [(_mean(values), what) for name, what in RANKS.items() if (values := series(lines, name)[1])]
    if ranks and max(ranks)[0] > UNEVEN:
        yield "uneven", {"value": max(ranks)[0], "what": max(ranks)[1]}


def live(run: Run, stage: str) -> tuple[list[Spell], set[str]]:
    """What a :class:`Watch` with the run's settings finds in the stage's metrics, and the warnings it gives.

    Of every rule and side one for the spells that are over, with the figures of the last, and one for what still holds
    at the end; the experts of all layers are one.
    """
    watch, warned = _watch(run, stage), set()
    held: dict[str, Spell] = {}  # by condition
    over: list[Spell] = []
    for step, line in _steps(run, stage):
        alerts = watch.alerts(StepStats(step, finite_of(line), {}, {}))
        warned |= {alert.text for alert in merged(alerts)}
        held |= {alert.condition: Spell(alert, step, None) for alert in alerts}
        over += [held.pop(name)._replace(over=step) for name in list(held) if not watch.holds(name)]
    last = {spell.alert.condition: spell for spell in over}
    return [*_grouped(list(last.values())), *_grouped(list(held.values()))], warned


def _grouped(spells: list[Spell]) -> list[Spell]:
    """The same with one spell for the experts of all layers."""
    alerts = merged([spell.alert for spell in spells])
    of = {spell.alert.condition: [spell] for spell in spells if spell.alert.rule != "experts"}
    of["experts"] = [spell for spell in spells if spell.alert.rule == "experts"]
    parts = [(alert, of[alert.condition]) for alert in alerts]
    return [
        Spell(alert, min(s.first for s in part), max((s.over for s in part if s.over is not None), default=None))
        for alert, part in parts
    ]


def _dated(spell: Spell) -> str:
    until = "on" if spell.over is None else f"until step {spell.over:,}"
    return f"from step {spell.first:,} {until}, {spell.alert.text}"


def _watch(run: Run, stage: str) -> Watch:
    """With the thresholds that the stage ran with; its defaults where it left no run.json."""
    try:
        return Watch.recorded(entries(run.settings.get(stage, {}), "watch"))
    except ValueError as error:
        raise DataError(f"{stage}/run.json: {error}; restore the file or remove it") from error


def _steps(run: Run, stage: str) -> list[tuple[int, dict[str, Any]]]:
    """The lines of optimizer steps, without evaluations and warnings."""
    return [
        (line["step"], line)
        for line in run.metrics.get(stage, ())
        if "warning" not in line and any(name not in BESIDE and not name.startswith(names.EVAL) for name in line)
    ]


def _is_skipped(line: Mapping[str, Any]) -> bool:
    """Whether a model was not updated, for a number that is not finite: its gradient's norm, or what came before."""
    norms = [line[name] for name in NORMS if name in line]
    return any(finite(value) is None for value in norms or [line[name] for name in line if line[name] is None])


def _is_cut_off(run: Run, stage: str) -> bool:
    return stage in run.settings and stage not in run.finished


def _setting(run: Run, stage: str, *path: str) -> Any:
    node = run.settings.get(stage, {})
    for name in path[:-1]:
        node = entries(node, name)
    return node.get(path[-1])


def _ends(run: Run, stage: str) -> tuple[float, float] | None:
    """Means of the first and of the last steps of a stage's own measure."""
    values = series(run.metrics.get(stage, ()), COURSES[stage][0])[1] if stage in COURSES else []
    count = min(LAST, len(values) // 2)
    return (_mean(values[:count]), _mean(values[-count:])) if count else None


def _before(run: Run, stage: str, name: str) -> tuple[float | None, str]:
    """A held-out figure of the policy that the stage started from, else of its own first evaluation; and of which."""
    start, expected = started_from(run, stage)
    if start is not None and name in (figures := stage_figures(run, start)):
        return figures[name], "" if expected else f" (after {LABEL[start]})"
    steps, values = series(run.metrics.get(stage, ()), f"{names.EVAL}{name}")
    return (values[0], f" (step {steps[0]:,.0f})") if len(values) > 1 else (None, "")


def _pair_accuracy(run: Run, side: str) -> float | None:
    """On held-out pairs, else the mean of the last steps."""
    held_out = stage_figures(run, "warmup").get(f"pair_accuracy_{side}")
    values = series(run.metrics.get("warmup", ()), names.PAIR_ACCURACY[side])[1][-LAST:]
    return held_out if held_out is not None or not values else _mean(values)


def _distances(run: Run, kind: str) -> tuple[float | None, float | None]:
    drift = entries(run.summary, "drift")
    start, _ = started_from(run, "align")
    before, after = (finite(entries(drift, stage or "").get(kind)) for stage in (start, "align"))
    return before, after


def _amount(value: float) -> str:
    """An accuracy: a share, or any number where a reward function of the user's own gives it."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
