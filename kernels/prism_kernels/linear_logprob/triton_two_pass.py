"""Statistics, objective and dZ of a row in one launch: a loss whose rows do not couple knows dL/dlogprob at once.

Legend: R rows of the chunk, V vocab size, BLOCK columns a step. The second pass over a row finds in the L2 cache what
the first has left there, if the rows under way fit: a few programs walk over all rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.linear_logprob.records import IGNORE
from prism_kernels.linear_logprob.triton_objective import UNSPECIALIZED, _objective_of_rows
from prism_kernels.linear_logprob.triton_row import _as_dtype, _bar, _gradient_of_row, _statistics_of_row
from prism_kernels.tuned_options import tuned

# (BLOCK, num_warps) by bytes of a logit: one program a multiprocessor, so that it asks for as much as it can. Under a
# softcap half the threads, which need twice the registers.
BLOCKS = {4: (8192, 32), 8: (1024, 16)}
REGISTERS = 1 << 16  # of a multiprocessor; left to itself ptxas takes fewer for some programs, and spills
CACHE_SHARE = 0.8  # of the L2 cache, for the rows under way
_IGNORE = tl.constexpr(IGNORE)


@triton.jit(do_not_specialize=["num_words", "num_forbidden", *UNSPECIALIZED])
def lm_head_objective_fwd_rows_kernel(
    z_ptr,  # (R, V) in
    dz_ptr,  # (R, V) out: the same memory, maybe in a narrower type
    target_ptr,  # (computed rows of all chunks,) int64
    bias_ptr,  # (V,) or z_ptr
    forbidden_ptr,  # (num_forbidden,) int32, or target_ptr
    logprob_ptr,  # (R,) out, as the next
    entropy_ptr,
    rows_ptr,  # from here to divisor_ptr: see _objective_of_rows
    sequence_ptr,
    advantage_ptr,
    count_ptr,
    mean_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    divisor_ptr,
    row_stride,
    dz_row_stride,
    vocab_size,
    num_words,
    num_forbidden,
    flags,
    start,  # the chunk's first row among all
    num_rows,  # R
    inverse_temperature: tl.float64,  # a float is fp32 to a launch where nothing says otherwise
    cap: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    importance_cap: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    max_length: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    HAS_D_ENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for r in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        i_row = tl.zeros((), tl.int64) + r
        i = i_row + start
        target = tl.load(target_ptr + i)
        kept = target != _IGNORE
        odd = (target < 0) | (target >= num_words)
        if HAS_FORBIDDEN:
            for f in range(num_forbidden):
                odd |= tl.load(forbidden_ptr + f) == target
        p_row = z_ptr + i_row * row_stride
        if HAS_FORBIDDEN:
            _bar(p_row, forbidden_ptr, num_forbidden)
        # The first pass: over no words where there is nothing to compute.
        at = tl.where(odd, 0, target)
        logprob, logsumexp, lost, entropy, _, _, _ = _statistics_of_row(
            p_row, at, bias_ptr, vocab_size, tl.where(odd, 0, num_words), num_forbidden, inverse_temperature, cap,
            HAS_BIAS, HAS_SOFTCAP, HAS_FORBIDDEN, WITH_ENTROPY, False, False, False, BLOCK,
        )  # fmt: skip
        nothing = tl.where(kept, float("nan"), 0.0)
        logprob, entropy = tl.where(odd, nothing, logprob), tl.where(odd, nothing, entropy)
        logsumexp, lost = tl.where(odd, nothing, logsumexp), tl.where(odd, nothing, lost)
        tl.store(logprob_ptr + i_row, logprob)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + i_row, entropy)
        _, g, d_entropy, _, _, _, _, _, _, _, _, _ = _objective_of_rows(
            i, kept, logprob, entropy, rows_ptr, sequence_ptr, advantage_ptr, count_ptr, mean_ptr, old_ptr, ref_ptr,
            rollout_ptr, divisor_ptr, flags, clip_low, clip_high, dual_clip, importance_cap, kl_coef, entropy_coef,
            max_length,
        )  # fmt: skip
        sharpness = _as_dtype(logprob.dtype, inverse_temperature)
        softcap = _as_dtype(logprob.dtype, cap)
        g = g * sharpness
        # The second: the sums of the first were barriers, every thread has read what it overwrites.
        _gradient_of_row(
            p_row, dz_ptr + i_row * dz_row_stride, at.to(tl.int32), target == _IGNORE, bias_ptr, vocab_size, num_words,
            logprob, logsumexp, lost, entropy, g, -g, d_entropy * sharpness, softcap, sharpness, HAS_BIAS, HAS_SOFTCAP,
            HAS_FORBIDDEN, HAS_D_ENTROPY, NARROW, BLOCK,
        )  # fmt: skip


def block_options(itemsize: int, softcap: bool) -> dict[str, int]:
    """BLOCK, warps and registers on logits of so many bytes."""
    block, warps = BLOCKS[itemsize]
    if softcap and itemsize == 4:
        block, warps = block // 2, warps // 2
    return {"BLOCK": block, "num_warps": warps, "maxnreg": REGISTERS // (32 * warps)}


def options(z: Tensor, softcap: bool) -> tuple[int, dict[str, int]]:
    """(how many rows of the chunk are under way at a time, launch options); 0 rows: two kernels instead.

    One a multiprocessor, if so many fit into the L2 cache, else none: with fewer, multiprocessors would lie idle, with
    more, the second pass would find nothing there. Unless a table says for how many MEGABYTES of rows it is worth it.
    """
    row_bytes = z.stride(0) * z.element_size()
    key = f"two_pass {z.element_size()}"
    found = tuned("linear_logprob", key, {"MEGABYTES": 0, **block_options(z.element_size(), softcap)})
    megabytes = found.pop("MEGABYTES")
    processors, cache = _gpu(z.device)
    if megabytes:
        return min(processors, int(megabytes * 1e6) // row_bytes), found
    return processors if processors * row_bytes <= CACHE_SHARE * cache else 0, found


def _gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of L2 cache). In the interpreter one, whose cache holds nothing."""
    if device.type != "cuda":
        return 1, 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size
