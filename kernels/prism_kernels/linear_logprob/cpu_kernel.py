"""Row kernels in torch for a CPU: in place, a few rows at a time, so that temporaries stay in the cache.

z (rows, V) fp32 or fp64; targets (rows,) int64, all in [0, V): a CPU's plan has dropped skipped rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prism_kernels.linear_logprob.engine import Head, RowKernels, Upstream
from prism_kernels.linear_logprob.objectives import LinearLogprob

BLOCK_ELEMENTS = 1 << 18  # 1 MB of fp32: half of a core's L2 on servers
FORBIDDEN = -1e4  # a log-probability of -inf (a word that a bias forbids) times its p = 0 must be 0, not NaN


def _blocks(z: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // z.shape[1])
    for start in range(0, z.shape[0], step):
        yield slice(start, min(start + step, z.shape[0]))


def prepare(z: Tensor, head: Head) -> None:
    """Raw products -> the logits that the distribution is made of."""
    if head.bias is not None:
        z += head.bias
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap / head.temperature)
    elif head.temperature != 1:
        z.div_(head.temperature)


def statistics(z: Tensor, targets: Tensor, head: Head, with_entropy: bool) -> LinearLogprob:
    logprob, logsumexp = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    entropy = z.new_empty(z.shape[0]) if with_entropy else None
    for rows in _blocks(z):
        block = z[rows]
        top = block.amax(1, keepdim=True)
        shifted = block - top
        target = shifted.gather(1, targets[rows, None]).squeeze(1)
        if with_entropy:
            e = shifted.exp()
            total = e.sum(1)
            mean = e.mul_(shifted.clamp_(min=FORBIDDEN)).sum(1) / total
            entropy[rows] = total.log() - mean
        else:
            total = shifted.exp_().sum(1)
        log_total = total.log()
        logprob[rows] = target - log_total  # not z - logsumexp, which would round at the size of the logits
        logsumexp[rows] = top.squeeze(1) + log_total
    return LinearLogprob(logprob, logsumexp, entropy)


def gradient(z: Tensor, targets: Tensor, head: Head, statistics: LinearLogprob, upstream: Upstream) -> Tensor:
    """dz[j] = g (1[j = y] - p[j]) + h p[j] - e p[j] (log p[j] + entropy), times the slopes of softcap, temperature."""
    g = upstream.logprob / head.temperature
    h = torch.zeros_like(g) if upstream.logsumexp is None else upstream.logsumexp / head.temperature
    e = None if upstream.entropy is None else upstream.entropy / head.temperature
    # The target's own entry from expm1 of its log-prob: 1 - p loses every digit where p is close to 1.
    p_target = statistics.logprob.exp()
    at_target = h * p_target - g * statistics.logprob.expm1()
    if e is not None:
        at_target = at_target - e * p_target * (statistics.logprob + statistics.entropy)
    for rows in _blocks(z):
        block = z[rows]
        slope = None
        if head.softcap is not None:
            slope = 1 - (block * (head.temperature / head.softcap)).square_()
        log_p = block.sub_(statistics.logsumexp[rows, None])
        if e is None:
            log_p.exp_().mul_((h - g)[rows, None])
        else:
            p = log_p.exp()
            log_p.clamp_(min=FORBIDDEN).add_(statistics.entropy[rows, None]).mul_(-e[rows, None])
            block.add_((h - g)[rows, None]).mul_(p)
        block.scatter_(1, targets[rows, None], at_target[rows, None])
        if slope is not None:
            block.mul_(slope)
    return z


ROW_KERNELS = RowKernels(prepare, statistics, gradient)
