"""The policy objective as a value, which operators take as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prism_kernels.checks import number, one_of, wrong

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to +-20 before exp: exp(20) is 5e8, far from overflow in fp32

RATIOS = ("token", "sequence")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length")
KL_ESTIMATORS = ("k1", "k2", "k3")
STATISTICS: tuple[str, ...] = (
    "rows", "ratio_mean", "clip_low_fraction", "clip_high_fraction", "kl_old", "dual_clip_fraction", "kl_ref",
    "entropy_mean", "rollout_diff_mean", "rollout_diff_max", "importance_mean", "importance_capped_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class PolicyObjective:
    """A policy-gradient objective as a value; the formula is in linear_logprob/README.md (PPO clip: arXiv 1707.06347).

    >>> PolicyObjective.dapo(kl_coef=0.01, kl_estimator="k3")

    Raises ValueError for a value outside its range.
    """

    ratio: str = "token"  # | "sequence": one ratio per sequence (GSPO-token, arXiv 2507.18071)
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    dual_clip: float | None = None  # > 1: bounds the loss of negative advantages at -dual_clip * A (arXiv 1912.09729)
    aggregate: str = "token_mean"  # | "sequence_mean" | "sequence_sum" | "fixed_length"
    max_length: int | None = None  # tokens; read by "fixed_length" alone
    kl_coef: float = 0.0
    kl_estimator: str = "k1"  # | "k2" | "k3" (J. Schulman, "Approximating KL divergence", 2020)
    entropy_coef: float = 0.0
    importance_cap: float | None = None  # truncated importance weight between sampler and trainer
    # The objective as text, made here once: operators take no objects, and torch.compile reads it as a constant.
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        one_of("ratio", self.ratio, RATIOS)
        one_of("aggregate", self.aggregate, AGGREGATES)
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        checked = {
            "clip_low": number("clip_low", self.clip_low, at_least=0),
            "clip_high": number("clip_high", self.clip_high, at_least=0),
            "kl_coef": number("kl_coef", self.kl_coef),
            "entropy_coef": number("entropy_coef", self.entropy_coef),
        }
        if self.dual_clip is not None:
            checked["dual_clip"] = number("dual_clip", self.dual_clip, above=1, finite=False)
        if self.importance_cap is not None:
            checked["importance_cap"] = number("importance_cap", self.importance_cap, above=0, finite=False)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_length is not None and number("max_length", self.max_length, at_least=1) % 1 != 0:
            raise wrong("max_length", "a whole number of tokens", repr(self.max_length))
        if self.aggregate == "fixed_length" and self.max_length is None:
            raise wrong("max_length", "the longest response's tokens", "None", "aggregate='fixed_length' divides by it")
        values = (
            self.ratio, self.clip_low, self.clip_high, self.dual_clip, self.aggregate, self.max_length, self.kl_coef,
            self.kl_estimator, self.entropy_coef, self.importance_cap,
        )  # fmt: skip
        object.__setattr__(self, "spec", " ".join([str(value) for value in values]))

    @classmethod
    def grpo(cls, **changes) -> PolicyObjective:
        """Token ratio, clip 0.2, token mean (arXiv 2402.03300)."""
        return cls(**changes)

    @classmethod
    def dapo(cls, **changes) -> PolicyObjective:
        """Clip-higher 0.28 and dual clip 10, token mean (arXiv 2503.14476)."""
        return cls(**{"clip_high": 0.28, "dual_clip": 10.0, **changes})

    @classmethod
    def gspo(cls, **changes) -> PolicyObjective:
        """Sequence ratio, clips 3e-4 and 4e-4, mean over tokens and then over sequences (arXiv 2507.18071)."""
        fixed = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"}
        return cls(**{**fixed, **changes})

    @classmethod
    def dr_grpo(cls, max_length: int, **changes) -> PolicyObjective:
        """Summed over tokens and divided by S * max_length: no length bias (arXiv 2503.20783)."""
        return cls(**{"aggregate": "fixed_length", "max_length": max_length, **changes})

    @classmethod
    def parse(cls, spec: str) -> PolicyObjective:
        """The inverse of ``spec``."""
        words = (*RATIOS, *AGGREGATES, *KL_ESTIMATORS)
        values: list[Any] = [
            value if value in words else None if value == "None" else float(value) for value in spec.split()
        ]
        return cls(*values)
