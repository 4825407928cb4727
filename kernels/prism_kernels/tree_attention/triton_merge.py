"""merge.py in Triton, in place: one launch for a part of a softmax, one for the gradients of q, k and v.

Legend: N queries, n of them in a part, T keys, Hq and Hkv heads of D, a multiple of 8. 16-bit tensors are summed in
fp32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 4096, 4  # numbers: of some queries of one head
SUM_BLOCK, SUM_WARPS = 2048, 8


@triton.jit
def _masked(lse):
    """The log of a sum of nothing is -inf; a library may say +inf."""
    return tl.where(lse == float("inf"), -float("inf"), lse)


@triton.jit
def tree_attention_fwd_merge_kernel(
    out_ptr,  # (N, Hq, D) contiguous
    lse_ptr,  # (Hq, N) fp32
    part_ptr,  # (n, Hq, D) contiguous
    part_lse_ptr,  # (Hq, n) fp32
    row_ptr,  # (n,) int32: where the part's queries lie; not read unless SCATTER
    total,  # N
    count,  # n
    heads,
    eighths,  # D / 8: D is a multiple of 8, which its loads profit from
    SCATTER: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """The part into the whole. LAST: a query to which nothing has been added gets NaN, else it stays 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_head = tl.program_id(1).to(tl.int64)
    inside = i < count
    row = tl.load(row_ptr + i, mask=inside, other=0).to(tl.int64) if SCATTER else i
    p_lse = lse_ptr + i_head * total + row
    mine = _masked(tl.load(p_lse, mask=inside, other=0.0))  # (n,)
    theirs = _masked(tl.load(part_lse_ptr + i_head * count + i, mask=inside, other=0.0))
    top = tl.maximum(mine, theirs, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)  # -inf less -inf is NaN
    mine, theirs = tl.exp(mine - top), tl.exp(theirs - top)
    both = mine + theirs
    tl.store(p_lse, top + tl.log(both), mask=inside)
    share = both if LAST else tl.where(both == 0.0, 1.0, both)

    d, dim = tl.arange(0, D_PAD), eighths * 8
    cell = inside[:, None] & (d < dim)[None, :]
    p_out = out_ptr + (row * heads + i_head)[:, None] * dim + d[None, :]
    p_part = part_ptr + (i * heads + i_head)[:, None] * dim + d[None, :]
    b_out = tl.load(p_out, mask=cell, other=0.0).to(tl.float32)  # (n, D)
    b_part = tl.load(p_part, mask=cell, other=0.0).to(tl.float32)
    b_out = b_out * (mine / share)[:, None] + b_part * (theirs / share)[:, None]  # a NaN stays one, whatever it weighs
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=cell)


@triton.jit
def tree_attention_fwd_mask_kernel(
    out_ptr,  # (N, Hq, D) contiguous
    lse_ptr,  # (Hq, N) fp32
    total,  # N
    heads,
    eighths,  # D / 8
    BLOCK: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """The masked log-sum-exp, and NaN where it is of nothing. Only such rows of the output are touched."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_head = tl.program_id(1).to(tl.int64)
    inside = i < total
    p_lse = lse_ptr + i_head * total + i
    lse = _masked(tl.load(p_lse, mask=inside, other=0.0))  # (N,)
    nothing = inside & (lse == -float("inf"))
    tl.store(p_lse, lse, mask=nothing)
    d, dim = tl.arange(0, D_PAD), eighths * 8
    p_out = out_ptr + (i * heads + i_head)[:, None] * dim + d[None, :]
    none = tl.full([BLOCK, D_PAD], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(p_out, none, mask=nothing[:, None] & (d < dim)[None, :])


@triton.jit
def _add(sum_ptr, part_ptr, target, cell, inside):
    total = tl.load(sum_ptr + target, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(part_ptr + cell, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + target, total.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tree_attention_bwd_sum_kernel(
    dq_ptr,  # (N, Hq, D) contiguous, as all of them
    dk_ptr,  # (T, Hkv, D)
    dv_ptr,
    part_q_ptr,  # (n, Hq, D)
    part_k_ptr,
    part_v_ptr,
    row_ptr,  # (n,) int32: where the part's queries lie; not read unless SCATTER
    size_q,  # n * Hq * D
    size_k,  # T * Hkv * D
    width,  # Hq * D
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The part's gradients into their sums: first the blocks of q, then those of k, then those of v."""
    i_block = tl.program_id(0)
    blocks_q, blocks_k = tl.cdiv(size_q, BLOCK), tl.cdiv(size_k, BLOCK)
    cell = tl.arange(0, BLOCK).to(tl.int64)
    if i_block < blocks_q:
        cell += i_block.to(tl.int64) * BLOCK
        inside = cell < size_q
        target = cell
        if SCATTER:
            row = tl.load(row_ptr + cell // width, mask=inside, other=0).to(tl.int64)
            target = row * width + cell % width
        _add(dq_ptr, part_q_ptr, target, cell, inside)
    elif i_block < blocks_q + blocks_k:
        cell += (i_block - blocks_q).to(tl.int64) * BLOCK
        _add(dk_ptr, part_k_ptr, cell, cell, cell < size_k)
    else:
        cell += (i_block - blocks_q - blocks_k).to(tl.int64) * BLOCK
        _add(dv_ptr, part_v_ptr, cell, cell, cell < size_k)


def merge_(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None, last: bool = False
) -> None:
    """As merge.merge_, of contiguous tensors; lse in fp32."""
    count, heads, dim = part_out.shape
    if not part_out.numel():
        return
    tile = tile_of(dim)
    tree_attention_fwd_merge_kernel[(triton.cdiv(count, tile["BLOCK"]), heads)](
        out, lse, part_out, part_lse, part_lse if rows is None else rows, out.shape[0], count, heads, dim // 8,
        SCATTER=rows is not None, LAST=last, num_warps=WARPS, **tile,
    )  # fmt: skip


def settle_(out: Tensor, lse: Tensor) -> None:
    """As merge.settle_, of contiguous tensors; lse in fp32."""
    total, heads, dim = out.shape
    if out.numel():
        tile = tile_of(dim)
        grid = (triton.cdiv(total, tile["BLOCK"]), heads)
        tree_attention_fwd_mask_kernel[grid](out, lse, total, heads, dim // 8, num_warps=WARPS, **tile)


def add_(sums: tuple[Tensor, ...], parts: tuple[Tensor, ...], rows: Tensor | None) -> None:
    """As merge.add_, of contiguous tensors of at most 32 bits."""
    (part_q, part_k, _), block = parts, SUM_BLOCK
    size_q, size_k, width = part_q.numel(), part_k.numel(), part_q.shape[1] * part_q.shape[2]
    grid = triton.cdiv(size_q, block) + 2 * triton.cdiv(size_k, block)
    if grid:
        tree_attention_bwd_sum_kernel[(grid,)](
            *sums, *parts, part_q if rows is None else rows, size_q, size_k, width,
            SCATTER=rows is not None, BLOCK=block, num_warps=SUM_WARPS,
        )  # fmt: skip


def tile_of(dim: int) -> dict[str, int]:
    padded = triton.next_power_of_2(dim)
    return {"BLOCK": max(1, TILE // padded), "D_PAD": padded}
