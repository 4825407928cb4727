"""The records of the LM-head ops: what goes in, what comes out. The ops' signature stands here and in ``api.py`` alone.

The schemas of the operators in ``autograd.py`` are made from the input records, field by field, in this order.
T rows, V vocab size, H hidden, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # a target that skips its row, torch's convention

# (logprob (R,), entropy (R,) | None, rows (R,)) -> (loss, dloss_dlogprob (R,), dloss_dentropy (R,) | None)
Glue = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class Head(NamedTuple):
    """z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature: the logits (T, V); -inf where barred."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    forbidden: list[int]  # ascending, each once, below words: ids of probability 0
    words: int  # ids from here on have probability 0; V where all are words

    @property
    def wide(self) -> torch.dtype:
        return accumulator_dtype(self.hidden.dtype)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def bars(self) -> bool:
        """Whether some ids have probability 0."""
        return bool(self.forbidden) or self.words < self.vocab_size


class CrossEntropyBatch(NamedTuple):
    """sum(row_weight * nll) / normalizer; None: a weight of 1, the number of unmasked rows."""

    targets: Tensor  # (T,) int64
    row_weight: Tensor | None  # (T,)
    normalizer: Tensor | None  # 0-d


class PolicyBatch(NamedTuple):
    """Packed sequences of a policy; everything but the targets is a constant of the loss.

    Two sequences of 3 and 2 rows, the first of which predicts nothing::

        targets         [-100, 17, 4, 9, 2]
        advantages      [0.7, -0.7]
        sequence_start  [0, 3, 5]
    """

    targets: Tensor  # (T,) int64
    advantages: Tensor  # (S,), or (T,) where T differs from S
    sequence_start: Tensor  # (S + 1,) int32 or int64
    old: Tensor | None  # (T,) log-probs, as the next two; None: on-policy
    ref: Tensor | None
    rollout: Tensor | None
    normalizer: Tensor | None  # 0-d; None: the number of rows or of sequences


class Options(NamedTuple):
    """What the caller wants back, and how much memory the logits may take."""

    with_entropy: bool = False
    with_logprob: bool = True
    chunk_bytes: int = 0  # of logits at a time; 0: the device's default


class Also(NamedTuple):
    """What else of a row's distribution the caller wants, by the names of :class:`LinearLogprobAlso`."""

    is_top1: bool = False
    mean_logits: bool = False
    log_sum_sq_probs: bool = False


NOTHING_ELSE = Also()


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` returns: each (T,), fp32 (fp64 for fp64 in), differentiable, 0 in skipped rows.

    Three tensors, or :class:`LinearLogprobAlso`, which has three more, where ``also`` asks for some of them.
    """

    logprob: Tensor  # z[target] - logsumexp, <= 0
    logsumexp: Tensor
    entropy: Tensor | None  # nats; None unless asked for

    @property
    def is_top1(self) -> Tensor | None:
        return None

    @property
    def mean_logits(self) -> Tensor | None:
        return None

    @property
    def log_sum_sq_probs(self) -> Tensor | None:
        return None


class LinearLogprobAlso(NamedTuple):
    """:class:`LinearLogprob` and what ``also`` asked for: constants, (T,), 0 (False) in skipped rows, None unasked.

    ``z`` are the logits of the distribution: after logit scale, softcap and temperature, -inf where barred.
    """

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None  # bool: the target is z.argmax(-1); of equal logits the first is the largest, as there
    mean_logits: Tensor | None  # mean of z over the words that are not barred
    log_sum_sq_probs: Tensor | None  # log(sum of p squared)


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
