"""Signs that a run goes wrong: entropy collapses, the discriminator saturates, format validity falls."""

from __future__ import annotations

import math
from typing import Any

from prism_fast import metric_names as names
from prism_fast.records import StepStats


class Watch:
    """Warns once when a condition has held for ``patience`` steps in a row, and again only after it has cleared.

    - entropy: below ``entropy_floor`` times its early level, the mean of its first ``patience`` values;
    - discriminator, each side: accuracy above ``saturation``;
    - format validity: below ``format_floor``, or more than ``format_margin`` below its best so far.

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
        found = [self._entropy(stats), *(self._discriminator(stats, side) for side in names.SIDES), self._format(stats)]
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
        return (
            f"entropy collapses: {value:.3g}, for {self.patience} steps below {self.entropy_floor:.0%} of its early "
            f"level {early:.3g}; lower the learning rate, or go back to an earlier checkpoint"
        )

    def _discriminator(self, stats: StepStats, side: str) -> str | None:
        value = _finite(stats, names.DISCRIMINATOR_ACCURACY[side])
        if value is None or not self._holds(f"discriminator/{side}", value > self.saturation):
            return None
        return (
            f"the discriminator saturates on {side}: accuracy {value:.1%}, for {self.patience} steps above "
            f"{self.saturation:.0%}; its scores tell the policy little: lower its learning rate"
        )

    def _format(self, stats: StepStats) -> str | None:
        value = _finite(stats, names.FORMAT_VALID)
        if value is None:
            return None
        best = self._best_format = value if self._best_format is None else max(self._best_format, value)
        bound = max(self.format_floor, best - self.format_margin)
        if not self._holds("format", value < bound):
            return None
        return (
            f"format validity falls: {value:.1%}, for {self.patience} steps below {bound:.1%} (best {best:.1%}); "
            f"raise the format penalty or lower the learning rate"
        )


def _finite(stats: StepStats, name: str) -> float | None:
    value = stats.metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None
