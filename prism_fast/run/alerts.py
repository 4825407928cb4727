"""Signs that a run goes wrong, as one table of rules: a running stage warns by them, and report.html judges by them.

What :class:`Watch` sees while a stage trains is in ``RULES``; what only its end shows is in ``ENDINGS``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from prism_fast import metric_names as names
from prism_fast.config import WatchConfig
from prism_fast.records import StepStats

EXPERT_FLOOR = 0.1  # of an even share of a layer's tokens: an expert below it has collapsed
SAMPLER_GAP = 0.1  # nats: mean |log-prob of the sampler - of the trainer|
NO_SIGNAL = 0.9  # share of responses without an advantage
CHANCE = 0.6  # share of pairs ranked right: guessing gives 0.5
FOLLOWS = 0.5  # rank correlation from which scores follow something
FEW_PAIRS = 20  # of a right and a wrong part: a share of fewer says nothing
SHOWN_LAYERS = 6  # of which a sentence gives the numbers

# What happens, and what to do about it.
RULES = {
    "entropy": (
        "entropy collapses: {value:.3g}, for {patience} steps below {floor:.0%} of its early level {early:.3g}",
        "lower the learning rate, or go back to an earlier checkpoint",
    ),
    "discriminator": (
        "the discriminator saturates on {side}: accuracy {value:.1%}, for {patience} steps above {limit:.0%}; its "
        "scores tell the policy little",
        "lower its learning rate",
    ),
    "format": (
        "format validity falls: {value:.1%}, for {patience} steps below {bound:.1%} (best {best:.1%})",
        "raise the format penalty or lower the learning rate",
    ),
    "experts": (
        "experts collapse in {layers}: for {patience} steps, {experts} got less than {floor:.1%} of {kind} tokens",
        "raise the coefficient of the balance loss, or upcycle with more noise",
    ),
    "sampler_gap": (
        "sampler and trainer disagree: {value:.3g} nats a token, for {patience} steps above {limit:.3g}",
        "sample in the trainer's dtype, or correct by importance weights (importance_cap)",
    ),
    "no_signal": (
        "hardly a response teaches anything: {value:.1%} have no advantage, for {patience} steps above {limit:.0%}",
        "choose prompts by pass rate (data filter), or sample more responses per prompt",
    ),
}
ENDINGS = {
    "empty": ("no step was recorded", "see what the command printed when it stopped, and start it again"),
    "unfinished": ("it is not finished", "go on with --resume"),
    "stopped": (
        "it stopped itself after {count} skipped updates in a row, whose numbers were not finite",
        "lower the learning rate, and go on with --resume --accept-changes",
    ),
    "skipped": (
        "{count} of {steps} updates were skipped, the last at step {step}, whose numbers were not finite",
        "see the warnings of these steps, and lower the learning rate",
    ),
    "idle": (
        "{count} of {steps} steps updated nothing",
        "see their warnings: bad records, or groups that are all right or all wrong; choose prompts by pass rate "
        "(data filter)",
    ),
    "chance": (
        "the discriminator guesses on {side}: {value:.1%} of the pairs ranked right, chance is 50 %",
        "train the warm-up for longer or with a higher learning rate, and check that its pairs differ in {side}",
    ),
    "reversed": (
        "the discriminator ranks the student above the teacher on {side}: {value:.1%} of the pairs ranked right",
        "check that the two sides of its pairs are not swapped",
    ),
    "style": (
        "the discriminator's {side} scores follow {what} alone (rank correlation {rank:+.2f}): of two parts of equal "
        "{equal} the right one scores higher in {value:.1%} of the pairs, chance is 50 %",
        "warm it up with hard negatives (data pairs --hard-negatives), or correct by length (length_correction)",
    ),
    "outrun": (
        "the policy has outrun the discriminator on {side}: it prefers the teacher in {value:.1%} of the pairs, chance "
        "is 50 %",
        "raise the discriminator's learning rate, or lower the policy's",
    ),
    "few_experts": (
        "experts have collapsed in {layers}: at the end, {experts} got less than {floor:.1%} of {kind} tokens",
        RULES["experts"][1],
    ),
    "invalid": (
        "only {value:.1%} of the responses have a valid format",
        "train the SFT for longer, on demonstrations that all have the three parts, or raise the format penalty",
    ),
    "cut": (
        "responses are as long as they may be: {value:.0f} tokens on average of at most {limit}",
        "raise rollout.max_response_tokens, or add prompts with shorter answers",
    ),
    "no_gain": (
        "no gain: held-out accuracy went from {before} to {after}",
        "train for longer, or look at the reward and at the learning rate before going on from here",
    ),
    "no_reward": (
        "no gain: the reward in training went from {before:.3g} to {after:.3g}",
        "train for longer, or look at the reward and at the learning rate before going on from here",
    ),
    "loss": (
        "the loss rose from {before:.3g} to {after:.3g}",
        "lower the learning rate, or warm it up for longer",
    ),
    "past_best": (
        "held-out accuracy fell from its best, {best} at step {step}, to {after}",
        "go on from the checkpoint of that step, which is kept, or train for fewer steps",
    ),
    "drift": (
        "it drifts from the teacher: the distance of its {kind} grew from {before:.2f} to {after:.2f}",
        "check the discriminator's scores of that part, and lower the policy's learning rate",
    ),
    "judge_late": (
        "the judge gave no verdict in time on {count} answers, which count as not right",
        "leave it more of the processor: fewer run.threads, fewer programs beside it",
    ),
    "halved": (
        "{count} did not fit in memory and went in two halves, which takes longer",
        "lower run.tokens_per_pack",
    ),
    "uneven": (
        "processes wait for the slowest: it has {value:.1f} times the mean of {what}",
        "raise batch_size or rollout.prompts_per_step, so that there is more to share out",
    ),
    "unmeasured": (
        "nothing was measured on held-out prompts",
        "give data.eval_files, or evaluate its final model with prism-fast eval",
    ),
    "others": ("{count}", "see Warnings"),
}


class Alert(NamedTuple):
    """What a rule found; ``condition`` is what must clear before it is found again, ``figures`` what its text names."""

    condition: str
    rule: str
    figures: dict[str, Any]

    @property
    def text(self) -> str:
        return sentence(self.rule, **self.figures)


class Watch:
    """Warns once when a condition has held for ``patience`` steps in a row, and again only after it has cleared.

    - entropy: below ``entropy_floor`` times its early level, the mean of its first ``patience`` values;
    - discriminator, each side: accuracy above ``saturation``;
    - format validity: below ``format_floor``, or more than ``format_margin`` below its best so far;
    - experts, each layer: one of them, or half of them in one kind of token, below EXPERT_FLOOR of an even share;
    - sampler against trainer: their mean gap above SAMPLER_GAP;
    - responses without an advantage: a share above NO_SIGNAL.

    A step that lacks a metric, or has it not finite, says nothing about it: it neither counts nor clears.
    ``state()`` is JSON and goes into a checkpoint, so that a resumed run warns where the uninterrupted one would have.
    """

    def __init__(
        self,
        *,
        entropy_floor: float = 0.1,
        saturation: float = 0.98,
        format_floor: float = 0.5,
        format_margin: float = 0.2,
        patience: int = 20,
    ):
        shares = {
            "entropy_floor": entropy_floor,
            "saturation": saturation,
            "format_floor": format_floor,
            "format_margin": format_margin,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {value}")
        if patience < 1:
            raise ValueError(f"patience: expected at least one step, got {patience}")
        self.entropy_floor, self.saturation = entropy_floor, saturation
        self.format_floor, self.format_margin = format_floor, format_margin
        self.patience = patience
        self._early_entropy: list[float] = []
        self._best_format: float | None = None
        self._held: dict[str, int] = {}  # steps in a row, by condition

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> Watch:
        """By the settings ``watch`` of a run.json, of which this version knows some. ValueError where one is out of
        range."""
        try:
            known = WatchConfig(**{name: settings[name] for name in WatchConfig.model_fields if name in settings})
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, ("watch", *fault["loc"])))
            raise ValueError(f"{where}: {fault['msg']}") from error
        return cls(**known.model_dump())

    def observe(self, stats: StepStats) -> list[str]:
        """The warnings that this step gives rise to: lines for a person, for `Monitor.warn`."""
        return [alert.text for alert in merged(self.alerts(stats))]

    def alerts(self, stats: StepStats) -> list[Alert]:
        """What begins to hold at this step, every layer's experts apart."""
        found = [
            self._entropy(stats),
            *(self._discriminator(stats, side) for side in names.SIDES),
            self._format(stats),
            *self._experts(stats),
            self._above("sampler_gap", stats, names.SAMPLER_GAP_MEAN, SAMPLER_GAP),
            self._above("no_signal", stats, names.ZERO_ADVANTAGE, NO_SIGNAL),
        ]
        return [alert for alert in found if alert is not None]

    def holds(self, condition: str) -> bool:
        """Whether it has held for ``patience`` steps, up to the last one observed."""
        return self._held.get(condition, 0) >= self.patience

    def state(self) -> dict[str, Any]:
        return {
            "early_entropy": list(self._early_entropy),
            "best_format": self._best_format,
            "held": dict(self._held),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from ``state()`` of a watch with the same settings. Raises KeyError where an entry is missing."""
        self._early_entropy = [float(value) for value in state["early_entropy"]]
        self._best_format = state["best_format"]
        self._held = {name: int(count) for name, count in state["held"].items()}

    def _begins(self, condition: str, rule: str, now: bool, **figures: Any) -> Alert | None:
        """An alert where it has held for ``patience`` steps just ``now``: at one step of every spell."""
        self._held[condition] = self._held.get(condition, 0) + 1 if now else 0
        if self._held[condition] != self.patience:
            return None
        return Alert(condition, rule, {"patience": self.patience, **figures})

    def _entropy(self, stats: StepStats) -> Alert | None:
        value = _finite(stats, names.ENTROPY)
        if value is None:
            return None
        if len(self._early_entropy) < self.patience:
            self._early_entropy.append(value)
            return None
        early = sum(self._early_entropy) / len(self._early_entropy)
        low = value < self.entropy_floor * early
        return self._begins("entropy", "entropy", low, value=value, floor=self.entropy_floor, early=early)

    def _discriminator(self, stats: StepStats, side: str) -> Alert | None:
        name = names.DISCRIMINATOR_ACCURACY[side]
        return self._above("discriminator", stats, name, self.saturation, f"discriminator/{side}", side=side)

    def _format(self, stats: StepStats) -> Alert | None:
        value = _finite(stats, names.FORMAT_VALID)
        if value is None:
            return None
        best = self._best_format = value if self._best_format is None else max(self._best_format, value)
        bound = max(self.format_floor, best - self.format_margin)
        return self._begins("format", "format", value < bound, value=value, bound=bound, best=best)

    def _experts(self, stats: StepStats) -> list[Alert | None]:
        found = []
        for layer, shares in sorted(expert_shares(stats.metrics).items()):
            about = collapsed(shares)
            found.append(
                self._begins(f"experts/{layer}", "experts", about is not None, **{"layer": layer, **(about or {})})
            )
        return found

    def _above(
        self, rule: str, stats: StepStats, name: str, limit: float, condition: str | None = None, **figures: Any
    ) -> Alert | None:
        value = _finite(stats, name)
        if value is None:
            return None
        return self._begins(condition or rule, rule, value > limit, value=value, limit=limit, **figures)


def merged(alerts: list[Alert]) -> list[Alert]:
    """The same with one alert for the experts of all layers."""
    layers = [alert for alert in alerts if alert.rule == "experts"]
    if not layers:
        return alerts
    first = alerts.index(layers[0])
    others = [alert for alert in alerts if alert.rule != "experts"]
    one = Alert("experts", "experts", layers_figures([alert.figures for alert in layers]))
    return [*others[:first], one, *others[first:]]


def layers_figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a sentence about several layers' experts: those of the first, and which layers they are."""
    layers = [figures["layer"] for figures in found]
    if len(layers) == 1:
        return {**found[0], "layers": f"layer {layers[0]}"}
    shown = ", ".join(map(str, layers[:SHOWN_LAYERS]))
    more = f" and {len(layers) - SHOWN_LAYERS} more" if len(layers) > SHOWN_LAYERS else ""
    return {**found[0], "layers": f"layers {shown}{more} (here of layer {layers[0]})"}


def halved_packs(steps: Iterable[Mapping[str, float | None]]) -> str | None:
    """How many packs went in halves in these steps, as the rule "halved" says it; None where none did."""
    count = int(sum(metrics.get(names.HALVED_PACKS) or 0 for metrics in steps))
    return f"{count:,} pack{'' if count == 1 else 's'}" if count else None


def sentence(rule: str, **figures: Any) -> str:
    """What a rule of either table says of these figures, and what to do about it."""
    what, remedy = (RULES | ENDINGS)[rule]
    return f"{what}; {remedy}".format(**figures)


def style_alone(side: str, figures: Mapping[str, float]) -> str | None:
    """What is said of the figures of a probe (steps/probe.py) where scores follow form or length and not what is right,
    as far as parts of equal form and length show it."""
    name, equal = next(
        ((each, words) for each, words in (("_form_length", "form and length"), ("_form", "form"))
         if figures.get(f"pairs{each}", 0.0) >= FEW_PAIRS),
        ("", ""),
    )  # fmt: skip
    ranks = {what: figures[f"rank_{what}"] for what in ("form", "length") if f"rank_{what}" in figures}
    if not name or not ranks or figures[f"auc{name}"] >= CHANCE:
        return None
    what = max(ranks, key=lambda each: abs(ranks[each]))
    if abs(ranks[what]) < FOLLOWS:
        return None
    return sentence("style", side=side, what=what, rank=ranks[what], equal=equal, value=figures[f"auc{name}"])


def expert_shares(metrics: Mapping[str, float | None]) -> dict[int, dict[str, dict[int, float]]]:
    """{layer: {kind of token: {expert: its share}}}; the kind "all" is the mean of the others.

    Without a layer that computed less than others did: alignment's last one takes the tokens that are read alone, the
    closing tags of parts, and a few equal tokens have few experts.
    """
    shares: dict[int, dict[str, dict[int, float]]] = {}
    for name, value in metrics.items():
        place = names.expert_of(name)
        if place is not None and value is not None and math.isfinite(value):
            layer, kind, expert = place
            shares.setdefault(layer, {}).setdefault(kind, {})[expert] = value
    most = max(map(len, shares.values()), default=0)
    shares = {layer: kinds for layer, kinds in shares.items() if len(kinds) == most}
    for kinds in shares.values():
        kinds["all"] = mean_shares(list(kinds.values()))
    return shares


def mean_shares(parts: list[dict[int, float]]) -> dict[int, float]:
    """The mean share of every expert."""
    return {expert: sum(part.get(expert, 0.0) for part in parts) / len(parts) for part in parts for expert in part}


def collapsed(kinds: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """What is said of a layer where an expert gets nearly none of all tokens, or half of the experts of one kind's."""
    for kind in sorted(kinds, key=lambda kind: kind != "all"):
        floor = EXPERT_FLOOR / len(kinds[kind])
        few = [expert for expert, share in kinds[kind].items() if share < floor]
        if len(few) >= (1 if kind == "all" else max(1, len(kinds[kind]) // 2)):
            experts = f"expert{'s' if len(few) > 1 else ''} {', '.join(map(str, sorted(few)))}"
            return {"experts": experts, "floor": floor, "kind": kind.replace("_", " ")}
    return None


def _finite(stats: StepStats, name: str) -> float | None:
    value = stats.metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None
