"""Objectives as O(T) functions between log-probs and gradients: ``glue(logprob, entropy, rows)``.

A glue gets the log-probs (R,) of some unmasked rows (all rows of a batch, chunk by chunk), their entropies or None, and
``rows`` (R,) int64, their indices into the op's input. It returns the loss of these rows (0-d; chunks add up), and the
loss's derivatives by log-prob (R,) and by entropy (R,), or None. It runs without grad.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prism_kernels.linear_logprob.objectives import LOG_RATIO_LIMIT

Glue = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def cispo(advantages: Tensor, old_logprob: Tensor, normalizer: float, clip_high: float = 5.0) -> Glue:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): REINFORCE weighted by a clipped, detached ratio.

    loss = -sum(min(ratio, 1 + clip_high).detach() * A * logprob) / normalizer: a clipped token keeps its gradient, which
    PPO's clip takes away. ``advantages`` and ``old_logprob`` are (T,), ``normalizer`` the global number of tokens.

    >>> linear_objective(hidden, weight, targets, cispo(advantages, old_logprob, (targets != -100).sum()))
    """

    def glue(logprob: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        log_ratio = (logprob - old_logprob[rows]).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        d_logprob = -log_ratio.exp().clamp(max=1 + clip_high) * advantages[rows] / normalizer
        return (d_logprob * logprob).sum(), d_logprob, None

    return glue
