"""Row kernels in torch for a CPU: in place, a few rows at a time, so that temporaries stay in the cache.

z (rows, V) fp32 or fp64; targets (rows,) int64, all in [0, V): a CPU's plan has dropped skipped rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prism_kernels.linear_logprob.engine import NOTHING_FURTHER, Further, RowKernels, Statistics, Upstream
from prism_kernels.linear_logprob.glue import CrossEntropy, Policy
from prism_kernels.linear_logprob.records import Head

BLOCK_ELEMENTS = 1 << 17  # 512 KB of fp32: a block and its temporaries fit a core's L2 of 2 MB
# A logit this far (in nats) below the rest counts as p = 0: it is lost in their rounding, while the denormal numbers it
# becomes, and exp's way to them, take a CPU many times longer (a step of eager torch at logits of std 22: 45 times).
NEGLIGIBLE = {torch.float32: -60.0, torch.float64: -500.0}


def _blocks(z: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // z.shape[1])
    for start in range(0, z.shape[0], step):
        yield slice(start, min(start + step, z.shape[0]))


def prepare(z: Tensor, head: Head) -> None:
    """Raw logits -> the logits that the distribution is made of."""
    if head.bias is not None:
        z += head.bias
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap / head.temperature)
    elif head.temperature != 1:
        z.div_(head.temperature)
    _bar(z, head, float("-inf"))


def _bar(z: Tensor, head: Head, value: float) -> None:
    """``value`` for the words of probability 0."""
    if head.forbidden:
        z[:, head.forbidden] = value
    if head.words < z.shape[1]:
        z[:, head.words :] = value


def statistics(
    z: Tensor, targets: Tensor, head: Head, with_entropy: bool, further: Further = NOTHING_FURTHER
) -> Statistics:
    logprob, logsumexp, lost = (z.new_empty(z.shape[0]) for _ in range(3))
    entropy = z.new_empty(z.shape[0]) if with_entropy else None
    for rows in _blocks(z):
        block = z[rows]
        if further.is_top1 is not None:
            torch.eq(block.argmax(1), targets[rows], out=further.is_top1[rows])
        if further.mean_logits is not None:
            further.mean_logits[rows] = _sum_of_words(block, head) / (head.words - len(head.forbidden))
        top = block.amax(1, keepdim=True)
        shifted = block - top
        target = shifted.gather(1, targets[rows, None]).squeeze(1)
        e = shifted.clamp_(min=NEGLIGIBLE[z.dtype]).exp()
        total = e.sum(1)
        log_total = total.log()
        logprob[rows] = target - log_total  # not z - logsumexp, which would round at the size of the logits
        top = top.squeeze(1)
        total_logit = logsumexp[rows] = top + log_total
        grown = total_logit - top  # exactly what the sum took up of log_total, and then of top
        lost[rows] = (top - (total_logit - grown)) + (log_total - grown)
        if further.log_sum_sq_probs is not None:
            further.log_sum_sq_probs[rows] = 2 * (torch.linalg.vector_norm(e, dim=1).log() - log_total)
        if entropy is not None:
            entropy[rows] = log_total - e.mul_(shifted).sum(1) / total
    return Statistics(logprob, logsumexp, lost, entropy)


def _sum_of_words(block: Tensor, head: Head) -> Tensor:
    """(rows,): of the logits of the words that are not barred."""
    words = block[:, : head.words]
    if head.forbidden:
        words = words.index_fill(1, torch.tensor(head.forbidden), 0.0)
    return words.sum(1)


def gradient(z: Tensor, targets: Tensor, head: Head, statistics: Statistics, upstream: Upstream) -> Tensor:
    """dz[j] = g (1[j = y] - p[j]) + h p[j] - e p[j] (log p[j] + entropy), times the slopes of softcap, temperature."""
    g = upstream.d_logprob / head.temperature
    h = torch.zeros_like(g) if upstream.d_logsumexp is None else upstream.d_logsumexp / head.temperature
    e = None if upstream.d_entropy is None else upstream.d_entropy / head.temperature
    # The target's own entry from expm1 of its log-prob: 1 - p loses every digit where p is close to 1.
    floor = NEGLIGIBLE[z.dtype]
    p_target = statistics.logprob.exp()
    at_target = h * p_target - g * statistics.logprob.expm1()
    entropy = statistics.entropy
    if e is not None:
        assert entropy is not None  # its gradient comes with it
        # The floor because a bias may forbid the target: p log p is 0 there, not 0 * -inf.
        at_target = at_target - e * p_target * (statistics.logprob.clamp(min=floor) + entropy)
    least = 2 * math.exp(floor)
    for rows in _blocks(z):
        block = z[rows]
        slope = None
        if head.softcap is not None:
            slope = 1 - (block * (head.temperature / head.softcap)).square_()
        log_p = block.sub_(statistics.logsumexp[rows, None]).sub_(statistics.lost[rows, None])
        log_p.clamp_(min=floor)  # finite where a token is forbidden
        if e is None or entropy is None:
            torch.threshold_(log_p.exp_(), least, 0.0).mul_((h - g)[rows, None])
        else:
            p = torch.threshold_(log_p.exp(), least, 0.0)
            log_p.add_(entropy[rows, None]).mul_(-e[rows, None])
            block.add_((h - g)[rows, None]).mul_(p)
        block.scatter_(1, targets[rows, None], at_target[rows, None])
        if slope is not None:
            block.mul_(slope)
            _bar(block, head, 0.0)  # 0 times the infinite slope of a word of probability 0
    return z


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Looking at the factor waits for nothing here."""
    return (gradient if factor.item() == 1 else gradient.mul_(factor)).to(dtype)


ROW_KERNELS = RowKernels(False, prepare, statistics, gradient, CrossEntropy, Policy, scaled)
