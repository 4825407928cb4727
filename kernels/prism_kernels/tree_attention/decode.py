"""Decoding in plain torch: one product per group against its prompt, one per row against its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.tree_attention.decode_layout import DecodeLayout


def shared_prompt_decode(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, layout: DecodeLayout, scale: float
) -> Tensor:
    """Scores of both kinds go through one softmax, so the result is exact."""
    batch, heads, dim = q.shape
    kv_heads = own_k.shape[1]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, dim) * scale
    on_prompt = _ungrid(_grid(queries, layout) @ prompt_k.transpose(2, 3), layout)  # (B, Hkv, rep, P)
    on_prompt = on_prompt.masked_fill(~layout.prompt_mask[layout.group][:, None, None], float("-inf"))
    on_own = queries @ own_k.transpose(2, 3)  # (B, Hkv, rep, L)
    scores = torch.cat([on_prompt, on_own], dim=-1)
    weight = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    prompt_weight, own_weight = weight.split([on_prompt.shape[-1], on_own.shape[-1]], dim=-1)
    out = _ungrid(_grid(prompt_weight, layout) @ prompt_v, layout) + own_weight @ own_v
    return out.reshape(batch, heads, dim)


def _grid(x: Tensor, layout: DecodeLayout) -> Tensor:
    """(B, Hkv, rep, n) -> (G, Hkv, width * rep, n); cells without a row are 0."""
    _, kv_heads, rep, n = x.shape
    width = layout.width
    grid = x.new_zeros(len(layout.prompt_mask) * width, kv_heads, rep, n).index_copy(0, layout.slot, x)
    return grid.view(-1, width, kv_heads, rep, n).transpose(1, 2).reshape(-1, kv_heads, width * rep, n)


def _ungrid(grid: Tensor, layout: DecodeLayout) -> Tensor:
    groups, kv_heads, both, n = grid.shape
    width = layout.width
    grid = grid.view(groups, kv_heads, width, both // width, n).transpose(1, 2)
    return grid.reshape(groups * width, kv_heads, both // width, n)[layout.slot]
