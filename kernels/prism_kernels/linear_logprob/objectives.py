"""The records of the LM-head ops: what they return, and the policy objective they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

IGNORE = -100  # a target that skips its row, torch's convention
LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to +-20 before exp: exp(20) is 5e8, far from overflow in fp32

RATIOS = ("token", "sequence")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length")
KL_ESTIMATORS = ("k1", "k2", "k3")


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` returns: each (T,), fp32 (fp64 for fp64 in), differentiable, 0 in skipped rows."""

    logprob: Tensor  # z[target] - logsumexp, <= 0
    logsumexp: Tensor
    entropy: Tensor | None  # nats; None unless asked for


class PolicyLoss(NamedTuple):
    """What :func:`linear_policy_loss` returns. All but ``loss`` is detached, fp32 (fp64 for fp64 inputs).

    ``stats`` holds 0-d tensors, means over the unmasked rows that were computed (rows of zero advantage are not where
    ``with_logprob=False`` dropped them). What has nothing to measure is absent; on a GPU and under torch.compile, where
    the host cannot see that a batch has no unmasked row, it is NaN instead.

    ========================== ====================================================================== ===============
    name                       meaning                                                                present with
    ========================== ====================================================================== ===============
    rows                       number of rows measured: the means' weight when ranks average        always
    ratio_mean                 mean ratio                                                             always
    clip_low_fraction          rows whose gradient the lower clip removed (ratio < 1 - low, A < 0)    always
    clip_high_fraction         rows whose gradient the upper clip removed (ratio > 1 + high, A > 0)   always
    dual_clip_fraction         rows bounded by -dual_clip * A                                         dual_clip
    kl_old                     mean of exp(d) - d - 1, d a token's log-ratio: KL(old || now), >= 0     always
    kl_ref                     mean of the objective's estimator against ref_logprob                  ref_logprob
    entropy_mean               mean entropy, nats                                                     an entropy
    rollout_diff_mean, _max    mean and maximum of abs(old - rollout_logprob)                         rollout_logprob
    importance_mean            mean importance weight, after the cap                                  importance_cap
    importance_capped_fraction rows whose weight the cap cut                                          importance_cap
    ========================== ====================================================================== ===============
    """

    loss: Tensor  # scalar
    logprob: Tensor | None  # (T,), 0 in skipped rows; None with with_logprob=False
    entropy: Tensor | None  # (T,), 0 in skipped rows; None unless with_entropy=True
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class PolicyObjective:
    """A policy-gradient objective as a value; the formula is in README.md (PPO clip: arXiv 1707.06347).

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
        _one_of("ratio", self.ratio, RATIOS)
        _one_of("aggregate", self.aggregate, AGGREGATES)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "dual_clip", "importance_cap", "max_length"):
            value = getattr(self, name)
            if value is None and name in ("dual_clip", "importance_cap", "max_length"):
                continue
            if not is_number(value):
                raise ValueError(f"{name}: got {value!r}, expected a number")
            if name != "max_length":
                object.__setattr__(self, name, float(value))
        for name in ("clip_low", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number >= 0")
        for name in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: got {self.dual_clip}, expected None or a number > 1")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap: got {self.importance_cap}, expected None or a number > 0")
        if self.max_length is not None and not (self.max_length >= 1 and self.max_length % 1 == 0):
            raise ValueError(f"max_length: got {self.max_length}, expected a number of tokens >= 1")
        if self.aggregate == "fixed_length" and self.max_length is None:
            raise ValueError("max_length: aggregate='fixed_length' divides by it; pass the longest response's tokens")
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
        return cls(*(value if value in _WORDS else None if value == "None" else float(value) for value in spec.split()))


_WORDS = (*RATIOS, *AGGREGATES, *KL_ESTIMATORS)


def is_number(value: object) -> bool:
    """Real and single: also numpy's, and a 0-d tensor."""
    return isinstance(value, (int, float)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
