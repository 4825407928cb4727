"""Decoding over pages in one launch: norm and rotation, partial softmaxes, their merge by log-sum-exp; no wait.

Legend: B rows, G prompts, Hq query and Hkv key-value heads of D, rep = Hq / Hkv; M queries of a program, N = 64 tokens
of a page; C cuts of a row: those of its prompt, then its own. Lengths are read on the device; a program takes every
cut-th page of its table, so an early end leaves the later cuts of a row without work, not the GPU.

A program reads either a tile's prompt (M = width * rep queries share each page) or one row's own pages (M = rep). The
one that holds the row's last page also writes the new token there, and takes it from its registers. Who writes the last
of a query's parts merges them, in the order of the cuts: results repeat bit for bit, whoever that is. Arrivals are
counted in integers that are 0 again afterwards, so that a captured graph finds them so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.dispatch import on_device_of
from prism_kernels.tree_attention.decode_step import DecodeStep

PROGRAMS = 512  # to fill a GPU with
MOST_CUTS = 16  # of a prompt, and of a row's own tokens
LOG2_E = 1.4426950408889634


def tile_queries(queries: int, itemsize: int, dim: int) -> int:
    """Queries of a program, of those of a tile, padded: as many as keep out of local memory (bytes of a number)."""
    return min(padded(queries), 64 if itemsize == 2 else 32 if dim <= 64 else 16)


def launch_options(itemsize: int, dim: int, tile: int) -> dict[str, int]:
    """Warps and stages that keep a program of so many queries out of local memory."""
    return {"num_warps": 4 if itemsize == 2 and dim <= 64 and tile > 32 else 8, "num_stages": 2 if itemsize == 2 else 1}


def padded(n: int) -> int:
    """A tile's side: tensor cores take 16 at least."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b: 16-bit operands on tensor cores, fp32 in three tf32 products, fp64 as it is; sums as acc."""
    if a.dtype.primitive_bitwidth == 16:
        return tl.dot(a, b, acc)
    elif a.dtype == tl.float64:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _attend(
    q,  # (M, D)
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,  # of this prompt or row
    length,  # its tokens
    i_cut,
    num_cuts,
    k_new,  # (D,) the new token, if OWN
    v_new,
    i_head,
    num_kv_heads,
    scale,
    OWN: tl.constexpr,
    TILE: tl.constexpr,  # M
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Over pages i_cut, i_cut + num_cuts, ...: (M, D) means, and (M,) base-2 logs of the sums of exp; -inf for none."""
    i_d = tl.arange(0, D_PAD)
    i_n = tl.arange(0, 64)
    d_in = i_d < DIM
    m = tl.full([TILE], float("-inf"), WIDE)
    total = tl.zeros([TILE], WIDE)
    out = tl.zeros([TILE, D_PAD], WIDE)
    for i_page in range(i_cut, tl.cdiv(length, 64), num_cuts):
        page = tl.load(table_ptr + i_page).to(tl.int64)
        base = (page * num_kv_heads + i_head) * (64 * DIM)
        left = length - i_page * 64
        inside = i_n < left
        k = tl.load(
            k_pages_ptr + base + i_n[None, :] * DIM + i_d[:, None], mask=inside[None, :] & d_in[:, None], other=0.0
        )  # (D, N)
        v = tl.load(
            v_pages_ptr + base + i_n[:, None] * DIM + i_d[None, :], mask=inside[:, None] & d_in[None, :], other=0.0
        )  # (N, D)
        if OWN:
            new = i_n == left - 1  # on the last page alone, as left > 64 elsewhere
            k = tl.where(new[None, :], k_new[:, None], k)
            v = tl.where(new[:, None], v_new[None, :], v)
            if left <= 64:
                tl.store(k_pages_ptr + base + (left - 1) * DIM + i_d, k_new, mask=d_in)
                tl.store(v_pages_ptr + base + (left - 1) * DIM + i_d, v_new, mask=d_in)
        score = _dot(q, k, tl.zeros([TILE, 64], WIDE)) * scale  # (M, N), in powers of two
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(m, tl.max(score, 1))
        shrink = tl.exp2(m - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        out = _dot(weight.to(v.dtype), v, out * shrink[:, None])
        m = higher
    some = tl.where(total > 0.0, total, 1.0)
    return out / some[:, None], tl.where(total > 0.0, m + tl.log2(some), float("-inf"))


@triton.jit
def _heads(
    p_head,  # (M, 1) where the heads begin
    there,  # (M, 1)
    p_turn,  # (M, 1) where their tokens' cos and sin begin, from each table's start
    weight_ptr,  # (D,)
    cos_ptr,
    sin_ptr,
    eps,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(M, D) heads, normed and rotated if NORM: element j turns with j + D / 2."""
    i_d = tl.arange(0, D_PAD)[None, :]
    inside = there & (i_d < DIM)
    x = tl.load(p_head + i_d, mask=inside, other=0.0)
    if NORM:
        half: tl.constexpr = DIM // 2
        left = i_d < half
        i_pair = tl.where(left, i_d + half, i_d - half)
        in_d = i_d < DIM
        wide, pair = x.to(WIDE), tl.load(p_head + i_pair, mask=inside, other=0.0).to(WIDE)
        root = tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / DIM + eps)
        wide = wide * root * tl.load(weight_ptr + i_d, mask=in_d, other=0.0).to(WIDE)
        pair = pair * root * tl.load(weight_ptr + i_pair, mask=in_d, other=0.0).to(WIDE)
        cos = tl.load(cos_ptr + p_turn + i_d, mask=inside, other=0.0).to(WIDE)
        sin = tl.load(sin_ptr + p_turn + i_d, mask=inside, other=0.0).to(WIDE)
        x = (wide * cos + tl.where(left, -pair, pair) * sin).to(x.dtype)
    return x


@triton.jit
def _arrive(
    at,  # (M,) queries, of the batch's
    there,  # (M,)
    arrived_ptr,  # (B * Hq,) int32, 0 before and after all
    part_ptr,
    sum_ptr,
    out_ptr,  # (B, Hq, D) out
    cuts,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Says that a part of these queries is written; merges those of which it was the last."""
    tl.debug_barrier()  # all threads' parts, before one of them says so
    before = tl.atomic_add(arrived_ptr + at, 1, mask=there, sem="acq_rel")
    tl.debug_barrier()
    last = there & (before == cuts - 1)
    if tl.max(last.to(tl.int32), 0) > 0:
        i_d = tl.arange(0, D_PAD)
        at_cut = at * cuts
        top = tl.full([TILE], float("-inf"), WIDE)
        for i_cut in range(0, cuts):
            top = tl.maximum(top, tl.load(sum_ptr + at_cut + i_cut, mask=last, other=0.0, cache_modifier=".cg"))
        whole = tl.zeros([TILE], WIDE)
        out = tl.zeros([TILE, D_PAD], WIDE)
        for i_cut in range(0, cuts):
            total = tl.load(sum_ptr + at_cut + i_cut, mask=last, other=float("-inf"), cache_modifier=".cg")
            some = last & (total > float("-inf"))  # else the part was not written
            weight = tl.where(some, tl.exp2(total - top), 0.0)
            p_part = part_ptr + (at_cut + i_cut)[:, None] * DIM + i_d[None, :]
            mask = some[:, None] & (i_d < DIM)[None, :]
            out += tl.load(p_part, mask=mask, other=0.0, cache_modifier=".cg") * weight[:, None]
            whole += weight
        out = out / tl.where(last, whole, 1.0)[:, None]
        p_out = out_ptr + at[:, None] * DIM + i_d[None, :]
        tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=last[:, None] & (i_d < DIM)[None, :])
        tl.store(arrived_ptr + at, 0, mask=last)


@triton.jit
def shared_prompt_decode_kernel(
    q_ptr,  # (B, Hq, D), contiguous but for its rows
    k_ptr,  # (B, Hkv, D), contiguous but for their rows
    v_ptr,
    k_pages_ptr,  # (N, Hkv, 64, D)
    v_pages_ptr,
    q_weight_ptr,  # (D,), if NORM; so the next
    k_weight_ptr,
    cos_ptr,  # (B, D)
    sin_ptr,
    prompt_page_ptr,  # (G, prompt_pages) int32
    prompt_length_ptr,  # (G,) int32
    own_page_ptr,  # (B, own_pages) int32
    own_length_ptr,  # (B,) int32
    group_ptr,  # (B,) int32
    tile_row_ptr,  # (tiles, width) int32
    arrived_ptr,  # (B * Hq,) int32
    part_ptr,  # (B, Hq, C, D) out; where the next is -inf it is not written
    sum_ptr,  # (B, Hq, C) out, base-2 logs of the sums of exp
    out_ptr,  # (B, Hq, D) out
    q_row_stride,
    k_row_stride,
    v_row_stride,
    num_heads,
    num_kv_heads,
    num_tiles,
    width,
    prompt_pages,
    own_pages,
    prompt_cuts,
    own_cuts,
    scale: tl.float64,
    eps: tl.float64,
    TILE_M: tl.constexpr,  # of width * rep
    ROW_M: tl.constexpr,  # rep, padded
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    scale = (tl.zeros([1, 1], tl.float64) + scale).to(WIDE)
    eps = (tl.zeros([1, 1], tl.float64) + eps).to(WIDE)
    rep = num_heads // num_kv_heads
    cuts = prompt_cuts + own_cuts
    parts = tl.cdiv(width * rep, TILE_M)  # programs that share a tile's queries
    num_shared = num_tiles * parts * num_kv_heads * prompt_cuts
    i_d = tl.arange(0, D_PAD)
    d_in = i_d < DIM
    if pid < num_shared:
        i_cut = pid % prompt_cuts
        i_head = pid // prompt_cuts % num_kv_heads
        i_part = pid // (prompt_cuts * num_kv_heads) % parts
        i_tile = pid // (prompt_cuts * num_kv_heads * parts)
        i_m = i_part * TILE_M + tl.arange(0, TILE_M)
        member = i_m // rep
        row = tl.load(tile_row_ptr + i_tile * width + member, mask=member < width, other=-1).to(tl.int64)  # (M,)
        live = tl.load(own_length_ptr + row, mask=row >= 0, other=0) > 0
        if tl.max(live.to(tl.int32), 0) > 0:
            group = tl.load(group_ptr + tl.load(tile_row_ptr + i_tile * width)).to(tl.int64)
            head = i_head * rep + i_m % rep
            p_q = q_ptr + (row * q_row_stride + head * DIM)[:, None]
            q = _heads(
                p_q, live[:, None], row[:, None] * DIM, q_weight_ptr, cos_ptr, sin_ptr, eps, NORM, DIM, D_PAD, WIDE
            )
            none = tl.zeros([D_PAD], q.dtype)
            length = tl.load(prompt_length_ptr + group)
            out, total = _attend(
                q, k_pages_ptr, v_pages_ptr, prompt_page_ptr + group * prompt_pages, length, i_cut, prompt_cuts, none,
                none, i_head, num_kv_heads, scale, False, TILE_M, DIM, D_PAD, WIDE,
            )  # fmt: skip
            query = row * num_heads + head  # (M,)
            at = query * cuts + i_cut
            tl.store(sum_ptr + at, total, mask=live)
            some = live & (total > float("-inf"))
            tl.store(part_ptr + at[:, None] * DIM + i_d[None, :], out, mask=some[:, None] & d_in[None, :])
            _arrive(query, live, arrived_ptr, part_ptr, sum_ptr, out_ptr, cuts, TILE_M, DIM, D_PAD, WIDE)
    else:
        own = pid - num_shared
        i_cut = own % own_cuts
        i_head = own // own_cuts % num_kv_heads
        i_row = (own // (own_cuts * num_kv_heads)).to(tl.int64)
        length = tl.load(own_length_ptr + i_row)
        i_r = tl.arange(0, ROW_M)
        there = i_r < rep
        head = i_head * rep + i_r
        query = i_row * num_heads + head
        if length > 0:
            p_q = q_ptr + (i_row * q_row_stride + head * DIM)[:, None]
            turn = tl.zeros([1, 1], tl.int64) + i_row * DIM
            q = _heads(p_q, there[:, None], turn, q_weight_ptr, cos_ptr, sin_ptr, eps, NORM, DIM, D_PAD, WIDE)
            one = tl.full([1, 1], 1, tl.int1)
            p_k = k_ptr + i_row * k_row_stride + i_head * DIM + tl.zeros([1, 1], tl.int64)
            key = _heads(p_k, one, turn, k_weight_ptr, cos_ptr, sin_ptr, eps, NORM, DIM, D_PAD, WIDE)  # (1, D)
            k_new = tl.sum(key.to(WIDE), 0).to(q.dtype)
            v_new = tl.load(v_ptr + i_row * v_row_stride + i_head * DIM + i_d, mask=d_in, other=0.0)
            out, total = _attend(
                q, k_pages_ptr, v_pages_ptr, own_page_ptr + i_row * own_pages, length, i_cut, own_cuts, k_new, v_new,
                i_head, num_kv_heads, scale, True, ROW_M, DIM, D_PAD, WIDE,
            )  # fmt: skip
            at = query * cuts + prompt_cuts + i_cut
            tl.store(sum_ptr + at, total, mask=there)
            some = there & (total > float("-inf"))
            tl.store(part_ptr + at[:, None] * DIM + i_d[None, :], out, mask=some[:, None] & d_in[None, :])
            _arrive(query, there, arrived_ptr, part_ptr, sum_ptr, out_ptr, cuts, ROW_M, DIM, D_PAD, WIDE)
        elif i_cut == 0:  # an idle row, whose parts nobody writes
            nothing = tl.zeros([ROW_M, D_PAD], WIDE).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + query[:, None] * DIM + i_d[None, :], nothing, mask=there[:, None] & d_in[None, :])


def cuts(pages: int, programs: int) -> int:
    """Cuts of tables of so many pages, where there are so many programs without."""
    return max(1, min(MOST_CUTS, pages, triton.cdiv(PROGRAMS, programs)))


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    layout = step.layout
    rows, heads, dim = step.q.shape
    kv_heads = step.k.shape[1]
    prompt_pages, own_pages, (tiles, width) = (
        layout.prompt_page.shape[1], layout.own_page.shape[1], layout.tile_row.shape,
    )  # fmt: skip
    rep = heads // kv_heads
    tile = tile_queries(width * rep, step.q.element_size(), dim)
    programs = tiles * triton.cdiv(width * rep, tile)
    shared, own = cuts(prompt_pages, programs * kv_heads), cuts(own_pages, rows * kv_heads)
    wide = torch.promote_types(step.q.dtype, torch.float32)
    part = step.q.new_empty(rows, heads, shared + own, dim, dtype=wide)
    total = step.q.new_empty(rows, heads, shared + own, dtype=wide)
    q, k, v = (_by_rows(x) for x in (step.q, step.k, step.v))
    out = step.q.new_empty(rows, heads, dim)
    norm = step.norm
    turn = (q,) * 4 if norm is None else tuple(x.contiguous() for x in norm[:4])
    with on_device_of(q):
        shared_prompt_decode_kernel[(kv_heads * (programs * shared + rows * own),)](
            q, k, v, step.k_pages, step.v_pages, *turn, layout.prompt_page, layout.prompt_length, layout.own_page,
            layout.own_length, layout.group, layout.tile_row, layout.arrived, part, total, out, q.stride(0),
            k.stride(0), v.stride(0), heads, kv_heads, tiles, width, prompt_pages, own_pages, shared, own,
            step.scale * LOG2_E, 1.0 if norm is None else norm.eps, TILE_M=tile, ROW_M=padded(rep),
            NORM=norm is not None, DIM=dim, D_PAD=padded(dim), WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            **launch_options(step.q.element_size(), dim, tile),
        )  # fmt: skip
    return out


def _by_rows(x: Tensor) -> Tensor:
    """Heads of a row beside each other; rows may be parts of longer ones, as of a fused projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
