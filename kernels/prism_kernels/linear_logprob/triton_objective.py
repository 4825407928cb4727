"""The glue of the losses in Triton: between a chunk's log-probs and their gradients one launch, for every objective.

Legend: T rows of the input, R rows computed (plan), S sequences, P programs. What an objective reads lies there by row
(T,) or by sequence (S,); log-probs and what follows from them by computed row (R,), or by row of the chunk. ``flags``
says at run time which objective it is: a kernel is compiled once, and what an objective does not read is not loaded.
Sums: every program leaves a row of ``partial`` (P, 16), one program adds them up; no atomics, so results repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prism_kernels.linear_logprob.objectives import LOG_RATIO_LIMIT, STATISTICS
from prism_kernels.linear_logprob.records import IGNORE
from prism_kernels.linear_logprob.triton_row import _as_dtype

COLUMNS = 16  # of partial: the loss, then STATISTICS
_IGNORE = tl.constexpr(IGNORE)
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
_COLUMNS = tl.constexpr(COLUMNS)
_USED = tl.constexpr(1 + len(STATISTICS))
_LARGEST = tl.constexpr(1 + STATISTICS.index("rollout_diff_max"))

# Bits of ``flags``.
NLL = tl.constexpr(1)  # advantage * nll, and nothing else: cross-entropy
ONES = tl.constexpr(2)  # advantages are 1
BY_ROW = tl.constexpr(4)  # advantages lie by row
SEQUENCES = tl.constexpr(8)  # rows belong to sequences
COMPACT = tl.constexpr(16)  # rows (R,) says which row of the input a computed row is
OLD, REF, ROLLOUT = tl.constexpr(32), tl.constexpr(64), tl.constexpr(128)
MEAN = tl.constexpr(256)  # one ratio per sequence
CAPPED = tl.constexpr(512)
K2, K3 = tl.constexpr(1024), tl.constexpr(2048)
PER_SEQUENCE = tl.constexpr(4096)  # a mean over the rows of each sequence
ENTROPY, D_ENTROPY = tl.constexpr(8192), tl.constexpr(16384)
BOUNDED = tl.constexpr(32768)
UNSPECIALIZED = ["flags", "start", "stop", "num_rows", "num_sequences", "num_programs", "first"]


@triton.jit
def _if(kept, flags, BIT: tl.constexpr):
    """``kept``, where the bit is set. (A block & a scalar is no mask to the interpreter.)"""
    return tl.where(kept, flags & BIT, 0) != 0


@triton.jit
def _clamped(x):
    """NaN stays NaN."""
    return tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x))


@triton.jit
def _objective_of_rows(
    i,  # int64 scalar or block, as the next three: the computed row
    kept,  # neither skipped nor outside
    logprob,
    entropy,
    rows_ptr,  # (R,) int64
    sequence_ptr,  # (T,) int32; -1: in no sequence
    advantage_ptr,  # (T,) or (S,)
    count_ptr,  # (S,) int32: unmasked rows
    mean_ptr,  # (S,): mean log-ratio
    old_ptr,  # (T,), as the next two
    ref_ptr,
    rollout_ptr,
    divisor_ptr,  # 0-d
    flags,
    clip_low,  # fp64, as all below
    clip_high,
    dual_clip,
    cap,
    kl_coef,
    entropy_coef,
    max_length,
):
    """(loss, dloss/dlogprob, dloss/dentropy, all weighted, and what the statistics are made of) of rows whose log-prob
    is known: the formulas of README.md, once for all kernels that need them."""
    dtype: tl.constexpr = logprob.dtype
    row = tl.load(rows_ptr + i, mask=_if(kept, flags, COMPACT), other=0)
    row = tl.where(flags & COMPACT != 0, row, i)
    sequence = tl.load(sequence_ptr + row, mask=_if(kept, flags, SEQUENCES), other=0)
    known = kept & (sequence >= 0)
    at = tl.where(flags & BY_ROW != 0, row, sequence.to(tl.int64))
    advantage = tl.load(advantage_ptr + at, mask=tl.where(known, flags & ONES, 1) == 0, other=1.0).to(dtype)
    advantage = tl.where(kept & (sequence < 0), float("nan"), advantage)
    count = tl.load(count_ptr + sequence, mask=_if(known, flags, PER_SEQUENCE), other=1).to(dtype)
    weight = 1.0 / (tl.load(divisor_ptr).to(dtype) * _as_dtype(dtype, max_length) * count)

    old = tl.load(old_ptr + row, mask=_if(kept, flags, OLD), other=0.0).to(dtype)
    old = tl.where(flags & OLD != 0, old, logprob)
    raw = logprob - old  # on-policy 0, but NaN where the definition's is
    log_ratio = _clamped(raw)
    kl_old = tl.exp(log_ratio) - log_ratio - 1.0
    mean = tl.load(mean_ptr + sequence, mask=_if(known, flags, MEAN), other=0.0).to(dtype)
    ratio = tl.exp(tl.where(flags & MEAN != 0, mean, log_ratio))
    slope = tl.where(tl.where(flags & MEAN != 0, 0.0, tl.abs(raw)) > _LIMIT, 0.0, 1.0).to(dtype)
    low, high = _as_dtype(dtype, clip_low), _as_dtype(dtype, clip_high)
    free = ratio * advantage
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    # Where free is NaN both are: whoever looks at gradients alone must see it.
    loss = -tl.where(free > clipped, clipped, free)
    d_logprob = tl.where(free > clipped, 0.0, -free * slope)
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    bound = -_as_dtype(dtype, dual_clip) * advantage
    bounded = _if((advantage < 0) & (loss > bound), flags, BOUNDED)
    loss, d_logprob = tl.where(bounded, bound, loss), tl.where(bounded, 0.0, d_logprob)

    rollout = tl.load(rollout_ptr + row, mask=_if(kept, flags, ROLLOUT), other=0.0).to(dtype)
    difference = tl.where(flags & ROLLOUT != 0, old - rollout, 0.0)
    weighing = tl.exp(difference)
    capped = weighing > _as_dtype(dtype, cap)
    importance = tl.where(flags & CAPPED != 0, tl.where(capped, _as_dtype(dtype, cap), weighing), 1.0)
    loss, d_logprob = loss * importance, d_logprob * importance

    ref = tl.load(ref_ptr + row, mask=_if(kept, flags, REF), other=0.0).to(dtype)
    away = tl.where(flags & REF != 0, ref - logprob, 0.0)
    u = _clamped(away)
    inside = tl.where(tl.abs(away) <= _LIMIT, 1.0, 0.0).to(dtype)
    kl = tl.where(flags & K3 != 0, tl.exp(u) - u - 1.0, tl.where(flags & K2 != 0, u * u / 2.0, -away))
    d_kl = tl.where(flags & K3 != 0, (1.0 - tl.exp(u)) * inside, tl.where(flags & K2 != 0, -u * inside, 1.0))
    k, e = _as_dtype(dtype, kl_coef), _as_dtype(dtype, entropy_coef)
    # A term without a coefficient is only a statistic, which may be infinite.
    loss, d_logprob = tl.where(k != 0, loss + k * kl, loss), tl.where(k != 0, d_logprob + k * d_kl, d_logprob)
    loss = tl.where(e != 0, loss - e * entropy, loss)

    loss = tl.where(flags & NLL != 0, -advantage * logprob, loss)
    d_logprob = tl.where(flags & NLL != 0, -advantage, d_logprob)
    # where, not a product: a skipped row may carry NaN in what came from outside.
    loss, d_logprob = tl.where(kept, weight * loss, 0.0), tl.where(kept, weight * d_logprob, 0.0)
    d_entropy = tl.where(kept, -e * weight, 0.0)
    return loss, d_logprob, d_entropy, ratio, below, above, kl_old, bounded, kl, difference, importance, capped


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lm_head_objective_fwd_count_kernel(
    target_ptr,  # (T,) int64
    start_ptr,  # (S + 1,) int32 or int64
    sequence_ptr,  # (T,) int32 out: the sequence of each row, -1 for none
    count_ptr,  # (S,) int32 out: its unmasked rows
    num_rows,
    num_sequences,
    BLOCK: tl.constexpr,
):
    """One program a sequence. Rows before the first and past the last, where offsets are wrong, get -1."""
    i = tl.program_id(0)
    # No device has checked that the offsets lie in [0, T].
    start = tl.minimum(tl.maximum(tl.load(start_ptr + i).to(tl.int64), 0), num_rows)
    stop = tl.minimum(tl.maximum(tl.load(start_ptr + i + 1).to(tl.int64), 0), num_rows)
    begin = tl.where(i == 0, 0, start)
    end = tl.where(i == num_sequences - 1, num_rows.to(tl.int64), stop)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        mine = (row >= start) & (row < stop)
        target = tl.load(target_ptr + row, mask=row < end, other=_IGNORE)
        b_count += tl.where(mine & (target != _IGNORE), 1, 0)
        tl.store(sequence_ptr + row, tl.where(mine, i, -1), mask=row < end)
    tl.store(count_ptr + i, tl.sum(b_count, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lm_head_objective_fwd_mean_kernel(
    logprob_ptr,  # (stop - start,)
    target_ptr,  # (R,) int64
    rows_ptr,  # (R,) int64
    position_ptr,  # (S + 1,) where sequences begin among the computed rows
    count_ptr,  # (S,) int32
    old_ptr,  # (T,)
    mean_ptr,  # (S,) out: of those whose rows are here, all of them
    flags,
    start,
    stop,
    BLOCK: tl.constexpr,
):
    """One program a sequence: the mean of its clamped log-ratios."""
    i = tl.program_id(0)
    begin = tl.maximum(tl.load(position_ptr + i).to(tl.int64), start)
    end = tl.minimum(tl.load(position_ptr + i + 1).to(tl.int64), stop)
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    b_total = tl.zeros((BLOCK,), dtype)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        kept = tl.load(target_ptr + at, mask=at < end, other=_IGNORE) != _IGNORE
        row = tl.load(rows_ptr + at, mask=_if(kept, flags, COMPACT), other=0)
        row = tl.where(flags & COMPACT != 0, row, at)
        logprob = tl.load(logprob_ptr + (at - start), mask=kept, other=0.0)
        b_total += _clamped(logprob - tl.load(old_ptr + row, mask=kept, other=0.0).to(dtype))
    if begin < end:
        tl.store(mean_ptr + i, tl.sum(b_total, 0) / tl.load(count_ptr + i).to(dtype))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lm_head_objective_fwd_kernel(
    logprob_ptr,  # (stop - start,), as the next; those of the chunk
    entropy_ptr,
    target_ptr,  # (R,) int64
    rows_ptr,  # from here to divisor_ptr: see _objective_of_rows
    sequence_ptr,
    advantage_ptr,
    count_ptr,
    mean_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    divisor_ptr,
    d_logprob_ptr,  # (stop - start,) out, as the next
    d_entropy_ptr,
    partial_ptr,  # (P, 16) out
    flags,
    start,
    stop,
    first,  # the row of partial that the first program writes
    clip_low: tl.float64,  # a float is fp32 to a launch where nothing says otherwise
    clip_high: tl.float64,
    dual_clip: tl.float64,
    cap: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    max_length: tl.float64,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    local = pid * BLOCK + tl.arange(0, BLOCK).to(tl.int64)  # (BLOCK,)
    i = start + local
    kept = tl.load(target_ptr + i, mask=i < stop, other=_IGNORE) != _IGNORE
    logprob = tl.load(logprob_ptr + local, mask=kept, other=0.0)
    entropy = tl.load(entropy_ptr + local, mask=_if(kept, flags, ENTROPY), other=0.0)
    loss, d_logprob, d_entropy, ratio, below, above, kl_old, bounded, kl, difference, importance, capped = (
        _objective_of_rows(
            i, kept, logprob, entropy, rows_ptr, sequence_ptr, advantage_ptr, count_ptr, mean_ptr, old_ptr, ref_ptr,
            rollout_ptr, divisor_ptr, flags, clip_low, clip_high, dual_clip, cap, kl_coef, entropy_coef, max_length,
        )
    )  # fmt: skip
    tl.store(d_logprob_ptr + local, d_logprob, mask=i < stop)
    tl.store(d_entropy_ptr + local, d_entropy, mask=_if(i < stop, flags, D_ENTROPY))
    dtype: tl.constexpr = logprob.dtype
    size = tl.abs(difference)
    # The order of STATISTICS, behind the loss.
    p = partial_ptr + (first + pid).to(tl.int64) * _COLUMNS
    tl.store(p, tl.sum(loss, 0))
    tl.store(p + 1, tl.sum(kept.to(dtype), 0))
    tl.store(p + 2, tl.sum(tl.where(kept, ratio, 0.0), 0))
    tl.store(p + 3, tl.sum((below & kept).to(dtype), 0))
    tl.store(p + 4, tl.sum((above & kept).to(dtype), 0))
    tl.store(p + 5, tl.sum(tl.where(kept, kl_old, 0.0), 0))
    tl.store(p + 6, tl.sum((bounded & kept).to(dtype), 0))
    tl.store(p + 7, tl.sum(tl.where(kept, kl, 0.0), 0))
    tl.store(p + 8, tl.sum(entropy, 0))
    tl.store(p + 9, tl.sum(tl.where(kept, size, 0.0), 0))
    tl.store(p + 10, tl.max(tl.where(kept, size, 0.0), 0))
    tl.store(p + 11, tl.sum(tl.where(kept, importance, 0.0), 0))
    tl.store(p + 12, tl.sum((capped & kept).to(dtype), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lm_head_objective_fwd_total_kernel(
    partial_ptr,  # (P, 16)
    loss_ptr,  # 0-d out
    means_ptr,  # (12,) out: the statistics
    num_programs,
    BLOCK: tl.constexpr,
):
    """One program."""
    column = tl.arange(0, _COLUMNS)
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((_COLUMNS,), dtype)
    largest = tl.zeros((_COLUMNS,), dtype)
    for first in range(0, num_programs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        p = partial_ptr + i.to(tl.int64)[:, None] * _COLUMNS + column[None, :]
        block = tl.load(p, mask=(i < num_programs)[:, None] & (column < _USED)[None, :], other=0.0)
        total += tl.sum(block, 0)
        largest = tl.maximum(largest, tl.max(block, 0))
    tl.store(loss_ptr + column, total, mask=column == 0)
    rows = tl.sum(tl.where(column == 1, total, 0.0), 0)
    # The mean beside it is NaN where one of the numbers is: maxima may not see it.
    seen = tl.sum(tl.where(column == _LARGEST - 1, total, 0.0), 0)
    largest = tl.where((rows == 0) | (seen != seen), float("nan"), largest)
    means = tl.where(column == 1, total, tl.where(column == _LARGEST, largest, total / rows))
    tl.store(means_ptr + column - 1, means, mask=(column > 0) & (column < _USED))
