"""Row kernels in Triton: one program per row of the chunk, streaming over the vocabulary.

Legend: R rows of the chunk, V vocab size (columns past V are never read or written), BLOCK columns a step.
z (R, V) fp32 or fp64: raw logits; row stride >= V. Words from ``num_words`` on, and the few that are forbidden, have
probability 0. target (R,) int64, -100: skipped row, 0 everywhere; others that are no such word, which the host could
not see, make their row NaN.
Memory-bound: the first kernel reads z once, the second reads it once and writes dZ over it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.linear_logprob.engine import NOTHING_FURTHER, Further, RowKernels, Statistics, Upstream
from prism_kernels.linear_logprob.records import IGNORE, Head
from prism_kernels.linear_logprob.triton_glue import CrossEntropy, Policy
from prism_kernels.linear_logprob.triton_scale import scaled
from prism_kernels.tuned_options import tuned

# (BLOCK, num_warps) by bytes of a logit: 8 or 16 fp32 or 2 fp64 a thread and step. Statistics keep a maximum and sums
# of each lane: 16 lanes a thread spill on sm_100; more fp64 spills on sm_80.
BLOCKS = {"statistics": {4: (2048, 8), 8: (512, 8)}, "gradient": {4: (4096, 8), 8: (512, 8)}}
_IGNORE = tl.constexpr(IGNORE)


def block_options(kernel: str, itemsize: int, softcap: bool, further: bool = False) -> dict[str, int]:
    """BLOCK and warps of "statistics" or "gradient" on logits of so many bytes. Left to itself ptxas takes 48 registers
    for some statistics under a softcap, and spills; with ``further`` ones it needs more than 80."""
    block, warps = BLOCKS[kernel][itemsize]
    options = tuned("linear_logprob", f"{kernel} {itemsize}", {"BLOCK": block, "num_warps": warps})
    bound = {"maxnreg": 128 if further else 80}
    return options | (bound if softcap and kernel == "statistics" and itemsize == 4 else {})


@triton.jit
def _logits(
    raw,
    bias_ptr,
    column,
    inside,
    softcap,
    sharpness,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
):
    """(logits of the distribution, slope of softcap) of raw logits (BLOCK,)."""
    z = raw
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0).to(z.dtype)
    slope = 1.0
    if HAS_SOFTCAP:
        # tanh by exp of a negative number: no overflow, and no library that the interpreter lacks. slope = 1 - tanh^2.
        x = tl.abs(z / softcap)
        decay = tl.exp(-2.0 * x)
        size = (1.0 - decay) / (1.0 + decay)
        if z.dtype == tl.float32:
            # 1 - decay of a small x loses its digits, and softcap multiplies what is lost: a polynomial (Chebyshev fit
            # of (tanh(x) / x - 1) / x^2 by x^2, relative error 8e-8).
            u = x * x
            tail = (((-0.00627638759 * u + 0.021116214) * u - 0.0538751382) * u + 0.13332924) * u - 0.333333304
            size = tl.where(x < 0.6, x + x * (u * tail), size)
        z = tl.where(z < 0, -softcap, softcap) * size
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        if HAS_FORBIDDEN:
            z = tl.where(raw == float("-inf"), raw, z)
    return z * sharpness, slope


@triton.jit
def _in(dtype: tl.constexpr, value):
    """An fp64 argument, which the interpreter passes as a Python float, in the dtype of the logits."""
    return (tl.full((), 0.0, tl.float64) + value).to(dtype)


@triton.jit
def _bar(p_row, forbidden_ptr, num_forbidden):
    """Raw logits of forbidden words become -inf in memory: looked for in every step, they would take a fifth more
    registers. The row's other threads read them after the barrier."""
    for i in range(num_forbidden):
        tl.store(p_row + tl.load(forbidden_ptr + i), float("-inf"))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_words", "num_forbidden"])
def lm_head_stats_kernel(
    z_ptr,  # (R, V)
    target_ptr,  # (R,) int64
    bias_ptr,  # (V,) or z_ptr
    forbidden_ptr,  # (num_forbidden,) int32, or target_ptr
    logprob_ptr,  # (R,), as the next three
    logsumexp_ptr,
    lost_ptr,
    entropy_ptr,
    is_top1_ptr,  # (R,) uint8, as the next two one of the others where nobody wants it
    mean_logits_ptr,  # (R,), as the next
    log_sum_sq_probs_ptr,
    row_stride,
    vocab_size,
    num_words,
    num_forbidden,
    inverse_temperature: tl.float64,  # a float is fp32 to a launch where nothing says otherwise
    cap: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_row)
    odd = (target < 0) | (target >= num_words)
    if HAS_FORBIDDEN:
        for i in range(num_forbidden):
            odd |= tl.load(forbidden_ptr + i) == target
    if odd:
        nothing = tl.where(target == _IGNORE, 0.0, float("nan"))
        tl.store(logprob_ptr + i_row, nothing)
        tl.store(logsumexp_ptr + i_row, nothing)
        tl.store(lost_ptr + i_row, nothing)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + i_row, nothing)
        if WITH_TOP1:
            tl.store(is_top1_ptr + i_row, 0)
        if WITH_MEAN:
            tl.store(mean_logits_ptr + i_row, nothing)
        if WITH_SQUARES:
            tl.store(log_sum_sq_probs_ptr + i_row, nothing)
        return
    p_row = z_ptr + i_row * row_stride
    if HAS_FORBIDDEN:
        _bar(p_row, forbidden_ptr, num_forbidden)
    p_target = tl.load(p_row + target)
    sharpness = _in(p_target.dtype, inverse_temperature)
    softcap = _in(p_target.dtype, cap)
    target_logit = _logits(p_target, bias_ptr, target, True, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN)[
        0
    ]

    # Each lane has a maximum and sums of its own: no step waits for the others of its row.
    first = tl.where(target_logit > -1e38, target_logit, -1e38)  # finite unless a bias forbids the target
    b_top = tl.zeros((BLOCK,), p_target.dtype) + first
    b_sum = tl.full((BLOCK,), 0.0, p_target.dtype)  # sum of exp(z - top)
    b_mean = tl.full((BLOCK,), 0.0, p_target.dtype)  # sum of exp(z - top) (z - top)
    b_squares = tl.full((BLOCK,), 0.0, p_target.dtype)  # sum of exp(z - top)^2
    b_total = tl.full((BLOCK,), 0.0, p_target.dtype)  # sum of z
    b_ahead = tl.zeros((BLOCK,), tl.int32)  # whether a word comes before the target in z's order
    for start in range(0, num_words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size  # a mask by num_words, which 16 does not divide, would cut the loads into words
        b_z = tl.load(p_row + column, mask=inside, other=0.0)  # (BLOCK,)
        b_z = _logits(b_z, bias_ptr, column, inside, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN)[0]
        b_z = tl.where(column < num_words, b_z, float("-inf"))
        if WITH_TOP1:
            before, after = (b_z >= target_logit) & (column < target), (b_z > target_logit) & (column > target)
            b_ahead |= (before | after).to(tl.int32)
        if WITH_MEAN:
            allowed = column < num_words
            if HAS_FORBIDDEN:
                allowed &= b_z > float("-inf")
            b_total += tl.where(allowed, b_z, 0.0)
        # One exponential does for both cases: z above the maximum so far, which it becomes, or below.
        b_over = b_z - b_top
        b_e = tl.exp(-tl.abs(b_over))
        above = b_over > 0
        if WITH_ENTROPY:
            # e z of a column that is masked or forbidden is 0 * -inf: it must be 0.
            b_under = tl.where(b_e > 0, b_over, 0.0)
            b_mean = tl.where(above, (b_mean - b_sum * b_over) * b_e, b_mean + b_e * b_under)
        if WITH_SQUARES:
            b_e2 = b_e * b_e
            b_squares = tl.where(above, b_squares * b_e2 + 1.0, b_squares + b_e2)
        b_sum = tl.where(above, b_sum * b_e + 1.0, b_sum + b_e)
        b_top = tl.where(above, b_z, b_top)
    top = tl.max(b_top, 0)
    b_under = b_top - top
    b_e = tl.exp(b_under)
    if WITH_ENTROPY:
        b_mean = (b_mean + b_sum * b_under) * b_e
    if WITH_SQUARES:
        b_squares *= b_e * b_e
    b_sum *= b_e
    total = tl.sum(b_sum, 0)
    log_total = tl.log(total)
    # Not target_logit - logsumexp, which would round at the size of the logits.
    tl.store(logprob_ptr + i_row, (target_logit - top) - log_total)
    logsumexp = top + log_total
    grown = logsumexp - top  # exactly what the sum took up of log_total, and then of top
    tl.store(logsumexp_ptr + i_row, logsumexp)
    tl.store(lost_ptr + i_row, (top - (logsumexp - grown)) + (log_total - grown))
    if WITH_ENTROPY:
        tl.store(entropy_ptr + i_row, log_total - tl.sum(b_mean, 0) / total)
    if WITH_TOP1:
        tl.store(is_top1_ptr + i_row, (tl.max(b_ahead, 0) == 0).to(tl.uint8))
    if WITH_MEAN:
        tl.store(mean_logits_ptr + i_row, tl.sum(b_total, 0) / (num_words - num_forbidden))
    if WITH_SQUARES:
        tl.store(log_sum_sq_probs_ptr + i_row, tl.log(tl.sum(b_squares, 0)) - 2.0 * log_total)


@triton.jit(do_not_specialize=["num_words", "num_forbidden"])
def lm_head_grad_kernel(
    z_ptr,  # (R, V) in
    dz_ptr,  # (R, V) out: the same memory, maybe in a narrower type
    target_ptr,  # (R,) int64
    bias_ptr,  # (V,) or z_ptr
    forbidden_ptr,  # (num_forbidden,) int32, or target_ptr
    logprob_ptr,  # (R,), as all below
    logsumexp_ptr,
    lost_ptr,
    entropy_ptr,
    d_logprob_ptr,
    d_logsumexp_ptr,
    d_entropy_ptr,
    row_stride,
    dz_row_stride,
    vocab_size,
    num_words,
    num_forbidden,
    inverse_temperature: tl.float64,  # a float is fp32 to a launch where nothing says otherwise
    cap: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    HAS_D_LOGSUMEXP: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_row)
    skipped = target == _IGNORE
    # Outside [0, V) the log-prob is NaN, and so all dZ. int32 as columns are: int64 comparisons would spill.
    target = tl.where((target < 0) | (target >= vocab_size), 0, target).to(tl.int32)
    p_row = z_ptr + i_row * row_stride
    p_out = dz_ptr + i_row * dz_row_stride
    if HAS_FORBIDDEN:
        _bar(p_row, forbidden_ptr, num_forbidden)
    logprob = tl.load(logprob_ptr + i_row)
    logsumexp, lost = tl.load(logsumexp_ptr + i_row), tl.load(lost_ptr + i_row)
    sharpness = _in(logprob.dtype, inverse_temperature)
    softcap = _in(logprob.dtype, cap)
    g = tl.load(d_logprob_ptr + i_row) * sharpness
    common = -g  # coefficient of p in every column
    if HAS_D_LOGSUMEXP:
        common += tl.load(d_logsumexp_ptr + i_row) * sharpness
    if HAS_D_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + i_row) * sharpness
        entropy = tl.load(entropy_ptr + i_row)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        b_z = tl.load(p_row + column, mask=inside, other=0.0)  # (BLOCK,)
        b_z, b_slope = _logits(b_z, bias_ptr, column, inside, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN)
        b_z = tl.where(column < num_words, b_z, float("-inf"))
        # The target's own entry from its exact log-prob: where p is near 1, 1 - p would lose its digits.
        b_log_p = tl.where(column == target, logprob, (b_z - logsumexp) - lost)
        b_p = tl.exp(b_log_p)
        b_dz = b_p * common
        if HAS_D_ENTROPY:
            b_dz -= tl.where(b_p > 0, b_p * d_entropy * (b_log_p + entropy), 0.0)
        b_dz = tl.where(column == target, b_dz + g, b_dz) * b_slope
        b_dz = tl.where(skipped, 0.0, b_dz)
        if NARROW:
            # Row start + 2 c overwrites column c / 2: every thread must have read this step before any writes it.
            # Later steps read columns that no earlier step writes, so one barrier a step is enough.
            tl.debug_barrier()
        tl.store(p_out + column, b_dz.to(dz_ptr.dtype.element_ty), mask=inside)


def _scalars(head: Head) -> tuple[float, float]:
    return 1 / head.temperature, head.softcap or 1.0


@lru_cache(maxsize=16)
def _ids(forbidden: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to the device once."""
    return torch.tensor(forbidden, dtype=torch.int32, device=device)


def prepare(z: Tensor, head: Head) -> None:
    """Nothing: both kernels apply bias, softcap, temperature and what is forbidden as they read."""


def statistics(
    z: Tensor, targets: Tensor, head: Head, with_entropy: bool, further: Further = NOTHING_FURTHER
) -> Statistics:
    num_rows, vocab_size = z.shape
    asked = any(rows is not None for rows in further)
    logprob, logsumexp, lost = (z.new_empty(num_rows) for _ in range(3))
    entropy = z.new_empty(num_rows) if with_entropy else None
    lm_head_stats_kernel[(num_rows,)](
        z,
        targets,
        z if head.bias is None else head.bias.contiguous(),
        _ids(tuple(head.forbidden), z.device) if head.forbidden else targets,
        logprob,
        logsumexp,
        lost,
        entropy if with_entropy else logprob,
        logprob if further.is_top1 is None else further.is_top1.view(torch.uint8),
        logprob if further.mean_logits is None else further.mean_logits,
        logprob if further.log_sum_sq_probs is None else further.log_sum_sq_probs,
        z.stride(0),
        vocab_size,
        head.words,
        len(head.forbidden),
        *_scalars(head),
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_FORBIDDEN=bool(head.forbidden),
        WITH_ENTROPY=with_entropy,
        WITH_TOP1=further.is_top1 is not None,
        WITH_MEAN=further.mean_logits is not None,
        WITH_SQUARES=further.log_sum_sq_probs is not None,
        **block_options("statistics", z.element_size(), head.softcap is not None, asked),
    )
    return Statistics(logprob, logsumexp, lost, entropy)


def gradient(z: Tensor, targets: Tensor, head: Head, statistics: Statistics, upstream: Upstream) -> Tensor:
    num_rows, vocab_size = z.shape
    # The same rows in the dtype of the GEMMs that follow: dZ starts where its row of logits starts.
    dz = z.view(head.hidden.dtype)[:, :vocab_size] if head.hidden.dtype != z.dtype else z
    given = upstream.d_logprob
    lm_head_grad_kernel[(num_rows,)](
        z,
        dz,
        targets,
        z if head.bias is None else head.bias.contiguous(),
        _ids(tuple(head.forbidden), z.device) if head.forbidden else targets,
        statistics.logprob,
        statistics.logsumexp,
        statistics.lost,
        given if statistics.entropy is None else statistics.entropy,
        given,
        given if upstream.d_logsumexp is None else upstream.d_logsumexp,
        given if upstream.d_entropy is None else upstream.d_entropy,
        z.stride(0),
        dz.stride(0),
        vocab_size,
        head.words,
        len(head.forbidden),
        *_scalars(head),
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_FORBIDDEN=bool(head.forbidden),
        HAS_D_LOGSUMEXP=upstream.d_logsumexp is not None,
        HAS_D_ENTROPY=upstream.d_entropy is not None,
        NARROW=dz.dtype != z.dtype,
        **block_options("gradient", z.element_size(), head.softcap is not None),
    )
    return dz


ROW_KERNELS = RowKernels(True, prepare, statistics, gradient, CrossEntropy, Policy, scaled)
