"""Decoding over pages: one launch for all partial softmaxes, one that merges them by log-sum-exp; no wait, no atomics.

Legend: B rows, G prompts, Hq query and Hkv key-value heads of D, rep = Hq / Hkv; M queries of a program, N = 64 tokens
of a page; C cuts of a row: those of its prompt, then its own. Lengths are read on the device; a program takes every
cut-th page of its table, so an early end leaves the later cuts of a row without work, not the GPU.

A program reads either a tile's prompt (M = width * rep queries share each page) or one row's own pages (M = rep). The
one that holds the row's last page also writes the new token there, and takes it from its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.dispatch import on_device_of
from prism_kernels.operators import as_given
from prism_kernels.tree_attention.decode_step import DecodeStep

PROGRAMS = 512  # to fill a GPU with
MOST_CUTS = 16  # of a prompt, and of a row's own tokens
LOG2_E = 1.4426950408889634


def tile_queries(queries: int, itemsize: int, dim: int) -> int:
    """Queries of a program, of those of a tile, padded: as many as keep out of local memory (bytes of a number)."""
    return min(padded(queries), 64 if itemsize == 2 else 32 if dim <= 64 else 16)


def split_options(itemsize: int, dim: int) -> dict[str, int]:
    return {"num_warps": 4 if itemsize == 2 and dim <= 64 else 8, "num_stages": 2 if itemsize == 2 else 1}


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
def shared_prompt_decode_split_kernel(
    q_ptr,  # (B, Hq, D), contiguous but for its rows
    k_ptr,  # (B, Hkv, D), contiguous but for their rows
    v_ptr,
    k_pages_ptr,  # (N, Hkv, 64, D)
    v_pages_ptr,
    prompt_page_ptr,  # (G, prompt_pages) int32
    prompt_length_ptr,  # (G,) int32
    own_page_ptr,  # (B, own_pages) int32
    own_length_ptr,  # (B,) int32
    group_ptr,  # (B,) int32
    tile_row_ptr,  # (tiles, width) int32
    part_ptr,  # (B, Hq, C, D) out; where the next is -inf it is not written
    sum_ptr,  # (B, Hq, C) out, base-2 logs of the sums of exp
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
    TILE_M: tl.constexpr,  # of width * rep
    ROW_M: tl.constexpr,  # rep, padded
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    scale = (tl.zeros([1, 1], tl.float64) + scale).to(WIDE)
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
        first = tl.load(tile_row_ptr + i_tile * width)
        if first >= 0:
            group = tl.load(group_ptr + first).to(tl.int64)
            there = row >= 0
            head = i_head * rep + i_m % rep
            p_q = q_ptr + row[:, None] * q_row_stride + head[:, None] * DIM + i_d[None, :]
            q = tl.load(p_q, mask=there[:, None] & d_in[None, :], other=0.0)
            none = tl.zeros([D_PAD], q.dtype)
            length = tl.load(prompt_length_ptr + group)
            out, total = _attend(
                q, k_pages_ptr, v_pages_ptr, prompt_page_ptr + group * prompt_pages, length, i_cut, prompt_cuts, none,
                none, i_head, num_kv_heads, scale, False, TILE_M, DIM, D_PAD, WIDE,
            )  # fmt: skip
            at = (row * num_heads + head) * cuts + i_cut  # (M,)
            tl.store(sum_ptr + at, total, mask=there)
            there = there & (total > float("-inf"))
            tl.store(part_ptr + at[:, None] * DIM + i_d[None, :], out, mask=there[:, None] & d_in[None, :])
    else:
        own = pid - num_shared
        i_cut = own % own_cuts
        i_head = own // own_cuts % num_kv_heads
        i_row = (own // (own_cuts * num_kv_heads)).to(tl.int64)
        length = tl.load(own_length_ptr + i_row)
        if length > 0:
            i_m = tl.arange(0, ROW_M)
            there = i_m < rep
            head = i_head * rep + i_m
            p_q = q_ptr + i_row * q_row_stride + head[:, None] * DIM + i_d[None, :]
            q = tl.load(p_q, mask=there[:, None] & d_in[None, :], other=0.0)
            k_new = tl.load(k_ptr + i_row * k_row_stride + i_head * DIM + i_d, mask=d_in, other=0.0)
            v_new = tl.load(v_ptr + i_row * v_row_stride + i_head * DIM + i_d, mask=d_in, other=0.0)
            out, total = _attend(
                q, k_pages_ptr, v_pages_ptr, own_page_ptr + i_row * own_pages, length, i_cut, own_cuts, k_new, v_new,
                i_head, num_kv_heads, scale, True, ROW_M, DIM, D_PAD, WIDE,
            )  # fmt: skip
            at = (i_row * num_heads + head) * cuts + prompt_cuts + i_cut
            tl.store(sum_ptr + at, total, mask=there)
            there = there & (total > float("-inf"))
            tl.store(part_ptr + at[:, None] * DIM + i_d[None, :], out, mask=there[:, None] & d_in[None, :])


@triton.jit
def shared_prompt_decode_merge_kernel(
    part_ptr,  # (B, Hq, C, D)
    sum_ptr,  # (B, Hq, C)
    own_length_ptr,  # (B,) int32
    out_ptr,  # (B, Hq, D) out
    num_heads,
    num_cuts,
    DIM: tl.constexpr,
    D_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    at = i_row * num_heads + tl.program_id(1)
    i_c, i_d = tl.arange(0, C_PAD), tl.arange(0, D_PAD)
    written = tl.where(tl.load(own_length_ptr + i_row) > 0, num_cuts, 0)  # nobody writes the parts of an idle row
    total = tl.load(sum_ptr + at * num_cuts + i_c, mask=i_c < written, other=float("-inf"))  # (C,)
    some = total > float("-inf")
    top = tl.max(total, 0)
    weight = tl.where(some, tl.exp2(total - tl.where(written > 0, top, 0.0)), 0.0)
    p_part = part_ptr + (at * num_cuts + i_c[:, None]) * DIM + i_d[None, :]
    part = tl.load(p_part, mask=some[:, None] & (i_d < DIM)[None, :], other=0.0)  # (C, D)
    whole = tl.where(written > 0, tl.sum(weight, 0), 1.0)
    out = tl.sum(part * weight[:, None], 0) / whole
    tl.store(out_ptr + at * DIM + i_d, out.to(out_ptr.dtype.element_ty), mask=i_d < DIM)


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
    shape = {"DIM": dim, "D_PAD": padded(dim)}
    with on_device_of(q), as_given(q):
        shared_prompt_decode_split_kernel[(kv_heads * (programs * shared + rows * own),)](
            q, k, v, step.k_pages, step.v_pages, layout.prompt_page, layout.prompt_length, layout.own_page,
            layout.own_length, layout.group, layout.tile_row, part, total, q.stride(0), k.stride(0), v.stride(0),
            heads, kv_heads, tiles, width, prompt_pages, own_pages, shared, own, step.scale * LOG2_E,
            TILE_M=tile, ROW_M=padded(rep), **shape,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32, **split_options(step.q.element_size(), dim),
        )  # fmt: skip
        shared_prompt_decode_merge_kernel[(rows, heads)](
            part, total, layout.own_length, out, heads, shared + own, C_PAD=triton.next_power_of_2(shared + own),
            num_warps=2, **shape,
        )  # fmt: skip
    return out


def _by_rows(x: Tensor) -> Tensor:
    """Heads of a row beside each other; rows may be parts of longer ones, as of a fused projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
