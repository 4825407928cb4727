"""What the row kernels do with one row of the chunk, once for all of them: its statistics, and its dZ.

Legend: V vocab size (columns past V are never read or written), BLOCK columns a step. Words from ``num_words`` on, and
those that are forbidden, have probability 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits_of(
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
def _as_dtype(dtype: tl.constexpr, value):
    """An fp64 argument, which the interpreter passes as a Python float, in the dtype of the logits."""
    return (tl.full((), 0.0, tl.float64) + value).to(dtype)


@triton.jit
def _bar(p_row, forbidden_ptr, num_forbidden):
    """Raw logits of forbidden words become -inf in memory: looked for in every step, they would take a fifth more
    registers. The row's other threads read them after the barrier."""
    for i in range(num_forbidden):
        tl.store(p_row + tl.load(forbidden_ptr + i), float("-inf"))
    tl.debug_barrier()


@triton.jit
def _statistics_of_row(
    p_row,  # its raw logits (V,); forbidden ones are -inf there
    target,
    bias_ptr,
    vocab_size,
    num_words,
    num_forbidden,
    inverse_temperature,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(logprob, logsumexp, lost, entropy, is_top1, mean_logits, log_sum_sq_probs)."""
    p_target = tl.load(p_row + target)
    sharpness = _as_dtype(p_target.dtype, inverse_temperature)
    softcap = _as_dtype(p_target.dtype, cap)
    target_logit = _logits_of(
        p_target, bias_ptr, target, True, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN
    )[0]

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
        b_z = _logits_of(b_z, bias_ptr, column, inside, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN)[0]
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
    logprob = (target_logit - top) - log_total
    logsumexp = top + log_total
    grown = logsumexp - top  # exactly what the sum took up of log_total, and then of top
    lost = (top - (logsumexp - grown)) + (log_total - grown)
    # What nobody wants is none of these, and not computed.
    entropy, is_top1, mean_logits, log_sum_sq_probs = log_total, total > 0, log_total, log_total
    if WITH_ENTROPY:
        entropy = log_total - tl.sum(b_mean, 0) / total
    if WITH_TOP1:
        is_top1 = tl.max(b_ahead, 0) == 0
    if WITH_MEAN:
        mean_logits = tl.sum(b_total, 0) / (num_words - num_forbidden)
    if WITH_SQUARES:
        log_sum_sq_probs = tl.log(tl.sum(b_squares, 0)) - 2.0 * log_total
    return logprob, logsumexp, lost, entropy, is_top1, mean_logits, log_sum_sq_probs


@triton.jit
def _gradient_of_row(
    p_row,  # its raw logits (V,); forbidden ones are -inf there
    p_out,  # (V,) out: the same memory, maybe in a narrower type
    target,  # int32, as columns are: int64 comparisons would spill
    skipped,
    bias_ptr,
    vocab_size,
    num_words,
    logprob,
    logsumexp,
    lost,
    entropy,
    g,  # of logprob, as the next two times sharpness
    common,  # the coefficient of p in every column
    d_entropy,
    softcap,
    sharpness,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dZ of a row over its logits."""
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        b_z = tl.load(p_row + column, mask=inside, other=0.0)  # (BLOCK,)
        b_z, b_slope = _logits_of(
            b_z, bias_ptr, column, inside, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN
        )
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
        tl.store(p_out + column, b_dz.to(p_out.dtype.element_ty), mask=inside)
