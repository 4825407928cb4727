"""The chunk engine: GEMMs on chunks of rows, row kernels between them, gradients in the forward for a given glue.

T rows of the input, R of them computed (Plan), V vocab size, H hidden. One buffer of chunk rows x V is all that grows
with V besides the weight's gradient. The row kernels are given: torch on a CPU, Triton on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prism_kernels.linear_logprob import gemm
from prism_kernels.linear_logprob.checks import check_glue
from prism_kernels.linear_logprob.objectives import PolicyObjective
from prism_kernels.linear_logprob.plan import Plan, padded
from prism_kernels.linear_logprob.records import IGNORE, Also, CrossEntropyBatch, Glue, Head, PolicyBatch

FP16_TARGET = 1024.0  # dZ in fp16 is scaled so that its largest coefficient is about this: fp16 ends at 65504 and 6e-8


class Statistics(NamedTuple):
    """Of some rows, each (rows,) in the accumulator's dtype.

    ``lost``: what rounding took from logsumexp, so that z - logsumexp - lost keeps its digits where both are large.
    """

    logprob: Tensor
    logsumexp: Tensor
    lost: Tensor
    entropy: Tensor | None


class Further(NamedTuple):
    """More statistics of some rows, each (rows,), that the row kernels write where there is one to be written."""

    is_top1: Tensor | None = None  # bool
    mean_logits: Tensor | None = None  # in the accumulator's dtype, as the next
    log_sum_sq_probs: Tensor | None = None

    @classmethod
    def empty(cls, also: Also, rows: int, like: Tensor, dtype: torch.dtype) -> Further:
        """What the caller asked for, to be written."""
        dtypes = (torch.bool, dtype, dtype)
        return cls(*[like.new_empty(rows, dtype=dtype) if asked else None for asked, dtype in zip(also, dtypes)])


NOTHING_FURTHER = Further()


class Upstream(NamedTuple):
    """dLoss by a row's statistics, each (rows,) in the accumulator's dtype; None is 0."""

    d_logprob: Tensor
    d_logsumexp: Tensor | None = None
    d_entropy: Tensor | None = None


class Objective(Protocol):
    """A loss of one call: told log-probs and entropies of rows [start, stop) of the plan, it says dLoss by them."""

    def __call__(self, start: int, stop: int, logprob: Tensor, entropy: Tensor | None) -> Upstream: ...

    def totals(self) -> tuple[Tensor, Tensor]:
        """(loss, statistics in the order of ``STATISTICS``, empty where the objective has none), of all chunks."""
        ...


class Coupled(Objective, Protocol):
    """One that may couple the rows of a sequence."""

    def see_all(self, logprob: Tensor) -> None: ...


class InTorch:
    """A glue as an objective."""

    def __init__(self, glue: Glue, plan: Plan, dtype: torch.dtype):
        self.glue, self.plan = glue, plan
        self.loss = torch.zeros((), dtype=dtype, device=plan.targets.device)

    def __call__(self, start: int, stop: int, logprob: Tensor, entropy: Tensor | None) -> Upstream:
        given = self.glue(logprob, entropy, self.plan.index(start, stop))
        loss, d_logprob, d_entropy = check_glue(given, logprob, entropy)
        self.loss += loss
        dtype = self.loss.dtype
        return Upstream(d_logprob.to(dtype), None, None if d_entropy is None else d_entropy.to(dtype))

    def totals(self) -> tuple[Tensor, Tensor]:
        return self.loss, self.loss.new_empty(0)


class RowKernels(NamedTuple):
    """What an implementation brings. ``z`` (rows, V) is the chunk of raw logits, rows maybe padded past V.

    prepare(z, head): may rewrite z in place. statistics(z, targets, head, with_entropy, further) ->
    Statistics, and fills ``further``.
    gradient(z, targets, head, statistics, upstream) -> dZ by the raw logits (rows, V), in place of z; in the dtype of
    hidden if ``narrows``, else in that of z. Rows with target -100 give 0 everywhere. cross_entropy(batch, plan, dtype)
    and policy(objective, batch, plan, dtype) make an objective of a batch beside hidden.
    scaled(gradient, factor, dtype) -> gradient times a 0-d factor beside it; the gradient is its to overwrite.
    at_once(z, head, with_entropy, objective, start) -> (logprob, entropy, dZ) of the rows from ``start`` on, where the
    objective and the device allow one pass for all three.
    """

    narrows: bool
    prepare: Callable[[Tensor, Head], None]
    statistics: Callable[..., Statistics]
    gradient: Callable[[Tensor, Tensor, Head, Statistics, Upstream], Tensor]
    cross_entropy: Callable[[CrossEntropyBatch, Plan, torch.dtype], Objective]
    policy: Callable[[PolicyObjective, PolicyBatch, Plan, torch.dtype], Coupled]
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    at_once: Callable[[Tensor, Head, bool, Objective, int], tuple[Tensor, Tensor | None, Tensor] | None] | None = None


class Needs(NamedTuple):
    """Which gradients somebody reads; a frozen head or hidden state skips its GEMM."""

    d_hidden: bool
    d_weight: bool
    d_bias: bool


class GradientDtypes(NamedTuple):
    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype

    @classmethod
    def final(cls, head: Head) -> GradientDtypes:
        """Those of the tensors themselves."""
        return cls(head.hidden.dtype, head.weight.dtype, (head.weight if head.bias is None else head.bias).dtype)

    @classmethod
    def before_scaling(cls, head: Head) -> GradientDtypes:
        """Of gradients that the loss's own gradient will multiply: rounded after that, and so once.

        dW in bf16 is the exception, for its size: it is rounded twice where the factor is no power of two. In fp16,
        whose range a loss scaler shifts by that very factor, it is fp32 until then.
        """
        wide, narrow = head.wide, head.weight.dtype
        return cls(wide, narrow if narrow is torch.bfloat16 else wide, wide)


class Gradients:
    """dX, dW and db of one pass, added up chunk by chunk; dX and db wide, dW in fp32 across chunks."""

    def __init__(self, head: Head, plan: Plan, needs: Needs):
        self.head, self.plan, self.needs = head, plan, needs
        hidden, weight = head.hidden, head.weight
        self.hidden = self.weight = self.bias = None
        if needs.d_hidden:
            # Rows that are not computed keep 0, else every row is written. Contiguous, as the operators' fakes say.
            allocate = torch.empty if plan.rows is None else torch.zeros
            self.hidden = allocate(hidden.shape, dtype=head.wide, device=hidden.device)
        single = len(plan.chunks) == 1 and weight.dtype is not torch.float16
        if needs.d_weight and not single:
            allocate = torch.empty if plan.chunks else torch.zeros
            self.weight = allocate(weight.shape, dtype=head.wide, device=weight.device)
        if needs.d_bias:
            self.bias = torch.zeros(head.vocab_size, dtype=head.wide, device=weight.device)

    def add(self, dz: Tensor, x: Tensor, start: int, stop: int, scale: float) -> None:
        """``dz`` (rows, V) is 1 / scale times the gradient of rows [start, stop)."""
        if self.hidden is not None:
            if self.plan.rows is None:
                part = self.hidden[start:stop]
                gemm.hidden_gradient_into(part, dz, self.head.weight)
                if scale != 1:
                    part.mul_(scale)
            else:
                part = self.hidden.new_empty(stop - start, self.hidden.shape[1])
                gemm.hidden_gradient_into(part, dz, self.head.weight)
                self.hidden.index_copy_(0, self.plan.rows[start:stop], part if scale == 1 else part.mul_(scale))
        if self.needs.d_weight:
            if self.plan.maybe_skipped:
                # Its dZ is 0, and 0 * NaN would be NaN in all of dW: what a skipped row holds is nobody's business.
                x = x.masked_fill((self.plan.targets[start:stop] == IGNORE)[:, None], 0.0)
            if self.weight is None:
                self.weight = gemm.weight_gradient(dz, x)
            else:
                gemm.accumulate_weight_gradient(self.weight, dz, x, scale, first=start == 0)
        if self.bias is not None:
            self.bias.add_(dz.sum(0, dtype=self.bias.dtype), alpha=scale)

    def result(self, dtypes: GradientDtypes) -> tuple[Tensor, Tensor, Tensor]:
        """(dX, dW, db) in these dtypes; an empty tensor where nobody reads one."""
        empty = self.head.hidden.new_empty
        d_hidden, d_weight, d_bias = (
            empty(0) if part is None else part.to(dtype)
            for part, dtype in zip((self.hidden, self.weight, self.bias), dtypes)
        )
        return d_hidden, d_weight, d_bias


def log_probs(
    head: Head, plan: Plan, kernels: RowKernels, with_entropy: bool, further: Further = NOTHING_FURTHER
) -> Statistics:
    """Statistics of the plan's rows, each (R,), and those of ``further``: one GEMM."""
    parts = [
        kernels.statistics(z, plan.targets[start:stop], head, with_entropy, _cut(further, start, stop))
        for start, stop, _, z in _logits(head, plan, kernels)
    ]
    return _concatenate(head, parts, with_entropy)


def backward(
    head: Head, plan: Plan, kernels: RowKernels, statistics: Statistics, upstream: Upstream, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for given upstream gradients of the statistics, all (R,): logits once more, and up to two GEMMs."""
    gradients = Gradients(head, plan, needs)
    for start, stop, x, z in _logits(head, plan, kernels):
        _gradients_of_chunk(
            gradients, kernels, z, x, start, stop, _cut(statistics, start, stop), _cut(upstream, start, stop)
        )
    return gradients.result(GradientDtypes.final(head))


def objective(
    head: Head, plan: Plan, kernels: RowKernels, objective: Objective, with_entropy: bool, needs: Needs
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """(log-probs (R,), entropies (R,) | None, gradients of the loss, not rounded yet): three GEMMs, no logits kept."""
    gradients = Gradients(head, plan, needs)
    logprobs, entropies = [], []
    for start, stop, x, z in _logits(head, plan, kernels):
        done = kernels.at_once(z, head, with_entropy, objective, start) if kernels.at_once and any(needs) else None
        if done is not None:
            logprob, entropy, dz = done
            objective(start, stop, logprob, entropy)
            gradients.add(dz, x, start, stop, 1.0)
        else:
            part = kernels.statistics(z, plan.targets[start:stop], head, with_entropy)
            logprob, entropy = part.logprob, part.entropy
            upstream = objective(start, stop, logprob, entropy)
            if any(needs):
                _gradients_of_chunk(gradients, kernels, z, x, start, stop, part, upstream)
        logprobs.append(logprob)
        entropies.append(entropy)
    entropy = _joined(head, entropies) if with_entropy else None
    return _joined(head, logprobs), entropy, gradients.result(GradientDtypes.before_scaling(head))


def _logits(head: Head, plan: Plan, kernels: RowKernels) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, x (rows, H), z (rows, V)) chunk by chunk, all in one buffer."""
    shape = (plan.longest, padded(head.vocab_size, head.hidden.device))
    buffer = torch.empty(shape, dtype=head.wide, device=head.hidden.device)
    for start, stop in plan.chunks:
        x = plan.take(head.hidden, start, stop)
        z = buffer[: stop - start, : head.vocab_size]
        gemm.logits_into(z, x, head.weight)
        kernels.prepare(z, head)
        yield start, stop, x, z


def _gradients_of_chunk(
    gradients: Gradients,
    kernels: RowKernels,
    z: Tensor,
    x: Tensor,
    start: int,
    stop: int,
    statistics: Statistics,
    upstream: Upstream,
) -> None:
    narrow = x.dtype is torch.float16 and kernels.narrows
    scale = _fp16_scale(upstream, gradients.head.temperature) if narrow else 1.0
    # Kernels walk over rows by pointer, and the gradient of a sum is one number expanded.
    upstream = Upstream._make(
        None if part is None else (part if scale == 1 else part / scale).contiguous() for part in upstream
    )
    dz = kernels.gradient(z, gradients.plan.targets[start:stop], gradients.head, statistics, upstream)
    gradients.add(dz, x, start, stop, scale)


def _fp16_scale(upstream: Upstream, temperature: float) -> float:
    """A power of two that brings a chunk's coefficients into fp16's range. Reads one number from the GPU: the price of
    fp16, which nothing else pays."""
    largest = float(torch.stack([part.abs().max() for part in upstream if part is not None]).max()) / temperature
    if not 0 < largest < float("inf"):
        return 1.0
    return 2.0 ** round(torch.tensor(largest / FP16_TARGET).log2().item())


def _joined(head: Head, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([torch.empty(0, dtype=head.wide, device=head.hidden.device), *parts])


def _concatenate(head: Head, parts: list[Statistics], with_entropy: bool) -> Statistics:
    columns: list[Any] = [[part[i] for part in parts] for i in range(3 + with_entropy)]
    return Statistics(*[_joined(head, column) for column in columns], *([] if with_entropy else [None]))


def _cut(columns: Any, start: int, stop: int) -> Any:
    return columns._make(None if column is None else column[start:stop] for column in columns)
