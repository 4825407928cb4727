"""Grouped GEMMs in Triton: one launch over all experts, offsets read on the device.

Legend: S rows grouped by expert, E experts, M x N a result tile's matrix, R inner dimension. The tensors' strides are
arguments, so that both weight layouts are read and written in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.moe.triton_plan import padded
from prism_kernels.tuned_options import tuned

# (BLOCK_M, BLOCK_N, BLOCK_R, warps, stages) by bytes of an element.
TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2), 8: (32, 32, 16, 4, 2)}

CLEAR_BLOCK = 8192


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b; 16-bit operands with fp32 sums, others in full precision."""
    if a.dtype.primitive_bitwidth == 16:
        return tl.dot(a, b, acc)
    else:  # triton 3.6 compiles what follows such a return
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def moe_gemm_rows_kernel(
    a_ptr,  # (S, R), last stride 1
    b_ptr,  # (E, R, N), any strides
    offset_ptr,  # (E+1,) int32
    out_ptr,  # (S, N) contiguous
    num_experts,
    inner,
    columns,
    a_stride,
    b_stride_e,
    b_stride_r,
    b_stride_n,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[rows of e] = a[rows of e] @ b[e]. The grid holds more tiles than can be needed; the last ones return."""
    i_tile = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    exists = expert < num_experts
    begin = tl.load(offset_ptr + expert, mask=exists, other=0)
    end = tl.load(offset_ptr + expert + 1, mask=exists, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    i_expert = tl.sum((upto <= i_tile).to(tl.int32), 0)
    if i_expert >= num_experts:
        return
    mine = expert == i_expert
    first = tl.sum(tl.where(mine, begin + (i_tile - (upto - tiles)) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)

    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = row < last
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < columns
    r = tl.arange(0, BLOCK_R)
    p_a = a_ptr + row[:, None] * a_stride + r[None, :]
    p_b = b_ptr + i_expert.to(tl.int64) * b_stride_e
    p_b += r.to(tl.int64)[:, None] * b_stride_r + column.to(tl.int64)[None, :] * b_stride_n
    step_b = tl.full([], BLOCK_R, tl.int64) * b_stride_r  # a stride of 1 arrives as a constant
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=WIDE)
    for start in range(0, inner, BLOCK_R):
        in_r = start + r < inner
        b_a = tl.load(p_a, mask=in_rows[:, None] & in_r[None, :], other=0.0)  # (M, R)
        b_b = tl.load(p_b, mask=in_r[:, None] & in_columns[None, :], other=0.0)  # (R, N)
        acc = _dot(b_a, b_b, acc)
        p_a += BLOCK_R
        p_b += step_b
    p_out = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def moe_gemm_bwd_outer_kernel(
    a_ptr,  # (S, M), last stride 1
    b_ptr,  # (S, N), last stride 1
    offset_ptr,  # (E+1,) int32
    out_ptr,  # (E, M, N), any strides
    rows,  # M
    columns,  # N
    a_stride,
    b_stride,
    out_stride_e,
    out_stride_m,
    out_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[e] = a[rows of e]^T @ b[rows of e]; zeros for an expert without rows."""
    i_expert = tl.program_id(2)
    first = tl.load(offset_ptr + i_expert)
    last = tl.load(offset_ptr + i_expert + 1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < rows, n < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=WIDE)
    for start in range(first, last, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_r = r < last
        in_a, in_b = in_m[:, None] & in_r[None, :], in_r[:, None] & in_n[None, :]
        b_a = tl.load(a_ptr + r[None, :] * a_stride + m[:, None], mask=in_a, other=0.0)  # (M, R)
        b_b = tl.load(b_ptr + r[:, None] * b_stride + n[None, :], mask=in_b, other=0.0)  # (R, N)
        acc = _dot(b_a, b_b, acc)
    p_out = out_ptr + i_expert.to(tl.int64) * out_stride_e
    p_out += m.to(tl.int64)[:, None] * out_stride_m + n.to(tl.int64)[None, :] * out_stride_n
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def moe_gemm_bwd_clear_kernel(out_ptr, offset_ptr, size, BLOCK: tl.constexpr):
    """Zeros for the experts without rows; out (E, size) contiguous."""
    i_expert = tl.program_id(1)
    if tl.load(offset_ptr + i_expert) < tl.load(offset_ptr + i_expert + 1):
        return
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        out_ptr + i_expert.to(tl.int64) * size + cell,
        tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty),
        mask=cell < size,
    )


def tile_options(dtype: torch.dtype) -> dict[str, object]:
    block_m, block_n, block_r, warps, stages = TILES[dtype.itemsize]
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "num_warps": warps, "num_stages": stages}
    return {**tuned("moe", f"tile {dtype.itemsize}", blocks), "WIDE": wide}


def rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    """a (S, R) grouped by expert, b (E, R, N) -> (S, N)."""
    slots, inner = a.shape
    experts, _, columns = b.shape
    out = a.new_empty(slots, columns)
    options = tile_options(a.dtype)
    grid = (triton.cdiv(slots, options["BLOCK_M"]) + experts, triton.cdiv(columns, options["BLOCK_N"]))
    moe_gemm_rows_kernel[grid](
        a, b, offset, out, experts, inner, columns, a.stride(0), *b.stride(), E_PAD=padded(experts), **options
    )
    return out


def outer(a: Tensor, b: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    """a (S, M), b (S, N), grouped by expert -> (E, M, N), strided as ``like``."""
    out = torch.empty_like(like)
    experts, m, n = out.shape
    options = tile_options(a.dtype)
    grid = (triton.cdiv(m, options["BLOCK_M"]), triton.cdiv(n, options["BLOCK_N"]), experts)
    moe_gemm_bwd_outer_kernel[grid](a, b, offset, out, m, n, a.stride(0), b.stride(0), *out.stride(), **options)
    return out


def clear_empty(out: Tensor, offset: Tensor) -> None:
    """Zeros, in place, in out (E, M, N) contiguous for the experts without rows; the others are not touched."""
    size = out[0].numel()
    moe_gemm_bwd_clear_kernel[(triton.cdiv(size, CLEAR_BLOCK), len(out))](
        out, offset, size, BLOCK=CLEAR_BLOCK, num_warps=8
    )
