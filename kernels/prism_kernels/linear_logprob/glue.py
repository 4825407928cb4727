"""Objectives as O(T) functions between log-probs and gradients: ``glue(logprob, entropy, rows)``.

A glue gets the log-probs (R,) of some rows (all rows of a batch, chunk by chunk), their entropies or None, and ``rows``
(R,) int64, their indices into the op's input. It returns the loss of these rows (0-d; chunks add up), and the loss's
derivatives by log-prob (R,) and by entropy (R,), or None. It runs without grad.

The two losses of this package also take skipped rows, where the host did not know them: they give 0. A GPU has kernels
in their place (triton_glue.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.linear_logprob.engine import InTorch
from prism_kernels.linear_logprob.objectives import LOG_RATIO_LIMIT, STATISTICS, PolicyObjective
from prism_kernels.linear_logprob.plan import Plan
from prism_kernels.linear_logprob.records import IGNORE, CrossEntropyBatch, Glue, PolicyBatch


def cispo(advantages: Tensor, old_logprob: Tensor, normalizer: float | Tensor, clip_high: float = 5.0) -> Glue:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): REINFORCE weighted by a clipped, detached ratio.

    loss = -sum(min(ratio, 1 + clip_high).detach() * A * logprob) / normalizer: a clipped token keeps its gradient,
    which PPO's clip takes away. ``advantages``, ``old_logprob``: (T,); ``normalizer``: the global number of tokens.

    >>> linear_objective(hidden, weight, targets, cispo(advantages, old_logprob, (targets != -100).sum()))
    """

    def glue(logprob: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        log_ratio = (logprob - old_logprob[rows]).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        d_logprob = -log_ratio.exp().clamp(max=1 + clip_high) * advantages[rows] / normalizer
        return (d_logprob * logprob).sum(), d_logprob, None

    return glue


class CrossEntropy(InTorch):
    """sum(row_weight * -logprob) / normalizer; the batch beside hidden."""

    def __init__(self, batch: CrossEntropyBatch, plan: Plan, dtype: torch.dtype):
        super().__init__(self.of_rows, plan, dtype)
        targets, row_weight, normalizer = batch
        kept = targets != IGNORE
        weight = torch.ones_like(targets, dtype=dtype) if row_weight is None else row_weight.to(dtype)
        weight = weight / (kept.sum() if normalizer is None else normalizer)
        self.weight = torch.where(kept, weight, 0.0)  # nothing unmasked: 0, not 0 / 0

    def of_rows(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        d_logprob = -self.weight[rows]
        return (d_logprob * logprob).sum(), d_logprob, None


class Policy(InTorch):
    """The policy loss of README.md: analytic derivatives, and sums for the statistics.

    The batch lies beside hidden. Only ratio = "sequence" off-policy couples rows: then every call must hold whole
    sequences, or :meth:`see_all` must have been called.
    """

    def __init__(self, objective: PolicyObjective, batch: PolicyBatch, plan: Plan, dtype: torch.dtype):
        super().__init__(self.of_rows, plan, dtype)
        targets, advantages, sequence_start, self.old, self.ref, self.rollout, normalizer = batch
        num_rows, num_sequences = targets.shape[0], sequence_start.shape[0] - 1
        self.objective = objective
        self.kept = targets != IGNORE
        # The sequence of every row; an empty sequence owns none.
        every = torch.arange(num_rows, device=targets.device)
        self.sequence = torch.searchsorted(sequence_start[1:].long(), every, right=True)
        per_row = advantages.shape[0] == num_rows != num_sequences
        advantages = advantages.to(dtype)
        self.advantage = advantages if per_row else advantages[self.sequence]
        # Exact in any order: counts below 2^24 (fp32).
        self.count = self.kept.new_zeros(num_sequences, dtype=dtype).index_add_(0, self.sequence, self.kept.to(dtype))
        self.weight = torch.where(self.kept, self._weights(normalizer), 0.0)
        self.mean_log_ratio: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def _weights(self, normalizer: Tensor | None) -> Tensor:
        """(T,) or 0-d: the factor of a row's loss in the total."""
        objective = self.objective
        if objective.aggregate == "token_mean":
            return 1 / (self.count.sum() if normalizer is None else normalizer)
        # new_full, as new_tensor would copy from the host and wait for it
        divisor = self.count.new_full((), self.count.shape[0]) if normalizer is None else normalizer
        if objective.aggregate == "fixed_length":
            assert objective.max_length is not None  # the objective has checked it
            divisor = divisor * objective.max_length
        if objective.aggregate == "sequence_mean":
            return 1 / (self.count[self.sequence] * divisor)
        return 1 / divisor

    def see_all(self, logprob: Tensor) -> None:
        """All log-probs (R,), before calls with parts of sequences."""
        logprob = self.plan.spread(logprob)
        log_ratio = self._log_ratio(logprob, torch.arange(logprob.shape[0], device=logprob.device))
        self.mean_log_ratio = self._mean_by_sequence(log_ratio, self.sequence)

    def _log_ratio(self, logprob: Tensor, rows: Tensor) -> Tensor:
        if self.old is None:  # 0, but NaN where the definition's is: a loss of 1 * A would hide it
            return torch.where(self.kept[rows], logprob - logprob, 0.0)
        log_ratio = torch.where(self.kept[rows], logprob - self.old[rows].to(logprob.dtype), 0.0)
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def _mean_by_sequence(self, log_ratio: Tensor, sequence: Tensor) -> Tensor:
        # In fp64, whose rounding hides the order in which a GPU adds.
        total = log_ratio.new_zeros(self.count.shape[0], dtype=torch.float64)
        return (total.index_add_(0, sequence, log_ratio.double()) / self.count).to(log_ratio.dtype)

    def of_rows(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        objective, kept = self.objective, self.kept[rows]
        old = logprob if self.old is None else torch.where(kept, self.old[rows].to(logprob.dtype), 0.0)
        weight = self.weight[rows]
        loss, d_logprob = self._surrogate(logprob, rows, kept)
        if self.rollout is not None:
            importance = self._importance(old, self.rollout[rows], kept)
            loss, d_logprob = loss * importance, d_logprob * importance
        if self.ref is not None:
            kl, d_kl = self._kl(logprob, self.ref[rows], kept)
            if objective.kl_coef != 0:  # else only a statistic, which may be infinite
                loss = loss + objective.kl_coef * kl
                d_logprob = d_logprob + objective.kl_coef * d_kl
        d_entropy = None
        if entropy is not None:
            self._add("entropy_mean", torch.where(kept, entropy, 0.0))
            if objective.entropy_coef != 0:
                loss = loss - objective.entropy_coef * entropy
                d_entropy = -objective.entropy_coef * weight
        # where, not a product: a skipped row may carry NaN in what came from outside.
        return torch.where(kept, weight * loss, 0.0).sum(), torch.where(kept, weight * d_logprob, 0.0), d_entropy

    def _surrogate(self, logprob: Tensor, rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, dloss/dlogprob), not yet weighted."""
        objective = self.objective
        advantage = torch.where(kept, self.advantage[rows], 0.0)
        log_ratio = self._log_ratio(logprob, rows)
        self._add("kl_old", log_ratio.exp() - log_ratio - 1)
        slope = torch.ones_like(log_ratio)  # dratio/dlogprob over ratio: 0 where the log-ratio was clamped
        if objective.ratio == "sequence":
            mean = self.mean_log_ratio
            if mean is None:
                mean = self._mean_by_sequence(log_ratio, self.sequence[rows])
            ratio = torch.where(kept, mean[self.sequence[rows]], 0.0).exp()
        else:
            ratio = log_ratio.exp()
            if self.old is not None:
                raw = logprob - self.old[rows].to(logprob.dtype)
                slope = (raw.abs() <= LOG_RATIO_LIMIT).to(slope.dtype)
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        free = ratio * advantage
        clipped = ratio.clamp(low, high) * advantage
        # Not where(free <= clipped, ...), which would give the loss NaN of a NaN advantage the gradient 0.
        loss, d_logprob = -torch.minimum(free, clipped), torch.where(free > clipped, 0.0, -free * slope)
        self._add("rows", kept)
        self._add("ratio_mean", torch.where(kept, ratio, 0.0))
        self._add("clip_low_fraction", (ratio < low) & (advantage < 0))
        self._add("clip_high_fraction", (ratio > high) & (advantage > 0))
        if objective.dual_clip is not None:
            bound = -objective.dual_clip * advantage
            bounded = (advantage < 0) & (loss > bound)
            loss, d_logprob = torch.where(bounded, bound, loss), torch.where(bounded, 0.0, d_logprob)
            self._add("dual_clip_fraction", bounded)
        return loss, d_logprob

    def _importance(self, old: Tensor, rollout: Tensor, kept: Tensor) -> Tensor | float:
        difference = old - torch.where(kept, rollout.to(old.dtype), 0.0)
        self._add("rollout_diff_mean", difference.abs())
        if difference.numel():
            largest = difference.abs().max()
            self.sums["rollout_diff_max"] = torch.maximum(self.sums.get("rollout_diff_max", largest), largest)
        cap = self.objective.importance_cap
        if cap is None:
            return 1.0
        raw = difference.exp()
        importance = raw.clamp(max=cap)
        self._add("importance_mean", torch.where(kept, importance, 0.0))
        self._add("importance_capped_fraction", (raw > cap) & kept)
        return importance

    def _kl(self, logprob: Tensor, ref: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(estimate, its derivative by logprob)."""
        raw = torch.where(kept, ref.to(logprob.dtype) - logprob, 0.0)
        difference = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        inside = (raw.abs() <= LOG_RATIO_LIMIT).to(raw.dtype)
        if self.objective.kl_estimator == "k1":
            kl, d_kl = -raw, torch.ones_like(raw)
        elif self.objective.kl_estimator == "k2":
            kl, d_kl = difference.square() / 2, -difference * inside
        else:
            kl, d_kl = difference.exp() - difference - 1, (1 - difference.exp()) * inside
        self._add("kl_ref", kl)
        return kl, d_kl

    def _add(self, name: str, values: Tensor) -> None:
        dtype = self.weight.dtype
        self.sums[name] = self.sums.get(name, 0.0) + values.sum(dtype=dtype)

    def totals(self) -> tuple[Tensor, Tensor]:
        """(loss, STATISTICS); NaN where no row was there to measure."""
        nothing = self.weight.new_zeros(())
        rows = self.sums.get("rows", nothing)
        divisor = {"rows": rows.new_ones(()), "rollout_diff_max": rows / rows}  # 0 / 0: nothing to take the maximum of
        means = [self.sums.get(name, nothing) / divisor.get(name, rows) for name in STATISTICS]
        return self.loss, torch.stack(means)


def statistic_names(objective: PolicyObjective, batch: PolicyBatch, with_entropy: bool) -> tuple[str, ...]:
    """The statistics of :class:`PolicyLoss` that these inputs allow."""
    names = ["rows", "ratio_mean", "clip_low_fraction", "clip_high_fraction", "kl_old"]
    if objective.dual_clip is not None:
        names.append("dual_clip_fraction")
    if batch.ref is not None:
        names.append("kl_ref")
    if with_entropy or objective.entropy_coef != 0:
        names.append("entropy_mean")
    if batch.rollout is not None:
        names += ["rollout_diff_mean", "rollout_diff_max"]
        if objective.importance_cap is not None:
            names += ["importance_mean", "importance_capped_fraction"]
    return tuple(names)
