"""Signs that a run goes wrong, as one table of rules: a running stage warns by them, and report.html judges by them.

What :class:`Watch` sees while a stage trains is in ``RULES``; what only its end shows is in ``ENDINGS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prism_fast import metric_names as names
from prism_fast.records import StepStats

EXPERT_FLOOR = 0.1  # of an even share of a layer's tokens: an expert below it has collapsed
SAMPLER_GAP = 0.1  # nats: mean |log-prob of the sampler - of the trainer|
CHANCE = 0.6  # share of pairs ranked right: guessing gives 0.5

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
        "experts collapse in layer {layer}: for {patience} steps, {experts} got less than {floor:.1%} of {kind} tokens",
        "raise the coefficient of the balance loss, or upcycle with more noise",
    ),
    "sampler_gap": (
        "sampler and trainer disagree: {value:.3g} nats a token, for {patience} steps above {limit:.3g}",
        "sample in the trainer's dtype, or correct by importance weights (importance_cap)",
    ),
}
ENDINGS = {
    "chance": (
        "the discriminator guesses on {side}: {value:.1%} of the pairs ranked right, chance is 50 %",
        "train the warm-up for longer or with a higher learning rate, and check that its pairs differ in {side}",
    ),
    "few_experts": (
        "experts have collapsed in layer {layer}: at the end, {experts} got less than {floor:.1%} of {kind} tokens",
        RULES["experts"][1],
    ),
    "no_gain": (
        "no gain: held-out accuracy went from {before:.1%} to {after:.1%}",
        "train for longer, or look at the reward and at the learning rate before going on from here",
    ),
    "drift": (
        "it drifts from the teacher: the distance of its {kind} grew from {before:.2f} to {after:.2f}",
        "check the discriminator's scores of that part, and lower the policy's learning rate",
    ),
}


class Watch:
    """Warns once when a condition has held for ``patience`` steps in a row, and again only after it has cleared.

    - entropy: below ``entropy_floor`` times its early level, the mean of its first ``patience`` values;
    - discriminator, each side: accuracy above ``saturation``;
    - format validity: below ``format_floor``, or more than ``format_margin`` below its best so far;
    - experts, each layer: one of them, or half of them in one kind of token, below EXPERT_FLOOR of an even share;
    - sampler against trainer: their mean gap above SAMPLER_GAP.

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

    def observe(self, stats: StepStats) -> list[str]:
        """The warnings that this step gives rise to: lines for a person, for `Monitor.warn`."""
        found = [
            self._entropy(stats),
            *(self._discriminator(stats, side) for side in names.SIDES),
            self._format(stats),
            *self._experts(stats),
            self._sampler_gap(stats),
        ]
        return [text for text in found if text is not None]

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

    def _holds(self, name: str, condition: bool) -> bool:
        """Whether ``condition`` has just held for ``patience`` steps: true at one step of every spell."""
        self._held[name] = self._held.get(name, 0) + 1 if condition else 0
        return self._held[name] == self.patience

    def _entropy(self, stats: StepStats) -> str | None:
        value = _finite(stats, names.ENTROPY)
        if value is None:
            return None
        if len(self._early_entropy) < self.patience:
            self._early_entropy.append(value)
            return None
        early = sum(self._early_entropy) / len(self._early_entropy)
        if not self._holds("entropy", value < self.entropy_floor * early):
            return None
        return sentence("entropy", value=value, patience=self.patience, floor=self.entropy_floor, early=early)

    def _discriminator(self, stats: StepStats, side: str) -> str | None:
        value = _finite(stats, names.DISCRIMINATOR_ACCURACY[side])
        if value is None or not self._holds(f"discriminator/{side}", value > self.saturation):
            return None
        return sentence("discriminator", side=side, value=value, patience=self.patience, limit=self.saturation)

    def _format(self, stats: StepStats) -> str | None:
        value = _finite(stats, names.FORMAT_VALID)
        if value is None:
            return None
        best = self._best_format = value if self._best_format is None else max(self._best_format, value)
        bound = max(self.format_floor, best - self.format_margin)
        if not self._holds("format", value < bound):
            return None
        return sentence("format", value=value, patience=self.patience, bound=bound, best=best)

    def _experts(self, stats: StepStats) -> list[str]:
        found = []
        for layer, shares in sorted(expert_shares(stats.metrics).items()):
            about = collapsed(shares)
            if self._holds(f"experts/{layer}", about is not None) and about is not None:
                found.append(sentence("experts", layer=layer, patience=self.patience, **about))
        return found

    def _sampler_gap(self, stats: StepStats) -> str | None:
        value = _finite(stats, names.SAMPLER_GAP_MEAN)
        if value is None or not self._holds("sampler_gap", value > SAMPLER_GAP):
            return None
        return sentence("sampler_gap", value=value, patience=self.patience, limit=SAMPLER_GAP)


def sentence(rule: str, **figures: Any) -> str:
    """What a rule of either table says of these figures, and what to do about it."""
    what, remedy = (RULES | ENDINGS)[rule]
    return f"{what}; {remedy}".format(**figures)


def expert_shares(metrics: Mapping[str, float | None]) -> dict[int, dict[str, dict[int, float]]]:
    """{layer: {kind of token: {expert: its share}}}; the kind "all" is the mean of the others."""
    shares: dict[int, dict[str, dict[int, float]]] = {}
    for name, value in metrics.items():
        place = names.expert_of(name)
        if place is not None and value is not None and math.isfinite(value):
            layer, kind, expert = place
            shares.setdefault(layer, {}).setdefault(kind, {})[expert] = value
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
