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

from prism_kernels.linear_logprob.engine import NOTHING_FURTHER, Further, Objective, RowKernels, Statistics, Upstream
from prism_kernels.linear_logprob.records import IGNORE, Head
from prism_kernels.linear_logprob.triton_glue import CrossEntropy, Policy
from prism_kernels.linear_logprob.triton_glue import Objective as InTriton
from prism_kernels.linear_logprob.triton_row import _as_dtype, _bar, _gradient_of_row, _statistics_of_row
from prism_kernels.linear_logprob.triton_scale import scaled
from prism_kernels.linear_logprob.triton_two_pass import lm_head_objective_fwd_rows_kernel
from prism_kernels.linear_logprob.triton_two_pass import options as two_pass_options
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
    logprob, logsumexp, lost, entropy, is_top1, mean_logits, log_sum_sq_probs = _statistics_of_row(
        p_row, target, bias_ptr, vocab_size, num_words, num_forbidden, inverse_temperature, cap, HAS_BIAS, HAS_SOFTCAP,
        HAS_FORBIDDEN, WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES, BLOCK,
    )  # fmt: skip
    tl.store(logprob_ptr + i_row, logprob)
    tl.store(logsumexp_ptr + i_row, logsumexp)
    tl.store(lost_ptr + i_row, lost)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + i_row, entropy)
    if WITH_TOP1:
        tl.store(is_top1_ptr + i_row, is_top1.to(tl.uint8))
    if WITH_MEAN:
        tl.store(mean_logits_ptr + i_row, mean_logits)
    if WITH_SQUARES:
        tl.store(log_sum_sq_probs_ptr + i_row, log_sum_sq_probs)


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
    sharpness = _as_dtype(logprob.dtype, inverse_temperature)
    softcap = _as_dtype(logprob.dtype, cap)
    g = tl.load(d_logprob_ptr + i_row) * sharpness
    common = -g  # coefficient of p in every column
    if HAS_D_LOGSUMEXP:
        common += tl.load(d_logsumexp_ptr + i_row) * sharpness
    d_entropy, entropy = g, g  # not read unless there is one
    if HAS_D_ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + i_row) * sharpness
        entropy = tl.load(entropy_ptr + i_row)
    _gradient_of_row(
        p_row, p_out, target, skipped, bias_ptr, vocab_size, num_words, logprob, logsumexp, lost, entropy, g, common,
        d_entropy, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN, HAS_D_ENTROPY, NARROW, BLOCK,
    )  # fmt: skip


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


def at_once(
    z: Tensor, head: Head, with_entropy: bool, objective: Objective, start: int
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    num_rows, vocab_size = z.shape
    if not isinstance(objective, InTriton) or objective.couples or head.hidden.dtype is torch.float16:
        return None  # fp16: the scale of dZ is read from the chunk's gradients first
    programs, options = two_pass_options(z, head.softcap is not None)
    if programs == 0:
        return None
    dz = z.view(head.hidden.dtype)[:, :vocab_size] if head.hidden.dtype != z.dtype else z
    logprob = z.new_empty(num_rows)
    entropy = z.new_empty(num_rows) if with_entropy else None
    lm_head_objective_fwd_rows_kernel[(min(programs, num_rows),)](
        z,
        dz,
        objective.plan.targets,
        z if head.bias is None else head.bias.contiguous(),
        _ids(tuple(head.forbidden), z.device) if head.forbidden else objective.plan.targets,
        logprob,
        logprob if entropy is None else entropy,
        *objective.by_row,
        z.stride(0),
        dz.stride(0),
        vocab_size,
        head.words,
        len(head.forbidden),
        objective.flags,
        start,
        num_rows,
        *_scalars(head),
        *objective.scalars,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_FORBIDDEN=bool(head.forbidden),
        WITH_ENTROPY=with_entropy,
        HAS_D_ENTROPY=objective.scalars.entropy_coef != 0,
        NARROW=dz.dtype != z.dtype,
        **options,
    )
    return logprob, entropy, dz


ROW_KERNELS = RowKernels(True, prepare, statistics, gradient, CrossEntropy, Policy, scaled, at_once)
