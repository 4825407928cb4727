"""The launches of the losses' glue: which objective it is, where its batch lies, and what each chunk leaves.

T rows of the input, R rows computed (plan), S sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.linear_logprob import triton_objective as kernels
from prism_kernels.linear_logprob.engine import Upstream
from prism_kernels.linear_logprob.objectives import STATISTICS, PolicyObjective
from prism_kernels.linear_logprob.plan import Plan
from prism_kernels.linear_logprob.records import IGNORE, CrossEntropyBatch, PolicyBatch
from prism_kernels.linear_logprob.triton_objective import COLUMNS

ROWS, WARPS = 512, 4  # of a program
SUMS = 64  # programs at a time whose sums are added up


class Scalars(NamedTuple):
    """Numbers that the kernels take, in their order."""

    clip_low: float = 1.0  # bounds of the ratio
    clip_high: float = 1.0
    dual_clip: float = 1.0
    cap: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    max_length: float = 1.0


class Objective:
    """An objective of one call, its batch beside hidden: called chunk by chunk with their statistics. ``couples``: a
    row's gradient depends on other rows' log-probs."""

    couples = False

    def __init__(self, plan: Plan, dtype: torch.dtype):
        self.plan, self.dtype = plan, dtype
        blocks = [-(-(stop - start) // ROWS) for start, stop in plan.chunks]
        self.first = {start: sum(blocks[:i]) for i, (start, _) in enumerate(plan.chunks)}
        self.partial = plan.targets.new_empty((sum(blocks), COLUMNS), dtype=dtype)
        self.rows = plan.targets if plan.rows is None else plan.rows
        # What is not read is stood for by something of the same dtype, so that nothing is compiled for its absence.
        self.sequence = self.count = plan.targets
        self.advantage = self.mean = self.old = self.ref = self.rollout = self.divisor = self.partial
        self.flags = _bits((kernels.COMPACT, plan.rows is not None))
        self.scalars = Scalars()

    @property
    def by_row(self) -> tuple[Tensor, ...]:
        """What ``_objective_of_rows`` reads."""
        return (
            self.rows, self.sequence, self.advantage, self.count, self.mean, self.old, self.ref, self.rollout,
            self.divisor,
        )  # fmt: skip

    def __call__(self, start: int, stop: int, logprob: Tensor, entropy: Tensor | None) -> Upstream:
        """Of rows [start, stop) of the plan, whose log-probs and entropies are these."""
        d_logprob = torch.empty_like(logprob)
        d_entropy = torch.empty_like(logprob) if self.scalars.entropy_coef != 0 else None
        kernels.lm_head_objective_fwd_kernel[(-(-(stop - start) // ROWS),)](
            logprob,
            logprob if entropy is None else entropy,
            self.plan.targets,
            *self.by_row,
            d_logprob,
            d_logprob if d_entropy is None else d_entropy,
            self.partial,
            self.flags | _bits((kernels.ENTROPY, entropy is not None)),
            start,
            stop,
            self.first[start],
            *self.scalars,
            BLOCK=ROWS,
            num_warps=WARPS,
        )
        return Upstream(d_logprob, None, d_entropy)

    def totals(self) -> tuple[Tensor, Tensor]:
        """(loss, STATISTICS) of all chunks."""
        loss, means = self.partial.new_empty(()), self.partial.new_empty(len(STATISTICS))
        kernels.lm_head_objective_fwd_total_kernel[(1,)](
            self.partial, loss, means, len(self.partial), BLOCK=SUMS, num_warps=WARPS
        )
        return loss, means


class CrossEntropy(Objective):
    """sum(row_weight * -logprob) / normalizer."""

    def __init__(self, batch: CrossEntropyBatch, plan: Plan, dtype: torch.dtype):
        targets, row_weight, normalizer = batch
        super().__init__(plan, dtype)
        self.flags |= _bits((kernels.NLL, True), (kernels.ONES, row_weight is None), (kernels.BY_ROW, True))
        self.divisor = (targets != IGNORE).sum(dtype=dtype) if normalizer is None else normalizer
        if row_weight is not None:
            self.advantage = row_weight.contiguous()


class Policy(Objective):
    """The policy loss of README.md. Where a sequence has one ratio, chunks hold whole ones or ``see_all`` is first."""

    def __init__(self, objective: PolicyObjective, batch: PolicyBatch, plan: Plan, dtype: torch.dtype):
        targets, advantages, sequence_start, old, ref, rollout, normalizer = batch
        num_rows, num_sequences = targets.shape[0], sequence_start.shape[0] - 1
        super().__init__(plan, dtype)
        self.starts, self.seen_all = sequence_start.contiguous(), False
        self.couples = objective.ratio == "sequence" and old is not None
        self.flags |= _bits(
            (kernels.SEQUENCES, True),
            (kernels.BY_ROW, advantages.shape[0] == num_rows != num_sequences),
            (kernels.OLD, old is not None),
            (kernels.REF, ref is not None),
            (kernels.ROLLOUT, rollout is not None),
            (kernels.MEAN, self.couples),
            (kernels.CAPPED, objective.importance_cap is not None),
            (kernels.D_ENTROPY, objective.entropy_coef != 0),
            (kernels.BOUNDED, objective.dual_clip is not None),
            (kernels.K2, objective.kl_estimator == "k2"),
            (kernels.K3, objective.kl_estimator == "k3"),
            (kernels.PER_SEQUENCE, objective.aggregate == "sequence_mean"),
        )
        cap, bound = objective.importance_cap, objective.dual_clip
        self.scalars = Scalars(
            1 - objective.clip_low,
            1 + objective.clip_high,
            1.0 if bound is None else bound,
            1.0 if cap is None else cap,
            objective.kl_coef,
            objective.entropy_coef,
            float(objective.max_length or 1) if objective.aggregate == "fixed_length" else 1.0,
        )
        self.advantage = advantages.contiguous()
        self.old, self.ref, self.rollout = (
            self.partial if values is None else values.contiguous() for values in (old, ref, rollout)
        )
        self._count(targets.contiguous(), num_sequences)
        if normalizer is not None:
            self.divisor = normalizer
        elif objective.aggregate == "token_mean":
            self.divisor = self.count.sum(dtype=dtype)
        else:
            self.divisor = self.partial.new_full((), num_sequences)

    def _count(self, targets: Tensor, num_sequences: int) -> None:
        """Rows know their sequence, sequences their number of rows."""
        self.sequence = torch.empty_like(targets, dtype=torch.int32)
        self.count = self.sequence.new_empty(num_sequences)
        if num_sequences:
            kernels.lm_head_objective_fwd_count_kernel[(num_sequences,)](
                targets,
                self.starts,
                self.sequence,
                self.count,
                len(targets),
                num_sequences,
                BLOCK=ROWS,
                num_warps=WARPS,
            )
        if self.couples:
            self.mean = self.partial.new_empty(num_sequences)
            plan = self.plan
            self.position = self.starts if plan.rows is None else torch.searchsorted(plan.rows, self.starts.long())

    def see_all(self, logprob: Tensor) -> None:
        """All log-probs (R,), before calls with parts of sequences."""
        self._mean(0, len(logprob), logprob)
        self.seen_all = True

    def _mean(self, start: int, stop: int, logprob: Tensor) -> None:
        if len(self.count) == 0:
            return
        kernels.lm_head_objective_fwd_mean_kernel[(len(self.count),)](
            logprob, self.plan.targets, self.rows, self.position, self.count, self.old, self.mean, self.flags, start,
            stop, BLOCK=ROWS, num_warps=WARPS,
        )  # fmt: skip

    def __call__(self, start: int, stop: int, logprob: Tensor, entropy: Tensor | None) -> Upstream:
        if self.couples and not self.seen_all:
            self._mean(start, stop, logprob)
        return super().__call__(start, stop, logprob, entropy)


def _bits(*given: tuple[Any, bool]) -> int:
    return sum([bit.value for bit, on in given if on])
