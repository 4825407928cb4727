"""RMSNorm of every head and its rotation on a GPU: queries and keys in one launch forward, one backward.

Legend: T tokens, Hq and Hkv heads of D, P programs of a backward. A program has one token at a time, all its heads
after one another, HEADS together, as a left and a right half of D / 2 each: a rotation pairs element j with j + D / 2,
and both halves of cos and sin are equal, so that the left ones are read. Nothing is kept for the backward but the
inputs: it takes a head's mean square again. A weight's gradient is a partial per program, summed afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.rms_norm.heads import Heads
from prism_kernels.rms_norm.triton_launch import _number, as_triton, contiguous_last, num_programs, rotate_options


@triton.jit
def _halves(pointer, half, inside, WIDE: tl.constexpr):
    """Left and right half of what lies at ``pointer``, as it is shaped."""
    left = tl.load(pointer, mask=inside, other=0.0).to(WIDE)
    right = tl.load(pointer + half, mask=inside, other=0.0).to(WIDE)
    return left, right


@triton.jit
def _forward_heads(
    x_ptr,  # (heads, D) of one token, last stride 1
    weight_ptr,  # (D,)
    out_ptr,  # (heads, D) contiguous, out
    heads,
    half,
    head_stride,
    cos,  # (BLOCK,)
    sin,
    eps,
    inverse_width,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    w_left, w_right = _halves(weight_ptr + column, half, column < half, WIDE)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (column < half)[None, :]
        left, right = _halves(x_ptr + head * head_stride + column[None, :], half, inside, WIDE)
        scale = tl.rsqrt(tl.sum(left * left + right * right, 1) * inverse_width + eps)[:, None]
        left = left * scale * w_left[None, :]
        right = right * scale * w_right[None, :]
        p_out = out_ptr + head * (2 * half) + column[None, :]
        narrow = out_ptr.dtype.element_ty
        tl.store(p_out, (left * cos[None, :] - right * sin[None, :]).to(narrow), mask=inside)
        tl.store(p_out + half, (right * cos[None, :] + left * sin[None, :]).to(narrow), mask=inside)


@triton.jit
def qk_norm_rotate_fwd_kernel(
    q_ptr,  # (T, Hq, D), last stride 1
    k_ptr,  # (T, Hkv, D), last stride 1, or q_ptr
    q_weight_ptr,  # (D,) contiguous
    k_weight_ptr,
    cos_ptr,  # (T, D), last stride 1
    sin_ptr,
    q_out_ptr,  # (T, Hq, D) contiguous, out
    k_out_ptr,  # (T, Hkv, D) contiguous, out, or q_out_ptr
    q_heads,
    k_heads,  # 0: there are no keys
    half,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    eps: tl.float64,
    inverse_width: tl.float64,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < half, other=0.0).to(WIDE)
    sin = tl.load(sin_ptr + token * sin_stride + column, mask=column < half, other=0.0).to(WIDE)
    eps, inverse_width = _number(eps, WIDE), _number(inverse_width, WIDE)
    _forward_heads(
        q_ptr + token * q_stride,
        q_weight_ptr,
        q_out_ptr + token * q_heads * (2 * half),
        q_heads,
        half,
        q_head_stride,
        cos,
        sin,
        eps,
        inverse_width,
        HEADS,
        BLOCK,
        WIDE,
    )
    _forward_heads(
        k_ptr + token * k_stride,
        k_weight_ptr,
        k_out_ptr + token * k_heads * (2 * half),
        k_heads,
        half,
        k_head_stride,
        cos,
        sin,
        eps,
        inverse_width,
        HEADS,
        BLOCK,
        WIDE,
    )


@triton.jit
def _backward_heads(
    d_out_ptr,  # (heads, D) of one token, last stride 1
    x_ptr,  # (heads, D), last stride 1
    weight_ptr,  # (D,)
    d_x_ptr,  # (heads, D) contiguous, out
    dw_left,  # (HEADS, BLOCK): gradient of the weight so far
    dw_right,
    heads,
    half,
    d_out_head_stride,
    x_head_stride,
    cos,  # (BLOCK,)
    sin,
    eps,
    inverse_width,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    w_left, w_right = _halves(weight_ptr + column, half, column < half, WIDE)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (column < half)[None, :]
        left, right = _halves(x_ptr + head * x_head_stride + column[None, :], half, inside, WIDE)
        d_left, d_right = _halves(d_out_ptr + head * d_out_head_stride + column[None, :], half, inside, WIDE)
        turned = d_left * cos[None, :] + d_right * sin[None, :]  # back by the same angle
        d_right = d_right * cos[None, :] - d_left * sin[None, :]
        d_left = turned
        scale = tl.rsqrt(tl.sum(left * left + right * right, 1) * inverse_width + eps)[:, None]
        left *= scale
        right *= scale
        dw_left += d_left * left
        dw_right += d_right * right
        d_left *= w_left[None, :]
        d_right *= w_right[None, :]
        along = (tl.sum(d_left * left + d_right * right, 1) * inverse_width)[:, None]
        p_out = d_x_ptr + head * (2 * half) + column[None, :]
        narrow = d_x_ptr.dtype.element_ty
        tl.store(p_out, ((d_left - left * along) * scale).to(narrow), mask=inside)
        tl.store(p_out + half, ((d_right - right * along) * scale).to(narrow), mask=inside)
    return dw_left, dw_right


@triton.jit
def qk_norm_rotate_bwd_kernel(
    d_q_out_ptr,  # (T, Hq, D), last stride 1
    d_k_out_ptr,  # (T, Hkv, D), last stride 1, or d_q_out_ptr
    q_ptr,  # (T, Hq, D), last stride 1
    k_ptr,  # (T, Hkv, D), last stride 1, or q_ptr
    q_weight_ptr,  # (D,) contiguous
    k_weight_ptr,
    cos_ptr,  # (T, D), last stride 1
    sin_ptr,
    d_q_ptr,  # (T, Hq, D) contiguous, out
    d_k_ptr,  # (T, Hkv, D) contiguous, out, or d_q_ptr
    partial_ptr,  # (P, 2, D) wide, contiguous, out: of the gradients of both weights
    num_tokens,
    q_heads,
    k_heads,  # 0: there are no keys
    half,
    d_q_out_stride,
    d_q_out_head_stride,
    d_k_out_stride,
    d_k_out_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    eps: tl.float64,
    inverse_width: tl.float64,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    eps, inverse_width = _number(eps, WIDE), _number(inverse_width, WIDE)
    q_left, q_right = tl.zeros([HEADS, BLOCK], dtype=WIDE), tl.zeros([HEADS, BLOCK], dtype=WIDE)
    k_left, k_right = tl.zeros([HEADS, BLOCK], dtype=WIDE), tl.zeros([HEADS, BLOCK], dtype=WIDE)
    first = tl.program_id(0).to(tl.int64)
    for behind in range(0, num_tokens - tl.program_id(0), tl.num_programs(0)):
        token = first + behind
        cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < half, other=0.0).to(WIDE)
        sin = tl.load(sin_ptr + token * sin_stride + column, mask=column < half, other=0.0).to(WIDE)
        q_left, q_right = _backward_heads(
            d_q_out_ptr + token * d_q_out_stride,
            q_ptr + token * q_stride,
            q_weight_ptr,
            d_q_ptr + token * q_heads * (2 * half),
            q_left,
            q_right,
            q_heads,
            half,
            d_q_out_head_stride,
            q_head_stride,
            cos,
            sin,
            eps,
            inverse_width,
            HEADS,
            BLOCK,
            WIDE,
        )
        k_left, k_right = _backward_heads(
            d_k_out_ptr + token * d_k_out_stride,
            k_ptr + token * k_stride,
            k_weight_ptr,
            d_k_ptr + token * k_heads * (2 * half),
            k_left,
            k_right,
            k_heads,
            half,
            d_k_out_head_stride,
            k_head_stride,
            cos,
            sin,
            eps,
            inverse_width,
            HEADS,
            BLOCK,
            WIDE,
        )
    p_out = partial_ptr + tl.program_id(0).to(tl.int64) * (4 * half) + column
    tl.store(p_out, tl.sum(q_left, 0), mask=column < half)
    tl.store(p_out + half, tl.sum(q_right, 0), mask=column < half)
    tl.store(p_out + 2 * half, tl.sum(k_left, 0), mask=column < half)
    tl.store(p_out + 3 * half, tl.sum(k_right, 0), mask=column < half)


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def forward(heads: Heads) -> tuple[Tensor, Tensor]:
    """(T, Hq, D) and (T, Hkv, D), normalised and rotated; without keys the second is empty."""
    q, k = heads.q, heads.k
    q_out, k_out = q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)
    h = _in_rows(heads)
    if q.shape[0]:
        qk_norm_rotate_fwd_kernel[(q.shape[0],)](
            *h.tensors,
            q_out,
            q_out if k is None else k_out,
            *h.sizes,
            *h.strides,
            *h.scalars,
            WIDE=as_triton(h.wide),
            **rotate_options(q.shape[2] // 2, max(h.sizes[:2]), h.wide, "forward"),
        )
    return q_out, k_out


def backward(d_q_out: Tensor, d_k_out: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and of the weights; without keys those of k are empty."""
    q, k, q_weight, k_weight = heads[:4]
    tokens, _, width = q.shape
    d_q, d_k = q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)
    h = _in_rows(heads)
    d_queries = contiguous_last(d_q_out)
    d_keys = d_queries if d_k_out is None else contiguous_last(d_k_out)
    options = rotate_options(width // 2, max(h.sizes[:2]), h.wide, "backward")
    programs = num_programs(tokens, q.device, options.pop("PROGRAMS"))
    partial = (torch.empty if tokens else torch.zeros)(programs, 2, width, dtype=h.wide, device=q.device)
    if tokens:
        qk_norm_rotate_bwd_kernel[(programs,)](
            d_queries,
            d_keys,
            *h.tensors,
            d_q,
            d_q if k is None else d_k,
            partial,
            tokens,
            *h.sizes,
            *d_queries.stride()[:2],
            *d_keys.stride()[:2],
            *h.strides,
            *h.scalars,
            WIDE=as_triton(h.wide),
            **options,
        )
    of_q, of_k = partial.sum(0)
    d_k_weight = q_weight.new_empty(0) if k_weight is None else of_k.to(k_weight.dtype, copy=True)
    return d_q, d_k, of_q.to(q_weight.dtype, copy=True), d_k_weight  # copies: results of an operator share no memory


class _Rows(NamedTuple):
    """Arguments of both kernels, in their order."""

    tensors: tuple[Tensor, ...]  # q, k, their weights, cos, sin
    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    scalars: tuple[float, float]
    wide: torch.dtype


def _in_rows(heads: Heads) -> _Rows:
    q = contiguous_last(heads.q)
    k = q if heads.k is None else contiguous_last(heads.k)
    cos, sin = contiguous_last(heads.cos), contiguous_last(heads.sin)
    weights = heads.q_weight, heads.q_weight if heads.k_weight is None else heads.k_weight
    return _Rows(
        (q, k, *(weight.contiguous() for weight in weights), cos, sin),
        (q.shape[1], 0 if heads.k is None else k.shape[1], q.shape[2] // 2),
        (*q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0)),
        (heads.eps, 1 / q.shape[2]),
        torch.promote_types(q.dtype, torch.float32),
    )
