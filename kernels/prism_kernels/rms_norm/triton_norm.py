"""RMSNorm on a GPU, alone or behind a residual sum: one launch forward, one backward and a sum over its partials.

Legend: T rows, H hidden, P programs of a backward. A row that a program holds (WHOLE) is read once, others twice. The
backward of a sum gives one gradient, of x and of the residual: the norm's plus the sum's own, in the same pass. A
weight's gradient is a partial per program, over its rows in their order, and a sum over the P partials: no atomics.

Ours and not liger-kernel's, whose RMSNorm fills the gradient with zeros first, computes fp64 in fp32, copies strided
input, and whose norm behind a sum compiles anew for every length (rows per program is a constexpr): dev/LOG.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.rms_norm.triton_launch import _number, as_triton, norm_options, num_programs, rows_of


@triton.jit
def _row(x_ptr, residual_ptr, column, inside, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr):
    """(BLOCK,) of x, or of the sum, rounded as a tensor of it is."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(WIDE)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + column, mask=inside, other=0.0).to(WIDE)
        x = x.to(x_ptr.dtype.element_ty).to(WIDE)
    return x


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,  # (T, H), last stride 1
    residual_ptr,  # (T, H), last stride 1, or x_ptr
    weight_ptr,  # (H,) contiguous
    y_ptr,  # (T, H) contiguous, out
    total_ptr,  # (T, H) contiguous, out: x + residual, or y_ptr
    scale_ptr,  # (T,) wide, out: 1 / root of the mean square
    width,
    x_stride,
    residual_stride,
    eps: tl.float64,
    inverse_width: tl.float64,
    HAS_RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + i_row * x_stride
    p_residual = residual_ptr + i_row * residual_stride
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        x = _row(p_x, p_residual, columns, columns < width, HAS_RESIDUAL, WIDE)
        squares = x * x
    else:
        squares = tl.zeros([BLOCK], dtype=WIDE)
        for start in range(0, width, BLOCK):
            column = start + columns
            x = _row(p_x, p_residual, column, column < width, HAS_RESIDUAL, WIDE)
            squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 0) * _number(inverse_width, WIDE) + _number(eps, WIDE))
    tl.store(scale_ptr + i_row, scale)
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = column < width
        if not WHOLE:
            x = _row(p_x, p_residual, column, inside, HAS_RESIDUAL, WIDE)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE)
        out = i_row * width + column
        if HAS_RESIDUAL:
            tl.store(total_ptr + out, x.to(total_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + out, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    d_y_ptr,  # (T, H), last stride 1
    d_total_ptr,  # (T, H), last stride 1: gradient of the sum, or d_y_ptr
    x_ptr,  # (T, H), last stride 1: what was normalised
    weight_ptr,  # (H,) contiguous
    scale_ptr,  # (T,) contiguous
    d_x_ptr,  # (T, H) contiguous, out
    partial_ptr,  # (P, H) wide, contiguous, out: of the weight's gradient; zeros where not WHOLE; or d_x_ptr
    num_rows,
    width,
    d_y_stride,
    d_total_stride,
    x_stride,
    inverse_width: tl.float64,
    HAS_D_TOTAL: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    p_partial = partial_ptr + tl.program_id(0).to(tl.int64) * width
    if WHOLE:
        inside = columns < width
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
        d_weight = tl.zeros([BLOCK], dtype=WIDE)
    first = tl.program_id(0).to(tl.int64)
    for behind in range(0, num_rows - tl.program_id(0), tl.num_programs(0)):
        row = first + behind
        p_x = x_ptr + row * x_stride
        p_d_y = d_y_ptr + row * d_y_stride
        p_d_total = d_total_ptr + row * d_total_stride
        p_d_x = d_x_ptr + row * width
        scale = tl.load(scale_ptr + row)
        if WHOLE:
            x = tl.load(p_x + columns, mask=inside, other=0.0).to(WIDE) * scale
            d_y = tl.load(p_d_y + columns, mask=inside, other=0.0).to(WIDE)
            d_weight += d_y * x
            d_y *= weight
            along = tl.sum(d_y * x, 0) * _number(inverse_width, WIDE)
            d_x = (d_y - x * along) * scale
            if HAS_D_TOTAL:
                d_x += tl.load(p_d_total + columns, mask=inside, other=0.0).to(WIDE)
            tl.store(p_d_x + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        else:
            products = tl.zeros([BLOCK], dtype=WIDE)
            for start in range(0, width, BLOCK):
                column = start + columns
                inside = column < width
                x = tl.load(p_x + column, mask=inside, other=0.0).to(WIDE) * scale
                d_y = tl.load(p_d_y + column, mask=inside, other=0.0).to(WIDE)
                products += d_y * x * tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE)
            along = tl.sum(products, 0) * _number(inverse_width, WIDE)
            for start in range(0, width, BLOCK):
                column = start + columns
                inside = column < width
                x = tl.load(p_x + column, mask=inside, other=0.0).to(WIDE) * scale
                d_y = tl.load(p_d_y + column, mask=inside, other=0.0).to(WIDE)
                if WITH_WEIGHT:
                    so_far = tl.load(p_partial + column, mask=inside, other=0.0)
                    tl.store(p_partial + column, so_far + d_y * x, mask=inside)
                d_y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE)
                d_x = (d_y - x * along) * scale
                if HAS_D_TOTAL:
                    d_x += tl.load(p_d_total + column, mask=inside, other=0.0).to(WIDE)
                tl.store(p_d_x + column, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if WHOLE and WITH_WEIGHT:
        tl.store(p_partial + columns, d_weight, mask=columns < width)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or an empty tensor, the scale of every row (T,), wide)."""
    width = x.shape[-1]
    rows, added = rows_of(x), None if residual is None else rows_of(residual)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    scale = x.new_empty(rows.shape[0], dtype=wide)
    options = norm_options(width, wide, "forward")
    if rows.shape[0]:
        rms_norm_fwd_kernel[(rows.shape[0],)](
            rows,
            rows if added is None else added,
            weight.contiguous(),
            y,
            y if added is None else total,
            scale,
            width,
            rows.stride(0),
            0 if added is None else added.stride(0),
            eps,
            1 / width,
            HAS_RESIDUAL=added is not None,
            WIDE=as_triton(wide),
            **options,
        )
    return y, total, scale


def backward(
    d_y: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x, and of the residual; gradient of the weight, or an empty tensor)."""
    width = x.shape[-1]
    rows, upstream = rows_of(x), rows_of(d_y)
    added = upstream if d_total is None else rows_of(d_total)
    d_x = x.new_empty(x.shape)
    options = norm_options(width, scale.dtype, "backward")
    programs = num_programs(rows.shape[0], x.device, options.pop("PROGRAMS"))
    make = torch.empty if options["WHOLE"] and rows.shape[0] else torch.zeros
    partial = make(programs if with_weight else 0, width, dtype=scale.dtype, device=x.device)
    if rows.shape[0]:
        rms_norm_bwd_kernel[(programs,)](
            upstream,
            added,
            rows,
            weight.contiguous(),
            scale,
            d_x,
            partial if with_weight else d_x,
            rows.shape[0],
            width,
            upstream.stride(0),
            added.stride(0),
            rows.stride(0),
            1 / width,
            HAS_D_TOTAL=d_total is not None,
            WITH_WEIGHT=with_weight,
            WIDE=as_triton(scale.dtype),
            **options,
        )
    return d_x, partial.sum(0).to(weight.dtype) if with_weight else weight.new_empty(0)
