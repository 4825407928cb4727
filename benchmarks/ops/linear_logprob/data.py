"""Inputs of the LM-head benchmarks, and their truth in float64, chunk by chunk.

T rows, V words, H hidden, S sequences. Logits have standard deviation about 1, the targets log-probs between about -5
and 0: a trained policy's, not those of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Call, Outputs, Shape

CLIP = 0.2
ROWS_BYTES = 1 << 30  # float64 logits of one chunk of the truth
SEQUENCE = 512  # rows of a sequence

Loss = Callable[[Tensor, Tensor], Tensor]  # (T, H), (V, H) -> a loss, or (T,) log-probs


@dataclass
class Head:
    hidden: Tensor  # (T, H), wants a gradient
    weight: Tensor  # (V, H), wants a gradient
    targets: Tensor  # (T,) int64
    advantages: Tensor  # (S,) fp32
    sequence_start: Tensor  # (S + 1,) int32, on the host
    old_logprob: Tensor  # (T,) fp32: the policy's of a step ago, some ratios beyond the clip

    @cached_property
    def row_advantages(self) -> Tensor:
        """(T,)"""
        lengths = self.sequence_start.diff().long().to(self.advantages.device)
        return self.advantages.repeat_interleave(lengths, output_size=self.hidden.shape[0])

    def gradients(self, loss: Loss) -> Call:
        """Forward and backward: {"loss", "dx", "dw"}; nothing accumulates from call to call."""

        def call() -> Outputs:
            value = loss(self.hidden, self.weight)
            dx, dw = torch.autograd.grad(value, [self.hidden, self.weight])
            return {"loss": value.detach(), "dx": dx, "dw": dw}

        return call


def make_head(shape: Shape, device: torch.device, seed: int = 0) -> Head:
    rows, width, words, dtype = shape["T"], shape["H"], shape["V"], DTYPES[shape["dtype"]]
    random = torch.Generator(device).manual_seed(seed)
    options = {"generator": random, "device": device, "dtype": torch.float32}
    weight = torch.randn(words, width, **options).mul_(width**-0.5).to(dtype)
    targets = torch.randint(0, words, (rows,), generator=random, device=device)
    own = weight[targets].float()
    lift = torch.log(torch.tensor(float(words))) + torch.empty(rows, 1, device=device).uniform_(-4, 6, generator=random)
    hidden = torch.randn(rows, width, **options) + lift * own / own.square().sum(1, keepdim=True)
    hidden = hidden.to(dtype)
    count = max(1, rows // SEQUENCE)
    start = torch.linspace(0, rows, count + 1).round().int()
    advantages = torch.randn(count, **options)
    drift = torch.randn(rows, **options).mul_(0.15)
    head = Head(hidden, weight, targets, advantages, start, drift)
    for rows_of_chunk, logprob, _, _ in _statistics(head, torch.float32):
        head.old_logprob[rows_of_chunk] += logprob
    hidden.requires_grad_()
    weight.requires_grad_()
    return head


def _statistics(head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, log-prob, log-sum-exp, logits) of every chunk."""
    hidden, weight = head.hidden.detach(), head.weight.detach().to(dtype)
    step = max(1, ROWS_BYTES // (8 * weight.shape[0]))
    for first in range(0, hidden.shape[0], step):
        rows = slice(first, min(first + step, hidden.shape[0]))
        z = hidden[rows].to(dtype) @ weight.T
        logsumexp = z.logsumexp(1)
        logprob = z.gather(1, head.targets[rows, None]).squeeze(1) - logsumexp
        yield rows, logprob, logsumexp, z


def truth_logprob(head: Head) -> Outputs:
    """float64 {"logprob", "entropy"}, each (T,)."""
    parts = []
    for _, logprob, logsumexp, z in _statistics(head, torch.float64):
        entropy = logsumexp - ((z - logsumexp[:, None]).exp_().mul_(z)).sum(1)
        parts.append((logprob, entropy))
    return dict(zip(("logprob", "entropy"), map(torch.cat, zip(*parts))))


def truth_loss(head: Head, objective: str) -> Outputs:
    """float64 {"loss", "dx", "dw"} of "nll" (mean cross-entropy), "policy" (the clipped loss) or "weighted"."""
    total = head.hidden.shape[0]
    weight = head.weight.detach().double()
    loss = weight.new_zeros(())
    dx = torch.empty_like(head.hidden, dtype=torch.float64, requires_grad=False)
    dw = torch.zeros_like(weight)
    for rows, logprob, logsumexp, z in _statistics(head, torch.float64):
        if objective == "nll":
            value, slope = -logprob, -torch.ones_like(logprob)
        elif objective == "weighted":
            slope = -head.row_advantages[rows].double()
            value = logprob * slope
        else:
            advantage = head.row_advantages[rows].double()
            ratio = (logprob - head.old_logprob[rows].double()).exp()
            plain, clipped = ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
            value, slope = -torch.minimum(plain, clipped), torch.where(plain <= clipped, -plain, 0.0)
        loss += value.sum() / total
        dz = (z - logsumexp[:, None]).exp_().mul_(-slope[:, None] / total)
        dz.scatter_add_(1, head.targets[rows, None], slope[:, None] / total)
        dx[rows] = dz @ weight
        dw.addmm_(dz.T, head.hidden.detach()[rows].double())
    return {"loss": loss, "dx": dx, "dw": dw}


def policy_glue(head: Head, logprob: Tensor) -> Tensor:
    """The clipped policy loss of given log-probs in plain torch: what peers without a policy loss of their own add."""
    advantage = head.row_advantages
    ratio = (logprob - head.old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def weighted(head: Head, logprob: Tensor) -> Tensor:
    """REINFORCE: a loss that log-probs enter linearly, each with a weight of its own."""
    return -(logprob * head.row_advantages).mean()
