"""Calls of a FlashAttention library, merged by log-sum-exp: a GPU's default for bf16 and fp16, any depth; see calls.py.

The library rounds the gradients of its parts: those of a root's keys and values, one of its own segment and one of all
its branches, are summed in fp32 and rounded once more. With u the roundoff of the dtype, errors of a rounding even
within u of a power of two, the sum s of parts p is off by at most u / sqrt(3) * sqrt(|s|^2 + sum |p|^2) in norm; where
query heads share keys FlashAttention 2 adds the norms of what each of them gives. ``varlen`` rounds once.

A root's keys and values take their gradient from ceil(P / 128) blocks a head: short prompts and few trees leave much of
a GPU idle there. Cutting the branches into two calls would fill it, at the price of one more part to sum.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prism_kernels.tree_attention import flash_library
from prism_kernels.tree_attention.calls import Attention, attend
from prism_kernels.tree_attention.layout import TreeLayout

MAX_DIM = 256
SMALLEST = 2.0**-126  # the library takes the scale as fp32, and multiplies masked scores, -inf, by it


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q."""
    return _attend("tree_attention", Attention(q, k, v, query_row, layout.segments, scale, True, ""))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, causal: bool) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> as q; one call."""
    return _attend("segment_attention", Attention(q, k, v, None, layout.segments, scale, causal, ""))


def _attend(op: str, a: Attention) -> Tensor:
    dim = a.q.shape[2]
    if dim > MAX_DIM:
        raise RuntimeError(
            f"{op}: implementation 'flash' takes heads of at most {MAX_DIM} numbers, got D = {dim}; use impl='sdpa' "
            "instead"
        )
    if a.scale < 0:
        a = a._replace(q=-a.q, scale=-a.scale)
    if a.scale < SMALLEST:
        a = a._replace(q=a.q * a.scale, scale=1.0)
    if dim % 8:
        q, k, v = (F.pad(x, (0, -dim % 8)) for x in a[:3])
        a = a._replace(q=q, k=k, v=v)
    out = attend(a._replace(library=flash_library.library(a.q.device.type)))
    return out[..., :dim] if dim % 8 else out
