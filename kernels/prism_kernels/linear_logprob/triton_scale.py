"""The loss's own gradient times dX, dW and db, without waiting for it and without a copy where it is 1.

Legend: N elements of a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
PROGRAMS = 1024  # at most; each walks over its share, so that a factor of 1 ends a launch at once


@triton.jit(do_not_specialize=["num_elements"])
def lm_head_bwd_scale_kernel(
    x_ptr,  # (N,)
    out_ptr,  # (N,) out: x_ptr, or another in another type
    factor_ptr,  # 0-d
    num_elements,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    stop = tl.zeros((), tl.int64) + num_elements
    if IN_PLACE:
        stop = tl.where(factor == 1.0, 0, stop)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, stop, step):
        i = first + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + i, mask=i < stop, other=0.0).to(factor.dtype)  # (BLOCK,)
        tl.store(out_ptr + i, (b_x * factor).to(out_ptr.dtype.element_ty), mask=i < stop)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    in_place = gradient.dtype == dtype
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    if gradient.numel():
        grid = (min(PROGRAMS, -(-gradient.numel() // BLOCK)),)
        lm_head_bwd_scale_kernel[grid](
            gradient, out, factor, gradient.numel(), IN_PLACE=in_place, BLOCK=BLOCK, num_warps=WARPS
        )
    return out
